"""A benchmark of a user's own: sums, and a grader that looks at the last word."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from data.chat import Row
from data.prompt_sets import make_row


class Sums:
    """Sums of two digits.

    Args:
        count: how many.
    """

    name = "toy_sums"
    libraries = ()

    def __init__(self, count: int) -> None:
        self.count = self.expected = count

    def rows(self) -> Iterator[Row]:
        """n + 2n."""
        for n in range(self.count):
            more = {"answer": str(3 * n)}
            name = f"{self.name}/{n}"
            yield make_row(name, self.name, f"{n} + {2 * n}", "{question}", more, name)

    def fingerprint(self) -> Any:
        """The count."""
        return {"sums": self.count}


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

    def check(self, item: Mapping[str, Any]) -> None:
        """Raise ValueError unless the item has an answer."""
        if not isinstance(item.get("answer"), str):
            raise ValueError(f"item {item['id']!r}: answer={item.get('answer')!r}; allowed: a text")

    def fingerprint(self) -> Any:
        """The option."""
        return {"last word": self.ignore_case}
