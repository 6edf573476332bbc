"""Thoughts by rule: the partial sums of a chain of additions and subtractions.

Question: ... 12 + 7 - 3 =        Question: ... 12 + 7 - 3 =
Answer: 16                        Answer: <think>12 + 7 = 19, 19 - 3 = 16</think> 16
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any

from data.annotation import Acceptance, Annotated, Passage
from data.thoughts import Delimiters, Insertion, Limits, Rejected

_TERM = re.compile(r"([+-])\s*(\d+)")
# All of a formula before "=", so that no part of a longer one is taken for a sum of its own.
_SIGNS = r".,+*/()^%\u00d7\u00f7\u2212-"
_FORMULA = re.compile(rf"(?<!\w)[\d{_SIGNS}][\d \t{_SIGNS}]*(?=[ \t]*=)")
_STOP = re.compile(r"[.,)]+[ \t]+")  # the end of what stands before it
_SUM = re.compile(r"-?\d+(?:[ \t]*[+-][ \t]*\d+)+")
_NAME = re.compile(r"[\w)\]][ \t]*$")


class WorkedSums:
    """Works out the chain sums of a text.

    A chain sum is a text like `12 + 7 - 3 =`. Its thought goes behind the first `marker` that
    comes after it and before the next sum.

    Args:
        delimiters: of thoughts.
        limits: of what is accepted.
        marker: the text behind which the answer stands.
    """

    def __init__(self, delimiters: Delimiters, limits: Limits, marker: str = "Answer:") -> None:
        self._accept, self._marker = Acceptance(delimiters, limits), marker

    def identity(self) -> dict[str, Any]:
        """The rule and the marker."""
        return {"teacher": "worked_sums", "prompt_kind": "rule", "marker": self._marker}

    def annotate(self, passages: Iterable[Passage]) -> Iterator[Annotated]:
        """A text with its sums worked out; refused are `no_sum` and `no_place_for_answer`."""
        for passage in passages:
            try:
                augmented = self._accept(passage.text, self._insertions(passage.text))
            except Rejected as error:
                yield Annotated(passage.id, reason=error.reason)
            else:
                yield Annotated(passage.id, augmented)

    def _insertions(self, text: str) -> list[Insertion]:
        sums = sums_of(text)
        if not sums:
            raise Rejected("no_sum")
        ends = [begin for begin, _ in sums[1:]] + [len(text)]
        insertions = []
        for (begin, chain), end in zip(sums, ends, strict=True):
            place = text.find(self._marker, begin + len(chain), end)
            if place >= 0:
                insertions.append(Insertion(place + len(self._marker), worked(chain)))
        if not insertions:
            raise Rejected("no_place_for_answer")
        return insertions


def sums_of(text: str) -> list[tuple[int, str]]:
    """The chain sums of a text, each after the place where it begins. Formulas with anything else
    in them (other operations, brackets, fractions, names) are none."""
    found = []
    for match in _FORMULA.finditer(text):
        stop = _STOP.match(match.group())
        begin = match.start() + (stop.end() if stop else 0)
        chain = text[begin : match.end()].rstrip()
        # "x -3 + 4 =" begins with a name.
        named = chain.startswith("-") and _NAME.search(text, 0, begin)
        if _SUM.fullmatch(chain) and not named:
            found.append((begin, chain))
    return found


def worked(chain: str) -> str:
    """The partial sums: `12 + 7 - 3` becomes `12 + 7 = 19, 19 - 3 = 16`."""
    first = re.match(r"-?\d+", chain)
    assert first is not None, "a chain begins with a number"
    total, steps = int(first.group()), []
    for sign, digits in _TERM.findall(chain[first.end() :]):
        result = total + int(sign + digits)
        steps.append(f"{total} {sign} {int(digits)} = {result}")
        total = result
    return ", ".join(steps)
