"""Documents cut into prefixes and suffixes: what online training continues, and how it really went.

Three ways to cut a document of n tokens into chunks of S = `suffix_len`:

    contiguous  chunk j >= 1 is a suffix, the whole chunks before it its prefix, as many of the
                nearest as fit into `max_len` tokens together with it (arXiv 2601.21343, section 3)
    fixed       tokens 0..P-1 with P = `prefix_len`, and the S after them; one row per document
    marker      the prefix ends with the first `marker` in the text, and the suffix is what follows

Of the first two a document is tokenized as a whole and cut between tokens; a marker cuts the text.
What a document says is text: a delimiter of thoughts or a special token that is written out in it
becomes the tokens of its characters.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, NamedTuple

from transformers import PreTrainedTokenizerFast

from data.blocks import PackingReport, TokenBatch
from data.encoding import next_batch
from data.errors import DataError
from data.parts import Part, PartTokenizer, token_batch
from data.pydocs import PyDocs
from data.source import Document, Source
from data.text import TextFiles
from data.tokenization import SpecialIds


class Cut(NamedTuple):
    """Of the document at a place of its batch a prefix and a suffix; does it end there?"""

    place: int
    prefix: Sequence[int]
    suffix: Sequence[int]
    is_end: bool


def documents_of(
    files: str | Sequence[str] | None = None,
    valid_files: str | Sequence[str] | None = None,
    valid_fraction: float = 0.05,
    text_column: str = "text",
    split_paragraphs: bool | None = None,
) -> Source:
    """The user's documents (`data.text.TextFiles`), or without files the English that ships with
    Python (`data.pydocs.PyDocs`). Documents are split before they are cut, so no two sides have
    rows of the same one."""
    if not files:
        return PyDocs(validation_fraction=valid_fraction)
    return TextFiles(files, valid_files, valid_fraction, text_column, split_paragraphs)


@dataclass(frozen=True)
class Chunking:
    """How documents are cut; lengths in tokens.

    Attributes:
        mode: `contiguous`, `fixed` or `marker`, as above.
        suffix_len: of a suffix; with a marker at most.
        prefix_len: of a prefix of `fixed`.
        max_len: of prefix and suffix together of `contiguous`, at most.
        min_source_tokens: shorter documents are left out; not with a marker.
        max_prefixes_per_doc: of the chunks of `contiguous` so many, evenly spaced, the last among
            them; None takes all.
        marker: a text.

    Raises:
        DataError: a value that cannot be.
    """

    mode: str = "fixed"
    suffix_len: int = 128
    prefix_len: int = 384
    max_len: int = 2048
    min_source_tokens: int = 640
    max_prefixes_per_doc: int | None = None
    marker: str | None = None

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise DataError(f"data.chunking.mode={self.mode}: allowed {', '.join(MODES)}")
        if self.mode == "marker" and not self.marker:
            raise DataError(
                f"data.chunking.marker={'null' if self.marker is None else self.marker}:"
                " data.chunking.mode=marker needs the text that prefixes end with; allowed: a text"
            )
        if self.mode == "contiguous" and self.max_len < 2 * self.suffix_len:
            raise DataError(
                f"data.chunking.max_len={self.max_len}: allowed at least {2 * self.suffix_len}, two"
                f" chunks of data.chunking.suffix_len={self.suffix_len}"
            )

    def longest(self) -> tuple[str, int]:
        """The key that bounds a row, and its least number of tokens."""
        if self.mode == "contiguous":
            return f"max_len={self.max_len}", self.max_len // self.suffix_len * self.suffix_len
        if self.mode == "fixed":
            together = f"prefix_len={self.prefix_len} and suffix_len={self.suffix_len}"
            return together, self.prefix_len + self.suffix_len
        return f"suffix_len={self.suffix_len}", self.suffix_len + 1


@dataclass(frozen=True)
class PrefixSuffixEncoder:
    """Encodes documents as rows of a prefix and a suffix.

    Columns: `input_ids`, and `response`, 1 on the tokens of the suffix and 0 on those of the
    prefix. Origins: numbers of the documents.

    Args:
        length: tokens of a row.
        chunking: how documents are cut.
        end_suffix: whether EOS stands behind a suffix that its document ends with; it is then part
            of the suffix. `contiguous` has a last chunk that is shorter than the others only then.
            None: with a marker yes, else no.

    Raises:
        DataError: prefixes and suffixes longer than a row.
    """

    edition: ClassVar[int] = 2
    length: int
    chunking: Chunking = field(default_factory=Chunking)
    end_suffix: bool | None = None

    def __post_init__(self) -> None:
        key, needed = self.chunking.longest()
        if needed + self.ends > self.length:
            raise DataError(
                f"data.chunking: {key} need {needed + self.ends} tokens{' with EOS' * self.ends};"
                f" allowed at most model.length={self.length}"
            )

    @property
    def ends(self) -> bool:
        """`end_suffix`, decided."""
        return self.chunking.mode == "marker" if self.end_suffix is None else self.end_suffix

    def __call__(
        self,
        documents: Iterable[Document],
        tokenizer: PreTrainedTokenizerFast,
        special: SpecialIds,
        report: PackingReport,
    ) -> Iterator[TokenBatch]:
        """Rows of all documents, in batches."""
        iterator, encode = iter(documents), PartTokenizer(tokenizer)
        cut = MODES[self.chunking.mode]
        while batch := next_batch(iterator):
            first = report.documents
            report.documents += len(batch)
            texts = [document["text"] for document in batch]
            cuts = list(cut(self, texts, encode, report))
            if cuts:
                rows = [self._row(one, special) for one in cuts]
                yield token_batch(rows, special, report, [first + one.place for one in cuts])

    def _row(self, cut: Cut, special: SpecialIds) -> list[Part]:
        end = [special.eos] if cut.is_end else []
        return [Part(cut.prefix, 0), Part([*cut.suffix, *end], 1)]

    def _contiguous(
        self, texts: Sequence[str], encode: PartTokenizer, report: PackingReport
    ) -> Iterator[Cut]:
        size = self.chunking.suffix_len
        room = self.chunking.max_len // size - 1
        for place, ids in self._long_enough(encode(texts, report), 2 * size, report):
            chunks = -(-len(ids) // size) if self.ends else len(ids) // size
            report.dropped_tokens += max(0, len(ids) - chunks * size)
            for chunk in self._chosen(chunks - 1):
                first = max(0, chunk - room)
                suffix = ids[chunk * size : (chunk + 1) * size]
                is_end = self.ends and chunk * size + len(suffix) == len(ids)
                yield Cut(place, ids[first * size : chunk * size], suffix, is_end)

    def _chosen(self, count: int) -> list[int]:
        """Numbers of the chunks, of `count` possible ones from 1 on, that become suffixes."""
        wanted = min(self.chunking.max_prefixes_per_doc or count, count)
        return [(place + 1) * count // wanted for place in range(wanted)]

    def _fixed(
        self, texts: Sequence[str], encode: PartTokenizer, report: PackingReport
    ) -> Iterator[Cut]:
        middle = self.chunking.prefix_len
        end = middle + self.chunking.suffix_len
        for place, ids in self._long_enough(encode(texts, report), end, report):
            report.dropped_tokens += len(ids) - end
            yield Cut(place, ids[:middle], ids[middle:end], self.ends and len(ids) == end)

    def _long_enough(
        self, found: Sequence[Sequence[int]], least: int, report: PackingReport
    ) -> Iterator[tuple[int, Sequence[int]]]:
        for place, ids in enumerate(found):
            report.tokens += len(ids)
            report.empty_documents += not ids
            if len(ids) >= max(least, self.chunking.min_source_tokens):
                yield place, ids
            else:
                report.short_documents += 1
                report.dropped_tokens += len(ids)

    def _marker(
        self, texts: Sequence[str], encode: PartTokenizer, report: PackingReport
    ) -> Iterator[Cut]:
        marker, longest = self.chunking.marker or "", self.chunking.suffix_len
        parts = [part for text in texts for part in halves(text, marker)]
        found = encode(parts, report)
        for place, (prefix, rest) in enumerate(zip(found[::2], found[1::2], strict=True)):
            report.tokens += len(prefix) + len(rest)
            suffix = rest[:longest]
            is_end = self.ends and len(rest) <= longest
            if not prefix:
                report.unmarked_documents += 1
            elif not rest:
                report.short_documents += 1
            elif len(prefix) + len(suffix) + is_end > self.length:
                report.long_documents += 1
            else:
                report.dropped_tokens += len(rest) - len(suffix)
                yield Cut(place, prefix, suffix, is_end)
                continue
            report.dropped_tokens += len(prefix) + len(rest)


def halves(text: str, marker: str) -> tuple[str, str]:
    """A text up to the end of the first `marker`, and what is behind it; without one, the first
    is empty."""
    before, found, after = text.partition(marker)
    return (before + found, after) if found else ("", before)


MODES = {
    "contiguous": PrefixSuffixEncoder._contiguous,
    "fixed": PrefixSuffixEncoder._fixed,
    "marker": PrefixSuffixEncoder._marker,
}
