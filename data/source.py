"""What a data source is: named documents, per split, with a fingerprint of their content."""

from collections.abc import Iterator
from typing import Any, Protocol

from data.errors import DataError

Document = dict[str, Any]


class Source(Protocol):
    """Anything that yields documents.

    A document is a dict with the key `text` (str) and, optionally, `features`: a dict of integer
    sequences, one value per word. The words are those between white space, or those that `spans`
    lists, as pairs (start, end) of places in `text`. Every token of a word receives the value of
    its word, and the values travel beside the token ids into the batches (`data.encoding`).
    """

    name: str

    @property
    def splits(self) -> tuple[str, ...]:
        """The splits that exist, a subset of train, validation, test."""
        ...

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of one split, always in the same order."""
        ...

    def fingerprint(self) -> str:
        """Identity of the content: equal if and only if the documents are equal."""
        ...


def require_split(source: Source, split: str) -> None:
    """Raise DataError unless `source` has `split`."""
    if split not in source.splits:
        raise DataError(f"data {source.name!r} has no split {split!r}; it has {source.splits}")
