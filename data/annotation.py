"""Putting thoughts into documents: their passages, what an annotator is, and the rows it makes."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from data.errors import DataError
from data.files import file_type, read_objects
from data.text import TextFiles
from data.thoughts import (
    Delimiters,
    Insertion,
    Limits,
    checked,
    passages,
    raw_of,
    segments_of,
    splice,
    word_coverage,
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Passage:
    """A text to put thoughts into.

    Attributes:
        id: its own.
        source_sha: of the document that it is from.
        text: the text.
        more: what else the document's row says; it goes into the row that is made.
    """

    id: str
    source_sha: str
    text: str
    more: Row = field(default_factory=dict)


@dataclass(frozen=True)
class Annotated:
    """What became of a passage: a text with thoughts, or why there is none.

    Attributes:
        id: of the passage.
        augmented: the text with thoughts.
        reason: what a check refused.
        error: what went wrong on the way; a later run may fare better.
        attempts: how often it was tried.
    """

    id: str
    augmented: str | None = None
    reason: str = ""
    error: str | None = None
    attempts: int = 1


class Annotator(Protocol):
    """Puts thoughts into passages."""

    def identity(self) -> dict[str, Any]:
        """What decides the thoughts, as plain values; among it `teacher` and `prompt_kind`."""
        ...

    def annotate(self, passages: Iterable[Passage]) -> Iterator[Annotated]:
        """One result for every passage, in any order."""
        ...


@dataclass(frozen=True)
class Acceptance:
    """What a text with thoughts has to be like."""

    delimiters: Delimiters
    limits: Limits

    def __call__(self, text: str, draft: Sequence[Insertion] | str) -> str:
        """The text with thoughts, from insertions or as it was written anew.

        Raises:
            Rejected: what `data.thoughts` refuses.
        """
        augmented = draft if isinstance(draft, str) else splice(text, draft, self.delimiters)
        checked(text, augmented, self.delimiters, self.limits)
        return augmented


def read_documents(paths: Sequence[Path], column: str = "text") -> Iterator[Passage]:
    """The documents of files, each as one passage.

    A row of a .jsonl file may have an `id` and a `source_sha`; else the place in its file is the
    one, and a hash of the text the other. Other files are read as `data=text` reads them.

    Raises:
        DataError: a row without a text, or an id that is there twice.
    """
    seen: set[str] = set()
    texts = TextFiles([str(path) for path in paths])
    for path in paths:
        if file_type(path) == ".jsonl":
            found = (_passage(place, row, column) for place, row in read_objects(path))
        else:
            numbered = enumerate(texts.read(path), start=1)
            found = (_passage(f"{path}:{n}", document, "text") for n, document in numbered)
        for passage in found:
            if passage.id in seen:
                raise DataError(f"{path}: id {passage.id!r} is there twice; allowed: unique ids")
            seen.add(passage.id)
            yield passage


def _passage(place: str, row: Row, column: str) -> Passage:
    text = row.get(column)
    if not isinstance(text, str) or not text.strip():
        keys = ", ".join(row)
        raise DataError(f"{place}: no text under {column!r} (keys: {keys}); set mode.text_column")
    known = {"id": f"{Path(place).name}", "source_sha": source_sha(text)}
    for name, value in known.items():
        known[name] = row.get(name, value)
        if not isinstance(known[name], str) or not known[name]:
            raise DataError(f"{place}: {name}={known[name]!r}: allowed a text")
    more = {name: value for name, value in row.items() if name not in {*known, column}}
    return Passage(**known, text=text, more=more)


def source_sha(text: str) -> str:
    """32 hexadecimal digits that tell a document apart."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def in_passages(document: Passage, max_words: int | None) -> Iterator[Passage]:
    """A document in passages of whole sentences; where there are several, numbered from 0 on."""
    texts = list(passages(document.text, max_words))
    for number, text in enumerate(texts):
        end = f"#{number}" if len(texts) > 1 else ""
        yield Passage(f"{document.id}{end}", document.source_sha, text, document.more)


def thought_row(
    passage: Passage, augmented: str, delimiters: Delimiters, teacher: str, prompt_kind: str
) -> Row:
    """The row of a passage with thoughts, as `data.thought_rows` reads it."""
    segments = segments_of(augmented, delimiters)
    stripped = raw_of(segments)
    return {
        **passage.more,
        "id": passage.id,
        "source_sha": passage.source_sha,
        "raw_text": passage.text,
        "augmented_text": augmented,
        "teacher": teacher,
        "prompt_kind": prompt_kind,
        "think_count": sum(segment.is_thought for segment in segments),
        "think_words": sum(len(one.text.split()) for one in segments if one.is_thought),
        "raw_word_coverage": word_coverage(passage.text, stripped),
        "original_text_preserved": stripped == passage.text,
    }
