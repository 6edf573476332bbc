"""From documents to rows of equal length.

Legend: L tokens of a row; N rows. Columns are `input_ids` and, beside it, one per feature of the
source; whatever is cut, joined or padded is so in all columns alike.
"""

import re
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
FEATURE_DTYPE = np.int8
# What a token without a word carries in a feature column: special tokens, padding, white space,
# and text that no word was found in.
FEATURE_FILL = -1

_ALWAYS = ("documents", "tokens", "unknown_tokens", "rows", "dropped_tokens")
_DOCUMENTS_PER_BATCH = 1000
_CHARACTERS_PER_BATCH = 10_000_000

_WORD = re.compile(r"\S+")

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
    """What became of the documents: everything that is not in a row is counted here.

    With features, tokens = tokens_of_words + tokens_without_word: each has the value of a word or
    `FEATURE_FILL`. A token that reaches into several words has the value of the one that it shares
    most characters with; a word without token is one whose characters the tokenizer dropped or
    gave to other words' tokens.
    """

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    rows: int = 0
    dropped_tokens: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    tokens_of_words: int = 0
    tokens_without_word: int = 0
    tokens_of_several_words: int = 0
    words_without_token: int = 0

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if value or name in _ALWAYS}
        return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in shown.items())


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
        encoded = _encode_batch(batch, backend, first, report)
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


def _encode_batch(
    batch: list[Document], backend: Tokenizer, first: int, report: PackingReport
) -> TokenBatch:
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
    if names:
        rows = zip(batch, encodings, strict=True)
        spread = [_spread(*row, names, first + place, report) for place, row in enumerate(rows)]
        columns |= {n: _flatten([row[n] for row in spread], FEATURE_DTYPE) for n in names}
    return TokenBatch(columns, lengths)


def _flatten(values: list[Any], dtype: type) -> np.ndarray:
    return np.concatenate([np.asarray(value, dtype=dtype) for value in values])


def _spread(
    document: Document, encoding: Encoding, names: list[str], number: int, report: PackingReport
) -> Block:
    """Give each token the values of its word, by places in the text.

    A token may begin with the space before its word and a word may have several tokens; where a
    token reaches into several words, the one that it shares most characters with decides.
    """
    spans = _word_spans(document, number)
    offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
    word = _word_of_tokens(len(document["text"]), spans, offsets, report)
    covered = word >= 0
    report.tokens_of_words += int(covered.sum())
    report.tokens_without_word += int((~covered).sum())
    report.words_without_token += len(spans) - len(np.unique(word[covered]))
    columns = {}
    for name in names:
        values = _word_values(document, name, len(spans), number)
        columns[name] = np.append(values, FEATURE_FILL)[word]  # -1 is the last place
    return columns


def _word_spans(document: Document, number: int) -> np.ndarray:
    """[W, 2] begin and end of every word in the text: the given ones, or between white space."""
    text = document["text"]
    if "spans" not in document:
        return np.array([match.span() for match in _WORD.finditer(text)]).reshape(-1, 2)
    spans = np.array(document["spans"], dtype=np.int64).reshape(-1, 2)
    inside = not len(spans) or (spans[0, 0] >= 0 and spans[-1, 1] <= len(text))
    if not inside or (spans[:, 0] >= spans[:, 1]).any() or (spans[1:, 0] < spans[:-1, 1]).any():
        raise DataError(
            f"document {number}: spans must be pairs (start, end) of growing places in its text of"
            f" {len(text)} characters"
        )
    return spans


def _word_values(document: Document, name: str, words: int, number: int) -> np.ndarray:
    values = np.asarray(document["features"][name])
    if len(values) != words:
        raise DataError(f"document {number}: {len(values)} values of {name} for {words} words")
    bounds = np.iinfo(FEATURE_DTYPE)
    if words and not (bounds.min <= values.min() and values.max() <= bounds.max):
        raise DataError(f"document {number}: {name} must lie in {bounds.min}..{bounds.max}")
    return values


def _word_of_tokens(
    characters: int, spans: np.ndarray, offsets: np.ndarray, report: PackingReport
) -> np.ndarray:
    """[T] number of every token's word, -1 for none."""
    word_at = np.full(characters, -1, dtype=np.int64)
    for word, (start, end) in enumerate(spans):
        word_at[start:end] = word
    # Words stand in order, so running extremes tell the first word from a place on, and the last
    # one before a place.
    from_here = np.where(word_at < 0, len(spans), word_at)[::-1]
    first_from = np.append(np.minimum.accumulate(from_here)[::-1], len(spans))
    last_before = np.append(-1, np.maximum.accumulate(word_at))
    first, last = first_from[offsets[:, 0]], last_before[offsets[:, 1]]
    word_of_token = np.where(first <= last, last, -1)
    for token in np.flatnonzero(first < last):
        here = word_at[slice(*offsets[token])]
        word_of_token[token] = np.bincount(here[here >= 0]).argmax()
        report.tokens_of_several_words += 1
    return word_of_token


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
