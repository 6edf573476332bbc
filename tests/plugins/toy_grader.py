"""A grader of tests: an answer is right if its last word is the item's."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class LastWord:
    """What was found."""

    correct: bool
    extracted: str | None
    reason: str


class LastWordGrader:
    """Compares the last word with `answer`.

    Args:
        ignore_case: whether capitals do not matter.
    """

    def __init__(self, ignore_case: bool = False) -> None:
        self.ignore_case = ignore_case

    def grade(self, item: Mapping[str, Any], text: str) -> LastWord:
        """The verdict."""
        words = text.split()
        if not words:
            return LastWord(False, None, "no words")
        found, wanted = words[-1], str(item["answer"])
        if self.ignore_case:
            found, wanted = found.lower(), wanted.lower()
        return LastWord(found == wanted, found, "the last word")

    def fingerprint(self) -> Any:
        """The option."""
        return {"last word": self.ignore_case}
