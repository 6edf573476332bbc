"""Text files with thoughts in them: each word says whether it is text, a thought or a delimiter."""

from collections.abc import Iterator

from data.fingerprint import fingerprint
from data.source import Document
from data.text import TextFiles

OPEN, CLOSE = "<think>", "</think>"


def kinds_of(words: list[str]) -> list[int]:
    """0 text, 1 thought, 2 delimiter."""
    kinds, inside = [], False
    for word in words:
        inside = (inside or word == OPEN) and word != CLOSE
        kinds.append(2 if word in (OPEN, CLOSE) else int(inside))
    return kinds


class ThoughtText(TextFiles):
    """`data=text` whose tokens have a kind; white space belongs to no word and counts as text."""

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of the files."""
        for document in super().documents(split):
            kinds = kinds_of(document["text"].split())
            yield document | {"features": {"kind": kinds}}

    def fingerprint(self) -> str:
        """That of the files, changed."""
        return fingerprint([super().fingerprint(), "kinds of words"])
