"""A new dataset in one module: counting, from any number on."""

from collections.abc import Iterator

from data.errors import DataError
from data.fingerprint import fingerprint
from data.source import Document, require_split

DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


class Counting:
    """Documents that count: "three four five ...", modulo ten.

    Args:
        documents_per_split: number of documents of each split.
        words: words of a document.
    """

    name = "counting"
    splits = ("train", "validation")

    def __init__(self, documents_per_split: int = 40, words: int = 20) -> None:
        if documents_per_split < 1:
            raise DataError(f"documents_per_split={documents_per_split}: allowed 1 or more")
        self.documents_per_split, self.words = documents_per_split, words

    def documents(self, split: str) -> Iterator[Document]:
        """Document n begins with the digit n modulo ten."""
        require_split(self, split)
        for first in range(self.documents_per_split):
            digits = (DIGITS[(first + place) % 10] for place in range(self.words))
            yield {"text": " ".join(digits)}

    def fingerprint(self) -> str:
        """The two numbers say everything."""
        return fingerprint({"documents": self.documents_per_split, "words": self.words})
