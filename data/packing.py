"""From documents to rows of equal length.

Legend: L tokens of a row; N rows. Columns are `input_ids` and, beside it, one per feature of the
source; whatever is cut, joined or padded is so in all columns alike.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerFast

from data.blocks import (
    FEATURE_DTYPE,
    FEATURE_FILL,
    IDS,
    LENGTH,
    ORIGIN,
    RESPONSE,
    SEGMENT,
    Block,
    PackingReport,
    TokenBatch,
)
from data.encoding import encode_documents
from data.errors import DataError
from data.source import Document
from data.tokenization import SpecialIds


@dataclass(frozen=True)
class PackingOptions:
    """How documents become rows of `length` tokens.

    `wrap=True` joins all documents into one stream, each followed by EOS if `insert_eos`, and cuts
    it: into `BOS + (length - 2) tokens + EOS` if `insert_special`, else into `length` tokens. The
    last incomplete row is dropped. `wrap=False` gives each document its row, `BOS tokens EOS`
    padded (without BOS, and without EOS unless `insert_eos`, where `insert_special` is off);
    documents that are too long lose their end, but not the EOS. `join=True` puts several whole
    documents into a row, at most `per_row` (`SEGMENT` tells them apart), each followed by EOS if
    `insert_eos`; those that are too long lose their end, and the EOS with it.

    `align=A` makes every document of a joined row begin at a multiple of A, so that no block of A
    tokens holds two: what is left of the last block is filled with EOS, which have the document's
    number in `SEGMENT` and `FEATURE_FILL` in `RESPONSE`. There is then always a `RESPONSE`;
    documents without prompts have 1 on all their tokens.

    Raises:
        DataError: `length` leaves no room for a token, or options that exclude each other.
    """

    length: int
    wrap: bool = True
    insert_special: bool = True
    insert_eos: bool = True
    join: bool = False
    per_row: int | None = None
    align: int = 1

    def __post_init__(self) -> None:
        if self.body < 1:
            raise DataError(f"model.length={self.length}: leaves no room for text")
        if self.join and (self.wrap or self.insert_special):
            raise DataError(
                "data.join=true: documents stay whole; allowed: data.wrap=false and"
                " data.insert_train_special, insert_valid_special false"
            )
        if self.align != 1 and not self.join:
            raise DataError(f"data.align={self.align}: allowed 1, or more with data.join=true")
        if self.align < 1 or self.length % self.align:
            raise DataError(
                f"data.align={self.align}: allowed an integer >= 1 that divides"
                f" model.length={self.length}"
            )

    def identity(self) -> dict[str, int | bool | None]:
        """What a cache is known by; without what is off, as in caches older than the option."""
        off = {"join", "per_row"} if not self.join else set()
        off |= {"align"} if self.align == 1 else set()
        return {name: value for name, value in vars(self).items() if name not in off}

    @property
    def body(self) -> int:
        """Tokens of a row that are not its own BOS and EOS."""
        closing = self.insert_special or (self.insert_eos and not self.wrap)
        return self.length - self.insert_special - closing


_SEGMENTS = int(np.iinfo(FEATURE_DTYPE).max) + 1  # documents of a row that have numbers

# One whose rows become others while its options stay has the class attribute `edition`, 1 until
# then, which token caches are known by.
Encoder = Callable[
    [Iterable[Document], PreTrainedTokenizerFast, SpecialIds, PackingReport], Iterator[TokenBatch]
]


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialIds,
    options: PackingOptions,
    report: PackingReport,
    encode: Encoder = encode_documents,
) -> Iterator[Block]:
    """Rows of `options.length` tokens, in blocks: columns [N, L], and `length` [N] if not wrapped.

    `report` is filled as the blocks are consumed. `encode` turns documents into tokens.

    Raises:
        DataError: a document without text, with the mask token in it, or with features that do
            not fit its words.
    """
    batches = encode(documents, tokenizer, special, report)
    assemble = _wrapped_blocks if options.wrap else _padded_blocks
    if options.join:
        assemble = _joined_blocks
    for block in assemble(batches, special, options, report):
        report.rows += len(block[IDS])
        yield block


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


def _joined_blocks(
    batches: Iterable[TokenBatch],
    special: SpecialIds,
    options: PackingOptions,
    report: PackingReport,
) -> Iterator[Block]:
    """Several whole documents to a row, the longest first into the first row with room for it.

    `segment` numbers the documents of a row, and is `FEATURE_FILL` on padding. A conversation of
    whose answer fewer than two tokens are left in the row is not kept.
    """
    for batch in batches:
        if options.insert_eos:
            batch = _ended(batch, special)
        kept = _kept_sizes(batch, options, report)
        sizes = -(-kept // options.align) * options.align
        rows = _first_fit(sizes, options.length, options.per_row)
        if not rows:
            continue
        report.fill_tokens += int((sizes - kept).sum())
        columns = batch.columns
        if options.align > 1 and RESPONSE not in columns:
            columns = columns | {RESPONSE: np.ones(len(columns[IDS]), FEATURE_DTYPE)}
        block = {
            name: np.full((len(rows), options.length), _fill_value(name, special.pad), column.dtype)
            for name, column in columns.items()
        }
        block[SEGMENT] = np.full((len(rows), options.length), FEATURE_FILL, FEATURE_DTYPE)
        starts = np.cumsum(batch.lengths) - batch.lengths
        for row, documents in enumerate(rows):
            place = 0
            for number, document in enumerate(documents):
                start, count, end = starts[document], kept[document], place + sizes[document]
                for name, column in columns.items():
                    block[name][row, place : place + count] = column[start : start + count]
                # Beside EOS, the columns have on it what they have on padding.
                block[IDS][row, place + count : end] = special.eos
                block[SEGMENT][row, place:end] = number
                place = end
        if batch.origins is not None:
            block[ORIGIN] = _origins(batch.origins, rows, _most(options.per_row))
        yield block | {LENGTH: (block[SEGMENT] != FEATURE_FILL).sum(-1)}


def _origins(origins: np.ndarray, rows: list[list[int]], places: int) -> np.ndarray:
    """[N, places] of the documents of every row."""
    found = np.full((len(rows), places), FEATURE_FILL, np.int32)
    for row, documents in enumerate(rows):
        found[row, : len(documents)] = origins[documents]
    return found


def _most(per_row: int | None) -> int:
    """How many documents a row can have."""
    return min(per_row or _SEGMENTS, _SEGMENTS)


def _ended(batch: TokenBatch, special: SpecialIds) -> TokenBatch:
    """Each document with EOS behind it."""
    if RESPONSE in batch.columns:
        raise DataError(
            "data.join=true: conversations end as they were answered; allowed:"
            " data.insert_train_eos, insert_valid_eos false"
        )
    ends = np.cumsum(batch.lengths)
    columns = {
        name: np.insert(column, ends, _fill_value(name, special.eos))
        for name, column in batch.columns.items()
    }
    return TokenBatch(columns, batch.lengths + 1, batch.origins)


def _kept_sizes(batch: TokenBatch, options: PackingOptions, report: PackingReport) -> np.ndarray:
    """How many tokens of every document go into its row; 0 of one that is left out."""
    kept = np.minimum(batch.lengths, options.length)
    if RESPONSE in batch.columns:
        starts = np.cumsum(batch.lengths) - batch.lengths
        answer = np.append(0, np.cumsum(batch.columns[RESPONSE] == 1))
        # Two tokens of it: one to begin from and one to predict.
        answered = answer[starts + kept] > answer[starts] + 1
        report.unanswered_documents += int((~answered).sum())
        report.dropped_tokens += int(batch.lengths[~answered].sum())
        kept = np.where(answered, kept, 0)
    cut = (kept > 0) & (batch.lengths > kept)
    report.truncated_documents += int(cut.sum())
    report.truncated_tokens += int((batch.lengths - kept)[cut].sum())
    return kept


def _first_fit(sizes: np.ndarray, room: int, per_row: int | None) -> list[list[int]]:
    """Documents of every row: in order of falling size, each to the first row that can take it."""
    limit = _most(per_row)
    rows: list[list[int]] = []
    left = np.empty(len(sizes), dtype=np.int64)
    for document in np.argsort(-sizes, kind="stable"):
        if not sizes[document]:
            break
        row = int(np.argmax(np.append(left[: len(rows)] >= sizes[document], True)))
        if row == len(rows):
            rows.append([])
            left[row] = room
        rows[row].append(int(document))
        left[row] -= sizes[document]
        if len(rows[row]) == limit:
            left[row] = 0
    return rows


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
