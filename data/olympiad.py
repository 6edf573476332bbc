"""OlympiadBench (arXiv:2402.14008) as one text per answer: what can be graded by equality."""

import logging
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice

from data.errors import DataError
from data.fingerprint import fingerprint
from data.prompt_tables import Item, Table

log = logging.getLogger(__name__)
# Answers are compared as LaTeX without the signs that begin and end it.
_DOLLAR = re.compile(r"(?<!\\)\$")


class OlympiadTable:
    """Rows of another table that have one exact answer, in the order of that table.

    Left out are rows with a tolerance (`error`), with several answers (`is_multiple_answer`), and
    without an answer; how many is logged. The answers of the table are lists, `final_answer`; here
    it is the first one, a text.

    Args:
        table: with the columns of the hub.
        first: only so many of its rows, before any is left out; None: all.

    Raises:
        DataError: by `items`, a row without these columns or whose answer is no text, by place.
    """

    def __init__(self, table: Table, first: int | None = None) -> None:
        if first is not None and first < 1:
            raise DataError(f"prompts.table.first={first}: allowed: an integer >= 1, or null")
        self.table, self.first = table, first
        self.libraries = table.libraries

    def items(self) -> Iterator[tuple[str, Item]]:
        """The rows that are kept, each after its place."""
        left_out: Counter[str] = Counter()
        for place, item in islice(self.table.items(), self.first):
            reason = _why_not(place, item)
            if reason is not None:
                left_out[reason] += 1
                continue
            answer = item["final_answer"][0]
            if not isinstance(answer, str):
                raise DataError(f"{place}: final_answer={item['final_answer']}; allowed: texts")
            yield place, {**item, "final_answer": _DOLLAR.sub("", answer).strip()}
        if left_out:
            counts = ", ".join(f"{count} {reason}" for reason, count in sorted(left_out.items()))
            log.info("OlympiadBench: %d rows are left out (%s)", left_out.total(), counts)

    def fingerprint(self) -> str:
        """Of the table, and how many of its rows are read."""
        return fingerprint({"olympiad": self.table.fingerprint(), "first": self.first})


def _why_not(place: str, item: Item) -> str | None:
    """Why a row is left out; None: it is not."""
    for column in ("error", "is_multiple_answer", "final_answer"):
        if column not in item:
            raise DataError(f"{place}: no column {column!r}; there are {', '.join(map(str, item))}")
    if item["error"]:
        return "with a tolerance"
    if item["is_multiple_answer"]:
        return "with several answers"
    return None if item["final_answer"] else "without an answer"
