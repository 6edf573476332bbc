"""What a judge has written: one of the allowed answers, or why it is none."""

import json
from collections.abc import Collection
from typing import Any

# Judges answer in a few words; what they say before that is not read without end.
_LONGEST = 20_000
_SHOWN = 80
_DECODER = json.JSONDecoder()


def read_answer(text: str, field: str, allowed: Collection[str]) -> tuple[str | None, str]:
    """The answer in the last JSON object of a text.

    Numbers are compared as numbers (1 and 1.0 are the answer "1"); texts letter by letter, white
    space around them aside; true and false are no numbers.

    Args:
        text: what the judge wrote.
        field: where the answer stands.
        allowed: the answers.

    Returns:
        the answer and "", or None and one line why there is none.
    """
    found = last_object(text)
    if found is None:
        return None, f"no JSON object: {_excerpt(text)}"
    if field not in found:
        return None, f"no {field} in the answer: {_excerpt(json.dumps(found))}"
    answer = _as_text(found[field])
    if answer not in allowed:
        return None, f"not an allowed answer: {_excerpt(json.dumps(found[field]))}"
    return answer, ""


def last_object(text: str) -> dict[str, Any] | None:
    """The last JSON object of a text that is not inside of another one; None: there is none."""
    text = text[-_LONGEST:]
    found, place = None, text.find("{")
    while place >= 0:
        try:
            found, end = _DECODER.raw_decode(text, place)
        # Brackets nested a thousand deep exhaust the stack.
        except (ValueError, RecursionError):
            end = place + 1
        place = text.find("{", end)
    return found


def _as_text(value: Any) -> str | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value).strip() if isinstance(value, str | int | float) else None


def _excerpt(text: str) -> str:
    """The end of a text in one line, where an answer would stand."""
    return " ".join(text.split())[-_SHOWN:] or "nothing was written"
