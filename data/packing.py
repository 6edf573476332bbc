"""From documents to rows of equal length.

Legend: L tokens of a row; N rows. Columns are `input_ids` and, beside it, one per feature of the
source; whatever is cut, joined or padded is so in all columns alike.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from data.errors import DataError
from data.source import Document
from data.tokenization import SpecialIds, plain_backend

IDS = "input_ids"
LENGTH = "length"
FEATURE_DTYPE = np.int16
# What a special token or padding carries in a feature column.
FEATURE_FILL = 0

_DOCUMENTS_PER_BATCH = 1000
_CHARACTERS_PER_BATCH = 10_000_000

Block = dict[str, np.ndarray]


@dataclass(frozen=True)
class PackingOptions:
    """How documents become rows of `length` tokens.

    `wrap=True` joins all documents into one stream, each followed by EOS if `insert_eos`, and cuts
    it: into `BOS + (length - 2) tokens + EOS` if `insert_special`, else into `length` tokens. The
    last incomplete row is dropped. `wrap=False` gives each document its row, `BOS tokens EOS`
    padded (without BOS, and without EOS unless `insert_eos`, where `insert_special` is off);
    documents that are too long lose their end, but not the EOS.

    Raises:
        DataError: `length` leaves no room for a token.
    """

    length: int
    wrap: bool = True
    insert_special: bool = True
    insert_eos: bool = True

    def __post_init__(self) -> None:
        if self.body < 1:
            raise DataError(f"model.length={self.length}: leaves no room for text")

    @property
    def body(self) -> int:
        """Tokens of a row that are not its own BOS and EOS."""
        closing = self.insert_special or (self.insert_eos and not self.wrap)
        return self.length - self.insert_special - closing


@dataclass
class PackingReport:
    """What became of the documents: everything that is not in a row is counted here."""

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    rows: int = 0
    dropped_tokens: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0

    def __str__(self) -> str:
        return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in vars(self).items())


@dataclass(frozen=True)
class TokenBatch:
    """Several encoded documents: columns [sum(lengths)] one document after the other."""

    columns: Block
    lengths: np.ndarray


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialIds,
    options: PackingOptions,
    report: PackingReport,
) -> Iterator[Block]:
    """Rows of `options.length` tokens, in blocks: columns [N, L], and `length` [N] if not wrapped.

    `report` is filled as the blocks are consumed.

    Raises:
        DataError: a document without text, with the mask token in it, or with features that do
            not fit its words.
    """
    batches = encode_documents(documents, tokenizer, special, report)
    assemble = _wrapped_blocks if options.wrap else _padded_blocks
    for block in assemble(batches, special, options, report):
        report.rows += len(block[IDS])
        yield block


def encode_documents(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialIds,
    report: PackingReport,
) -> Iterator[TokenBatch]:
    """Token ids and per-token features of all documents that have any, without special tokens.

    A special token written out in a text is text: `[EOS]` in a document does not end it.
    """
    backend = plain_backend(tokenizer)
    backend.encode_special_tokens = True
    iterator = iter(documents)
    while batch := _next_batch(iterator):
        first = report.documents
        encoded = _encode_batch(batch, backend, first)
        report.documents += len(batch)
        report.tokens += int(encoded.lengths.sum())
        report.empty_documents += int((encoded.lengths == 0).sum())
        _require_no_mask(encoded, special, first)
        if tokenizer.unk_token_id is not None:
            report.unknown_tokens += int((encoded.columns[IDS] == tokenizer.unk_token_id).sum())
        kept = encoded.lengths[encoded.lengths > 0]
        yield TokenBatch(encoded.columns, kept)


def _next_batch(documents: Iterator[Document]) -> list[Document]:
    """The next documents, up to a number and a size: an encoding takes far more than its text."""
    batch: list[Document] = []
    size = 0
    for document in islice(documents, _DOCUMENTS_PER_BATCH):
        batch.append(document)
        text = document.get("text")
        size += len(text) if isinstance(text, str) else 0
        if size >= _CHARACTERS_PER_BATCH:
            break
    return batch


def _encode_batch(batch: list[Document], backend: Tokenizer, first: int) -> TokenBatch:
    """Encode documents number `first`, `first + 1`, ...; those of only white space get no token."""
    names = sorted(batch[0].get("features", {}))
    for number, document in enumerate(batch, start=first):
        if not isinstance(document.get("text"), str):
            raise DataError(f"document {number}: no text under the key 'text'")
        if sorted(document.get("features", {})) != names:
            raise DataError(f"document {number}: its features differ from {names or 'none'}")
    texts = [document["text"] if document["text"].strip() else "" for document in batch]
    # Character offsets, which only features need, cost time.
    encode = backend.encode_batch if names else backend.encode_batch_fast
    encodings = encode(texts, add_special_tokens=False)
    lengths = np.fromiter((len(encoding) for encoding in encodings), np.int64, len(encodings))
    columns = {IDS: _flatten([encoding.ids for encoding in encodings], np.uint32)}
    rows = list(zip(batch, encodings, strict=True))
    for name in names:
        values = [_spread(*row, name, first + place) for place, row in enumerate(rows)]
        columns[name] = _flatten(values, FEATURE_DTYPE)
    return TokenBatch(columns, lengths)


def _flatten(values: list[Any], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(value, dtype=dtype) for value in values])


def _spread(document: Document, encoding: Encoding, name: str, number: int) -> np.ndarray:
    """Give each token the value of the word in which it ends.

    A token may begin with the space before its word, so its last character decides.
    """
    values = np.asarray(document["features"][name])
    is_space = np.fromiter((c.isspace() for c in document["text"]), bool, len(document["text"]))
    starts_word = ~is_space & np.concatenate(([True], is_space))[:-1]
    if len(values) != starts_word.sum():
        words = int(starts_word.sum())
        raise DataError(f"document {number}: {len(values)} values of {name} for {words} words")
    bounds = np.iinfo(FEATURE_DTYPE)
    if len(values) and not (bounds.min <= values.min() and values.max() <= bounds.max):
        raise DataError(f"document {number}: {name} must lie in {bounds.min}..{bounds.max}")
    ends = np.fromiter((end for _, end in encoding.offsets), np.int64, len(encoding))
    word_of_character = np.maximum(np.cumsum(starts_word) - 1, 0)
    return values[word_of_character[ends - 1]]


def _require_no_mask(encoded: TokenBatch, special: SpecialIds, first: int) -> None:
    """The mask token in clean text would read as noise to every objective."""
    places = np.flatnonzero(encoded.columns[IDS] == special.mask)
    if len(places):
        number = first + int(np.searchsorted(np.cumsum(encoded.lengths), places[0], side="right"))
        raise DataError(f"document {number}: its text contains the mask token; remove it")


def _fill_value(name: str, token_id: int) -> int:
    return token_id if name == IDS else FEATURE_FILL


def _wrapped_blocks(
    batches: Iterable[TokenBatch],
    special: SpecialIds,
    options: PackingOptions,
    report: PackingReport,
) -> Iterator[Block]:
    """Cut the one stream of all documents; what is left of a batch goes before the next one."""
    carry: Block = {}
    for batch in batches:
        stream = {}
        for name, column in batch.columns.items():
            if options.insert_eos:
                column = np.insert(column, np.cumsum(batch.lengths), _fill_value(name, special.eos))
            stream[name] = np.concatenate([carry[name], column]) if carry else column
        used = len(stream[IDS]) // options.body * options.body
        carry = {name: column[used:] for name, column in stream.items()}
        body = {name: column[:used].reshape(-1, options.body) for name, column in stream.items()}
        if used:
            yield _framed(body, special) if options.insert_special else body
    report.dropped_tokens += len(carry[IDS]) if carry else 0


def _framed(body: Block, special: SpecialIds) -> Block:
    """BOS before and EOS behind every row."""
    return {
        name: np.pad(
            column,
            ((0, 0), (1, 1)),
            constant_values=(_fill_value(name, special.bos), _fill_value(name, special.eos)),
        )
        for name, column in body.items()
    }


def _padded_blocks(
    batches: Iterable[TokenBatch],
    special: SpecialIds,
    options: PackingOptions,
    report: PackingReport,
) -> Iterator[Block]:
    """One row per document: [BOS] tokens [EOS] padding."""
    opening = int(options.insert_special)
    closing = options.length - options.body - opening
    for batch in batches:
        if not len(batch.lengths):
            continue
        kept = np.minimum(batch.lengths, options.body)
        report.truncated_documents += int((batch.lengths > kept).sum())
        report.truncated_tokens += int((batch.lengths - kept).sum())
        starts = np.cumsum(batch.lengths) - batch.lengths
        place = np.arange(options.length) - opening
        is_text = (place >= 0) & (place < kept[:, None])
        source = (starts[:, None] + place)[is_text]
        block: Block = {}
        for name, column in batch.columns.items():
            rows = np.full(is_text.shape, _fill_value(name, special.pad), column.dtype)
            rows[is_text] = column[source]
            rows[:, :opening] = _fill_value(name, special.bos)
            if closing:
                rows[np.arange(len(rows)), opening + kept] = _fill_value(name, special.eos)
            block[name] = rows
        yield block | {LENGTH: opening + kept + closing}
