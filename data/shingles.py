"""Texts as words, and word sequences as shingles: what near-duplicates and overlaps are made of."""

import re
from collections.abc import Iterator, Sequence

from data.chat import normalised

# Scripts that put no space between words: every character counts as one.
_SPACELESS = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = rf"[{_SPACELESS}]|[^\W{_SPACELESS}_]+"
_WORDS = re.compile(_WORD)
_WORDS_AND_SIGNS = re.compile(rf"{_WORD}|[^\w\s]|_")


def words_of(text: str) -> list[str]:
    """Letters and digits of a text as lower-case words; signs and spacing are dropped."""
    return _WORDS.findall(normalised(text))


def words_and_signs(text: str) -> list[str]:
    """Words, and every sign between them: `3 + 4` and `3 - 4` are not the same."""
    return _WORDS_AND_SIGNS.findall(normalised(text))


def runs(words: Sequence[str], size: int) -> Iterator[str]:
    """Every run of `size` words, joined by spaces."""
    for start in range(len(words) - size + 1):
        yield " ".join(words[start : start + size])


def shingles(text: str, size: int) -> frozenset[str]:
    """The set of runs of `size` words and signs; of a shorter text, the whole of it."""
    words = words_and_signs(text)
    if not words:
        return frozenset()
    return frozenset(runs(words, min(size, len(words))))


def jaccard(a: frozenset[str], b: frozenset[str]) -> float:
    """|a & b| / |a | b|; 0 for two empty sets, which say nothing."""
    union = len(a | b)
    return len(a & b) / union if union else 0.0
