"""Real English that ships with Python itself: the language reference behind `help()`."""

import re
from collections.abc import Iterator
from functools import cached_property

from data.errors import DataError
from data.fingerprint import fingerprint, unit_hash
from data.source import Document, require_split

_UNDERLINE = re.compile(r"^[*=~^\"+.#-]{3,}$")
_BLANK_LINES = re.compile(r"\n\s*\n")
# Longer topics are collections of others: held out, one alone would be a third of the text.
_LONGEST_HELD_OUT = 16_000


class PyDocs:
    """Topics of `pydoc_data`, the text shown by `help("assignment")`; needs no network.

    Whole topics belong to a split. In the order of a hash of their names, topics go to validation
    until it holds its share of the characters, then to test; the others, and the longest, are for
    training. Topics quote one another, so each paragraph is kept only where it comes first in the
    order validation, test, train: nothing that is evaluated was trained on. The text depends on
    the Python version, as does the fingerprint.

    Args:
        validation_fraction: share of the characters for validation.
        test_fraction: share of the characters for test.

    Raises:
        DataError: this Python was installed without `pydoc_data`.
    """

    name = "pydocs"
    splits = ("train", "validation", "test")

    def __init__(self, validation_fraction: float = 0.08, test_fraction: float = 0.08) -> None:
        self.fractions = {"validation": validation_fraction, "test": test_fraction}

    def documents(self, split: str) -> Iterator[Document]:
        """One document per topic, in the order of the hashes of their names."""
        require_split(self, split)
        for text in self._texts[split]:
            yield {"text": text}

    def fingerprint(self) -> str:
        """Hash of the texts of all splits."""
        return fingerprint(self._texts)

    @cached_property
    def _texts(self) -> dict[str, list[str]]:
        topics = _read_topics()
        characters = sum(map(len, {p for text in topics.values() for p in _paragraphs(text)}))
        names = sorted(topics, key=unit_hash)
        candidates = [name for name in names if len(topics[name]) <= _LONGEST_HELD_OUT]
        seen: set[str] = set()
        texts: dict[str, list[str]] = {}
        for split, fraction in self.fractions.items():
            texts[split] = []
            while candidates and sum(map(len, texts[split])) < fraction * characters:
                name = candidates.pop(0)
                names.remove(name)
                texts[split].append(_first_occurrences(topics[name], seen))
        texts["train"] = [_first_occurrences(topics[name], seen) for name in names]
        return {split: list(filter(None, found)) for split, found in texts.items()}


def _read_topics() -> dict[str, str]:
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise DataError("this Python has no pydoc_data; use data=text data.files=...") from error
    return topics


def _first_occurrences(text: str, seen: set[str]) -> str:
    """The paragraphs of a topic that are not in `seen` yet; they are added to it."""
    kept = []
    for paragraph in _paragraphs(text):
        if paragraph not in seen:
            seen.add(paragraph)
            kept.append(paragraph)
    return "\n\n".join(kept)


def _paragraphs(text: str) -> list[str]:
    return [paragraph for paragraph in map(_clean, _BLANK_LINES.split(text)) if paragraph]


def _clean(paragraph: str) -> str:
    """Drop underlines, and join the hard-wrapped lines of prose; indented code stays as it is."""
    lines = [line.rstrip() for line in paragraph.splitlines()]
    lines = [line for line in lines if line and not _UNDERLINE.match(line)]
    if any(line.startswith("  ") for line in lines):
        return "\n".join(lines)
    return " ".join(lines)
