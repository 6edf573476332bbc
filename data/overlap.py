"""Where a row overlaps with the items of evaluation sets.

Three kinds of overlap between a part of a row (its prompt, its response, its context: what system,
assistant and tools said before) and a part of an
evaluation item (its question, its answer, its tests), on words: letters and digits, lower case,
without signs.

    whole        the row's prompt is the item's question, however short. Questions only: a short
                 answer, such as a number, says nothing.
    containment  the item's part, at least `least_characters` letters and digits, occurs in the
                 row's, wherever spaces and signs fall.
    ngram        both share a run of `ngram` words (13: Brown et al., arXiv:2005.14165, appendix C).

An item of fewer than `ngram` words can only be found by the first two.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.chat import Row, messages_of
from data.errors import DataError
from data.shingles import runs, words_of

WHOLE, CONTAINMENT, NGRAM = "whole", "containment", "ngram"
# The reason a row is removed for: the first of these that was found.
KINDS = (WHOLE, CONTAINMENT, NGRAM)
PROMPT, CONTEXT, QUESTION = "prompt", "context", "question"
SHOWN_WORDS = 60


@dataclass(frozen=True)
class OverlapRule:
    """What counts as an overlap.

    Attributes:
        ngram: words of a shared run.
        least_characters: letters and digits of an item's part that may count as contained.
        item_fields: fields of an evaluation item looked for beside its question, where present:
            texts, or lists of them.
        row_fields: fields of a row looked at beside its turns, where present.
    """

    ngram: int = 13
    least_characters: int = 40
    item_fields: Sequence[str] = ("answer", "solution", "tests", "reference")
    row_fields: Sequence[str] = ("response",)

    def __post_init__(self) -> None:
        for name in ("ngram", "least_characters"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: allowed: an integer >= 1")


class Part(NamedTuple):
    """A part of an evaluation item: `set` is the item's source, `item` its id."""

    set: str
    item: str
    name: str


class Hit(NamedTuple):
    """One overlap.

    Attributes:
        part: of the evaluation item.
        row_part: of the row.
        kind: whole | containment | ngram.
        text: what the two have in common, as words; of several runs the longest.
        words: words of that text.
        ngrams: how many runs of the item's part occur in the row's (of kind ngram).
    """

    part: Part
    row_part: str
    kind: str
    text: str
    words: int
    ngrams: int


class EvaluationIndex:
    """The parts of evaluation items, to look rows up in.

    Args:
        rule: what counts as an overlap.
    """

    def __init__(self, rule: OverlapRule) -> None:
        self.rule = rule
        self.items: dict[str, int] = {}
        self._whole: dict[str, dict[Part, None]] = defaultdict(dict)
        self._ngrams: dict[str, dict[Part, None]] = defaultdict(dict)
        # By their first characters, all that are to be found contained.
        self._compact: dict[str, list[tuple[str, list[str], Part]]] = defaultdict(list)

    def add(self, row: Row) -> None:
        """An evaluation item: a row of a prompt set."""
        self.items[row["source"]] = self.items.get(row["source"], 0) + 1
        for name, text in _item_texts(row, self.rule.item_fields):
            part = Part(row["source"], row["id"], name)
            words = words_of(text)
            if name == QUESTION and words:
                self._whole[" ".join(words)][part] = None
            for run in runs(words, self.rule.ngram):
                self._ngrams[run][part] = None
            compact = "".join(words)
            if len(compact) >= self.rule.least_characters:
                self._compact[compact[: self.rule.least_characters]].append((compact, words, part))

    def hits(self, row: Row) -> list[Hit]:
        """Every overlap of a row, each kind once for each part of the row and of an item."""
        found: dict[tuple[Part, str, str], Hit] = {}
        for row_part, text in _row_texts(row, self.rule.row_fields):
            words = words_of(text)
            for hit in (
                *self._whole_hits(words, row_part),
                *self._contained(words, row_part),
                *self._shared_runs(words, row_part),
            ):
                found.setdefault((hit.part, row_part, hit.kind), hit)
        return list(found.values())

    def _whole_hits(self, words: list[str], row_part: str) -> Iterator[Hit]:
        if row_part == PROMPT:
            text = " ".join(words)
            for part in self._whole.get(text, ()):
                yield Hit(part, row_part, WHOLE, _shown(words), len(words), 0)

    def _contained(self, words: list[str], row_part: str) -> Iterator[Hit]:
        text, size = "".join(words), self.rule.least_characters
        for start in range(len(text) - size + 1):
            for compact, item_words, part in self._compact.get(text[start : start + size], ()):
                if text.startswith(compact, start):
                    shown = _shown(item_words)
                    yield Hit(part, row_part, CONTAINMENT, shown, len(item_words), 0)

    def _shared_runs(self, words: list[str], row_part: str) -> Iterator[Hit]:
        places: dict[Part, list[int]] = defaultdict(list)
        for start, run in enumerate(runs(words, self.rule.ngram)):
            for part in self._ngrams.get(run, ()):
                places[part].append(start)
        for part, starts in places.items():
            first, last = _longest_stretch(starts)
            common = words[first : last + self.rule.ngram]
            yield Hit(part, row_part, NGRAM, _shown(common), len(common), len(starts))


def reason(hits: Sequence[Hit]) -> str:
    """The kind a row is counted under."""
    return min((hit.kind for hit in hits), key=KINDS.index)


def _longest_stretch(places: Sequence[int]) -> tuple[int, int]:
    """First and last of the longest stretch of consecutive numbers, of equals the first."""
    best = first = last = places[0]
    best_last = last
    for place in places[1:]:
        first, last = (first, place) if place == last + 1 else (place, place)
        if last - first > best_last - best:
            best, best_last = first, last
    return best, best_last


def _shown(words: Sequence[str]) -> str:
    """The words, but not thousands of them."""
    more = len(words) > SHOWN_WORDS
    return " ".join(words[:SHOWN_WORDS]) + (" ..." if more else "")


def _item_texts(row: Row, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    """The question, without the template around it where the row says what that is, and fields."""
    bare = row.get("question")
    if isinstance(bare, str):
        yield QUESTION, bare
    else:
        for text in _user_turns(row):
            yield QUESTION, text
    # The first of them is in the messages.
    for text in _texts(row.get("turns"))[1:]:
        yield QUESTION, text
    for name in fields:
        for text in _texts(row.get(name)):
            yield name, text


def _row_texts(row: Row, fields: Sequence[str]) -> Iterator[tuple[str, str]]:
    for turn in messages_of(row):
        yield PROMPT if turn["role"] == "user" else CONTEXT, turn["content"]
    for name in fields:
        for text in _texts(row.get(name)):
            yield name, text


def _user_turns(row: Row) -> list[str]:
    return [turn["content"] for turn in messages_of(row) if turn["role"] == "user"]


def _texts(value: Any) -> list[str]:
    """All texts of a field, also of lists and dicts; a number is one, null is none."""
    if value is None or isinstance(value, str):
        return [value] if value is not None else []
    if isinstance(value, dict | list):
        parts = value.values() if isinstance(value, dict) else value
        return [text for part in parts for text in _texts(part)]
    return [str(value)]
