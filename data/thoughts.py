"""Thoughts in a text: put in, found again, taken out, and checked.

A text with thoughts is the raw text with `<think>THOUGHT</think>` at some places. Where the raw
text goes on with white space, or ends, one space stands before the opening delimiter, so that it
reads well:

    raw       Answer: 16
    thoughts  Answer: <think>12 + 7 = 19, 19 - 3 = 16</think> 16

That space belongs to the delimiter. Taking thoughts out takes it out too, so

    strip_thoughts(splice(text, insertions)) == text

for every text and all insertions: a teacher that only says where its thoughts go cannot change a
letter. One that writes the whole text anew is checked instead, up to the forms of characters (NFKC)
and white space.
"""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from data.errors import DataError

Span = tuple[int, int]

# A sentence ends with its marks and the quotes and brackets behind them, or with its line.
_SENTENCE = re.compile(r"\S(?:.*?[.!?\u2026]+[\"'\u2019\u201d)\]]*(?=\s|$)|.*)")


class Rejected(ValueError):
    """A text with thoughts that a check refuses; `reason` is what such texts are counted by."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True)
class Delimiters:
    """What stands around a thought.

    Raises:
        DataError: texts that could not be told apart where they touch each other or other text.
    """

    open: str = "<think>"
    close: str = "</think>"

    def __post_init__(self) -> None:
        both = (self.open, self.close)
        if min(map(len, both)) < 2 or self.open in self.close or self.close in self.open:
            raise DataError(
                f"open={self.open}, close={self.close}: allowed two texts of two or more"
                " characters of which none contains the other"
            )
        for one, other in product(both, repeat=2):
            shorter = range(1, min(len(one), len(other)))
            if any(one.endswith(other[:size]) for size in shorter):
                raise DataError(
                    f"open={self.open}, close={self.close}: allowed texts of which none"
                    " begins as one of them ends"
                )

    def within(self, text: str) -> bool:
        """Whether one of them occurs in a text."""
        return self.open in text or self.close in text

    def escaped(self, text: str) -> str:
        """The text with a space inside every delimiter, so that none is left."""
        for one in (self.open, self.close):
            text = text.replace(one, f"{one[0]} {one[1:]}")
        return text


@dataclass(frozen=True)
class Insertion:
    """A thought, and the place in the raw text, in characters, that it goes to."""

    position: int
    thought: str


@dataclass(frozen=True)
class Segment:
    """A stretch of raw text, or a thought."""

    text: str
    is_thought: bool


@dataclass(frozen=True)
class Limits:
    """What texts with thoughts may be like; None: no bound.

    Attributes:
        min_thoughts, max_thoughts: number of thoughts.
        max_thought_words: words of each, between white space.
        max_words: words of text and thoughts together.

    Raises:
        DataError: fewer thoughts allowed than asked for.
    """

    min_thoughts: int = 1
    max_thoughts: int | None = None
    max_thought_words: int | None = None
    max_words: int | None = None

    def __post_init__(self) -> None:
        if self.max_thoughts is not None and self.max_thoughts < self.min_thoughts:
            raise DataError(
                f"limits.max_thoughts={self.max_thoughts}: allowed at least"
                f" min_thoughts={self.min_thoughts}"
            )

    def check(self, segments: Sequence[Segment]) -> None:
        """Raise Rejected where a text with thoughts is outside the bounds."""
        sizes = [len(segment.text.split()) for segment in segments]
        thoughts = [
            size for size, segment in zip(sizes, segments, strict=True) if segment.is_thought
        ]
        if len(thoughts) < self.min_thoughts:
            raise Rejected("too_few_thoughts")
        if self.max_thoughts is not None and len(thoughts) > self.max_thoughts:
            raise Rejected("too_many_thoughts")
        if self.max_thought_words is not None and max(thoughts, default=0) > self.max_thought_words:
            raise Rejected("thought_too_long")
        if self.max_words is not None and sum(sizes) > self.max_words:
            raise Rejected("too_long")


def sentences(text: str) -> list[Span]:
    """Begin and end of every sentence; between them there is only white space."""
    found = _SENTENCE.finditer(text)
    return [(match.start(), match.start() + len(match.group().rstrip())) for match in found]


def placed(text: str, asked: Any) -> list[Insertion]:
    """A teacher's list `[{"after": PLACE, "thought": TEXT}, ...]` as insertions.

    A place is the number of a sentence, from 1 on, or words of the text that occur once.

    Raises:
        Rejected: `not_a_list`, `no_such_sentence`, `quote_not_found`, `quote_ambiguous`.
    """
    if not isinstance(asked, list):
        raise Rejected("not_a_list")
    spans = sentences(text)
    return [Insertion(*_insertion(text, spans, item)) for item in asked]


def _insertion(text: str, spans: Sequence[Span], item: Any) -> tuple[int, str]:
    if not isinstance(item, Mapping) or not isinstance(item.get("thought"), str):
        raise Rejected("not_a_list")
    after = item.get("after")
    if isinstance(after, str) and after.strip():
        return _end_of_quote(text, after.strip()), item["thought"]
    if not isinstance(after, int) or isinstance(after, bool):
        raise Rejected("not_a_list")
    if not 1 <= after <= len(spans):
        raise Rejected("no_such_sentence")
    return spans[after - 1][1], item["thought"]


def _end_of_quote(text: str, quote: str) -> int:
    place = text.find(quote)
    if place < 0:
        raise Rejected("quote_not_found")
    if text.find(quote, place + 1) >= 0:
        raise Rejected("quote_ambiguous")
    return place + len(quote)


def splice(text: str, insertions: Sequence[Insertion], delimiters: Delimiters) -> str:
    """The text with the thoughts at their places; those of the same place in the order given.

    Raises:
        Rejected: `delimiter_in_text`, `delimiter_in_thought`, `empty_thought`.
    """
    if delimiters.within(text):
        raise Rejected("delimiter_in_text")
    pieces, last = [], 0
    for insertion in sorted(insertions, key=lambda one: one.position):
        assert 0 <= insertion.position <= len(text), "a place in the text"
        thought = insertion.thought.strip()
        if not thought:
            raise Rejected("empty_thought")
        if delimiters.within(thought):
            raise Rejected("delimiter_in_thought")
        pieces.append(text[last : insertion.position])
        last = insertion.position
        space = " " if _is_break(text[last:]) else ""
        pieces.append(f"{space}{delimiters.open}{thought}{delimiters.close}")
    return "".join([*pieces, text[last:]])


def _is_break(rest: str) -> bool:
    """Whether a text goes on with white space, or ends."""
    return not rest or rest[0].isspace()


def segments_of(augmented: str, delimiters: Delimiters) -> list[Segment]:
    """Raw text and thoughts in turn; raw text first and last, which may be empty.

    Raises:
        Rejected: `nested` thoughts, `unbalanced` delimiters, or an `empty_thought`.
    """
    texts, thoughts = _parsed(augmented, delimiters)
    found = []
    for number, text in enumerate(texts):
        is_last = number == len(texts) - 1
        # The space is of the delimiter that follows, as `splice` put it there.
        if not is_last and text.endswith(" ") and _is_break(_text_after(texts, number)):
            text = text[:-1]
        found.append(Segment(text, is_thought=False))
        if not is_last:
            found.append(Segment(thoughts[number].strip(), is_thought=True))
    return found


def _text_after(texts: Sequence[str], number: int) -> str:
    """What follows a thought, for `_is_break`: another thought is no white space."""
    following = texts[number + 1]
    is_thought_next = not following and number + 2 < len(texts)
    return "x" if is_thought_next else following


def _parsed(augmented: str, delimiters: Delimiters) -> tuple[list[str], list[str]]:
    texts, thoughts = [], []
    rest = augmented
    while delimiters.open in rest:
        text, _, rest = rest.partition(delimiters.open)
        thought, closed, rest = rest.partition(delimiters.close)
        if delimiters.close in text or not closed:
            raise Rejected("unbalanced")
        if delimiters.open in thought:
            raise Rejected("nested")
        if not thought.strip():
            raise Rejected("empty_thought")
        texts.append(text)
        thoughts.append(thought)
    if delimiters.close in rest:
        raise Rejected("unbalanced")
    return [*texts, rest], thoughts


def strip_thoughts(augmented: str, delimiters: Delimiters) -> str:
    """The raw text of one with thoughts.

    Raises:
        Rejected: as `segments_of`.
    """
    return raw_of(segments_of(augmented, delimiters))


def raw_of(segments: Sequence[Segment]) -> str:
    """The raw text of segments."""
    return "".join(segment.text for segment in segments if not segment.is_thought)


def checked(raw: str, augmented: str, delimiters: Delimiters, limits: Limits) -> list[Segment]:
    """The segments of a text with thoughts that passes every check.

    Raises:
        Rejected: `delimiter_in_text`, `text_changed` (what is left without the thoughts is not the
            raw text, up to forms of characters and white space), what `segments_of` refuses, or
            what is outside the limits.
    """
    if delimiters.within(raw):
        raise Rejected("delimiter_in_text")
    segments = segments_of(augmented, delimiters)
    if canonical(raw_of(segments)) != canonical(raw):
        raise Rejected("text_changed")
    limits.check(segments)
    return segments


def canonical(text: str) -> str:
    """Compatibility forms of characters folded (NFKC), runs of white space one space."""
    return " ".join(unicodedata.normalize("NFKC", text).split())


def word_coverage(raw: str, stripped: str) -> float:
    """Share of the words of the raw text, each as often as it occurs, that are still there."""
    words, left = Counter(raw.split()), Counter(stripped.split())
    return (words & left).total() / words.total() if words else 1.0


def passages(text: str, max_words: int | None) -> Iterator[str]:
    """A text in pieces of whole sentences and at most so many words, a longer sentence by itself;
    together they are the text, and white space stays with the sentence before it."""
    if max_words is None:
        yield text
        return
    begin, words, spans = 0, 0, sentences(text)
    for start, end in spans:
        size = len(text[start:end].split())
        if words and words + size > max_words:
            yield text[begin:start]
            begin, words = start, 0
        words += size
    if begin < len(text):
        yield text[begin:]
