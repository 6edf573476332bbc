"""Text files whose words carry made-up depths: 0, 1, 2, 3, 0, ... in trees of height 3."""

from collections.abc import Iterator

from data.fingerprint import fingerprint
from data.source import Document
from data.text import TextFiles


class TreeText(TextFiles):
    """`data=text` with features, for runs that need some and no particular ones."""

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of the files, with a depth for every word."""
        for document in super().documents(split):
            words = len(document["text"].split())
            depths = [place % 4 for place in range(words)]
            yield document | {"features": {"depth": depths, "height": [3] * words}}

    def fingerprint(self) -> str:
        """That of the files, changed."""
        return fingerprint([super().fingerprint(), "depth = place modulo 4"])
