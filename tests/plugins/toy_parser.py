"""A parser that needs no model: the depth of a word is its number of letters minus one."""

import time
from collections.abc import Sequence
from typing import Any

from data.depth import tree_features
from data.parse_store import EMPTY, FAILED, PARSED, ParsedDocument
from data.words import words


class ToyParser:
    """Fails on texts with the word FAIL; takes `pause` seconds for every call."""

    on_gpu = False

    def __init__(self, pause: float = 0.0, version: int = 1) -> None:
        self.pause = pause
        self.version = version

    def options(self) -> dict[str, Any]:
        """There are none."""
        return {"parser": "toy"}

    def identity(self) -> dict[str, Any]:
        """As if the version were that of a model."""
        return {"version": self.version}

    def parse(self, texts: Sequence[str]) -> list[ParsedDocument]:
        """Words by rule, a sentence per text."""
        time.sleep(self.pause)
        return [self._parse(text) for text in texts]

    def _parse(self, text: str) -> ParsedDocument:
        spans = words(text)
        if "FAIL" in text:
            return ParsedDocument(FAILED, 0, (), (), (), (), "ValueError: told to fail")
        start, end = [start for start, _ in spans], [end for _, end in spans]
        features = tree_features([end - start - 1 for start, end in spans])
        status = PARSED if spans else EMPTY
        count = int(bool(spans))
        return ParsedDocument(status, count, start, end, features["depth"], features["height"])
