"""Texts with thoughts as rows of JSON lines, and from them to tokens.

A row, as `mode=insert_thoughts` writes it:

    {"id", "source_sha", "raw_text", "augmented_text", "teacher", "prompt_kind", "think_count",
     "think_words", "raw_word_coverage", "original_text_preserved"}

Required are `id`, `source_sha` (what tells documents apart: every row of a document has the same),
`raw_text` and `augmented_text`. Tokens are not stored: each tokenizer makes its own.

Delimiters are single tokens, and the space before the opening one (see `data.thoughts`) is none, so
a model that goes on behind a prefix and an opening delimiter reads what it was trained on. Raw text
and thoughts are tokenized piece by piece: no token is half thought, and the tokens of text alone
spell the raw text.
"""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import PreTrainedTokenizerFast

from data.blocks import PackingReport, TokenBatch
from data.encoding import next_batch
from data.errors import DataError
from data.files import FileSource, read_objects
from data.fingerprint import unit_hash
from data.parts import DELIMITER, TEXT, THOUGHT, Part, PartTokenizer, token_batch
from data.source import Document
from data.thoughts import Delimiters, Limits, Rejected, Segment, checked, raw_of
from data.tokenization import SpecialIds

REQUIRED = ("id", "source_sha", "raw_text", "augmented_text")
SHARES = {"sft": 0.6, "rlmt": 0.3, "gate": 0.1}
FORMS = ("interleaved", "raw", "prefixes")


class ThoughtFiles(FileSource):
    """Rows of texts with thoughts, from .jsonl files.

    Shares and sides of the split depend on a row's `source_sha` alone, each by a hash of its own:
    a document is in one share, and there on one side.

    Args:
        files, valid_files, valid_fraction: see `data.files.FileSource`.
        share: the share to read; None reads all.
        shares: names of the shares, and how much of the documents each has; their sum is 1.

    Raises:
        DataError: no such share, or shares that are none.
    """

    name = "thoughts"
    types = (".jsonl",)

    def __init__(
        self,
        files: str | Sequence[str] | None,
        valid_files: str | Sequence[str] | None = None,
        valid_fraction: float = 0.05,
        share: str | None = None,
        shares: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(files, valid_files, valid_fraction)
        self.share, self.shares = share, dict(SHARES if shares is None else shares)
        if not math.isclose(sum(self.shares.values()), 1.0, abs_tol=1e-9):
            raise DataError(f"data.shares={self.shares}: allowed numbers whose sum is 1")
        if share is not None and not self.shares.get(share):
            names = ", ".join(name for name, part in self.shares.items() if part)
            raise DataError(f"data.share={share}: allowed {names} (data.shares), null")

    def read(self, path: Path) -> Iterator[Document]:
        """The rows of one file that are of the share; `text` is their source, which is split by."""
        for place, row in read_objects(path):
            missing = [key for key in REQUIRED if not isinstance(row.get(key), str)]
            if missing:
                raise DataError(f"{place}: no text under {missing[0]!r} (keys: {', '.join(row)})")
            if self.share in (None, share_of(row["source_sha"], self.shares)):
                yield {**row, "text": row["source_sha"]}

    def identity(self) -> dict[str, Any]:
        """The files, and the share of them."""
        return {**super().identity(), "share": self.share, "shares": list(self.shares.items())}


def share_of(source: str, shares: Mapping[str, float]) -> str:
    """The share that a document belongs to, by a hash of what tells it apart."""
    # Salted: the same hash decides between training and validation.
    place, bound = unit_hash(f"share {source}"), 0.0
    present = [(name, part) for name, part in shares.items() if part > 0]
    for name, part in present:
        bound += part
        if place < bound:
            return name
    return present[-1][0]  # the sum was rounded down


@dataclass(frozen=True)
class ThoughtEncoder:
    """Encodes rows of `ThoughtFiles`.

    Columns: `input_ids`; `response`, 1 on what the model is to write, else 0; and `kind`, 0 on
    text, 1 on thoughts and 2 on delimiters. Origins: documents by `source_sha`, numbered as they
    come. Rows that a check of `data.thoughts` refuses are left out in every form and counted by its
    reason, so arms that read the same file in unlike forms have the same documents.

    Args:
        form: `interleaved`, text with its thoughts, all of it response; `raw`, the raw text alone,
            all of it response; `prefixes`, the raw text cut at a thought, up to there the prefix
            and the rest the suffix, without the thought.
        open, close: the delimiters, one token each.
        limits: what else is refused.
        min_prefix, min_suffix: tokens that prefix and suffix have at least; the first thought that
            leaves them so many is where the text is cut. White space there goes to the suffix.
        end_suffix: whether EOS stands behind the text, as text.

    Raises:
        DataError: an unknown form, or delimiters that cannot be told apart.
    """

    edition: ClassVar[int] = 2
    form: str = "interleaved"
    open: str = Delimiters.open
    close: str = Delimiters.close
    limits: Limits = field(default_factory=Limits)
    min_prefix: int = 128
    min_suffix: int = 64
    end_suffix: bool = False

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise DataError(f"data.form={self.form}: allowed {', '.join(FORMS)}")

    def __call__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerFast,
        special: SpecialIds,
        report: PackingReport,
    ) -> Iterator[TokenBatch]:
        """Rows of all documents, in batches.

        Raises:
            DataError: a delimiter that is not one token.
        """
        around = (
            delimiter_id(tokenizer, self.open, "data.open"),
            delimiter_id(tokenizer, self.close, "data.close"),
        )
        iterator, encode = iter(documents), PartTokenizer(tokenizer)
        end = [Part([special.eos], 1)] if self.end_suffix else []
        numbers: dict[str, int] = {}
        while batch := next_batch(iterator):
            report.documents += len(batch)
            accepted = list(self._accepted(batch, report))
            texts = [segments for _, segments in accepted]
            if self.form == "prefixes":
                rows = self._prefixes(texts, encode, report)
            else:
                rows = self._whole(texts, encode, around, report)
            # Of those left out, too: a document has one number in every form.
            origin = [numbers.setdefault(name, len(numbers)) for name, _ in accepted]
            kept = [place for place, row in enumerate(rows) if row]
            if kept:
                origins = [origin[place] for place in kept]
                whole = [[*rows[place], *end] for place in kept]
                found = token_batch(whole, special, report, origins, with_kind=True)
                report.tokens += int(found.lengths.sum())
                yield found

    def _accepted(
        self, batch: Sequence[Document], report: PackingReport
    ) -> Iterator[tuple[str, list[Segment]]]:
        """What tells the document apart, and its segments."""
        delimiters = Delimiters(self.open, self.close)
        for row in batch:
            try:
                texts = row["raw_text"], row["augmented_text"]
                yield row["source_sha"], checked(*texts, delimiters, self.limits)
            except Rejected as error:
                report.reject(error.reason)

    def _whole(
        self,
        texts: Sequence[list[Segment]],
        encode: PartTokenizer,
        around: tuple[int, int],
        report: PackingReport,
    ) -> list[list[Part]]:
        if self.form == "raw":
            texts = [[Segment(raw_of(segments), is_thought=False)] for segments in texts]
        flat = [segment for segments in texts for segment in segments]
        found = iter(encode([segment.text for segment in flat], report))
        return [_parts(segments, found, around) for segments in texts]

    def _prefixes(
        self, texts: Sequence[list[Segment]], encode: PartTokenizer, report: PackingReport
    ) -> list[list[Part]]:
        """A row for every text, without parts where it is left out."""
        cuts = [list(cuts_of(segments)) for segments in texts]
        found = encode([half for places in cuts for cut in places for half in cut], report)
        halves = iter(zip(found[::2], found[1::2], strict=True))
        rows: list[list[Part]] = []
        for places in cuts:
            rows.append([])
            here = [next(halves) for _ in places]
            fitting = [cut for cut in here if self._fits(*cut)]
            if fitting:
                prefix, suffix = fitting[0]
                rows[-1] = [Part(prefix, 0), Part(suffix, 1)]
            elif here:
                lost = len(here[0][0]) + len(here[0][1])
                report.short_documents += 1
                report.tokens += lost
                report.dropped_tokens += lost
            else:
                report.unmarked_documents += 1
        return rows

    def _fits(self, prefix: Sequence[int], suffix: Sequence[int]) -> bool:
        return len(prefix) >= self.min_prefix and len(suffix) >= self.min_suffix


