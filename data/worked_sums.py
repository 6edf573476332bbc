"""Thoughts by rule: the partial sums of a chain of additions and subtractions.

Question: ... 12 + 7 - 3 =        Question: ... 12 + 7 - 3 =
Answer: 16                        Answer: <think>12 + 7 = 19, 19 - 3 = 16</think> 16

A share of the documents may get idle thoughts instead, which say what is asked and help nobody:
teachers write such thoughts, too, and it is for rewards to find out which ones pay.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from data.annotation import Acceptance, Annotated, Passage
from data.errors import DataError
from data.fingerprint import unit_hash
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
        idle: share of the documents with idle thoughts, chosen by a hash of the document.

    Raises:
        DataError: a share outside [0, 1].
    """

    def __init__(
        self,
        delimiters: Delimiters,
        limits: Limits,
        marker: str = "Answer:",
        idle: float | int = 0.0,
    ) -> None:
        if not 0.0 <= idle <= 1.0:
            raise DataError(f"mode.annotator.idle={idle}: allowed a number in [0, 1]")
        self._accept, self._marker = Acceptance(delimiters, limits), marker
        self._idle = float(idle)

    def identity(self) -> dict[str, Any]:
        """The rule, the marker and the share of idle thoughts."""
        found: dict[str, Any] = {
            "teacher": "worked_sums", "prompt_kind": "rule", "marker": self._marker,
        }  # fmt: skip
        return found | ({"idle": self._idle} if self._idle else {})

    def annotate(self, passages: Iterable[Passage]) -> Iterator[Annotated]:
        """A text with its sums worked out; refused are `no_sum` and `no_place_for_answer`."""
        for passage in passages:
            try:
                think = idle if unit_hash(f"idle\n{passage.source_sha}") < self._idle else worked
                augmented = self._accept(passage.text, self._insertions(passage.text, think))
            except Rejected as error:
                yield Annotated(passage.id, reason=error.reason)
            else:
                yield Annotated(passage.id, augmented)

    def _insertions(self, text: str, think: Callable[[str], str]) -> list[Insertion]:
        sums = sums_of(text)
        if not sums:
            raise Rejected("no_sum")
        ends = [begin for begin, _ in sums[1:]] + [len(text)]
        insertions = []
        for (begin, chain), end in zip(sums, ends, strict=True):
            place = text.find(self._marker, begin + len(chain), end)
            if place >= 0:
                insertions.append(Insertion(place + len(self._marker), think(chain)))
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


def idle(chain: str) -> str:
    """What is asked: `12 + 7 - 3` becomes `3 terms to add up`."""
    return f"{len(re.findall(r'[0-9]+', chain))} terms to add up"