def _parts(
    segments: Sequence[Segment], ids: Iterator[list[int]], around: tuple[int, int]
) -> list[Part]:
    """The segments as parts, thoughts between their delimiters; `ids` are the segments' tokens."""
    parts = []
    for segment in segments:
        if segment.is_thought:
            before, after = (Part([token], 1, DELIMITER) for token in around)
            parts += [before, Part(next(ids), 1, THOUGHT), after]
        else:
            parts.append(Part(next(ids), 1, TEXT))
    return parts


def cuts_of(segments: Sequence[Segment]) -> Iterator[tuple[str, str]]:
    """For every thought the raw text before it, without white space at its end, and the rest."""
    raw, place = raw_of(segments), 0
    for segment in segments:
        if segment.is_thought:
            prefix = raw[:place].rstrip()
            yield prefix, raw[len(prefix) :]
        else:
            place += len(segment.text)


def delimiter_id(tokenizer: PreTrainedTokenizerFast, text: str, key: str) -> int:
    """The one token that a delimiter is.

    Raises:
        DataError: no token of the tokenizer is this text.
    """
    token = tokenizer.get_vocab().get(text)
    if token is None:
        raise DataError(
            f"{key}={text}: {len(tokenizer.encode(text, add_special_tokens=False))} tokens of"
            f" tokenizer {tokenizer.name_or_path!r}; allowed: a text that is one token of it"
            f" (of model=tiny_causal, any of model.extra_tokens)"
        )
    return token
