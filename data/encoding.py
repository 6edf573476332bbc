"""From documents to tokens with the values of their words beside them."""

import re
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any

import numpy as np
from tokenizers import Encoding, Tokenizer
from transformers import PreTrainedTokenizerFast

from data.blocks import FEATURE_DTYPE, FEATURE_FILL, IDS, Block, PackingReport, TokenBatch
from data.errors import DataError
from data.source import Document
from data.tokenization import SpecialIds, plain_backend

_DOCUMENTS_PER_BATCH = 1000
_CHARACTERS_PER_BATCH = 10_000_000

_WORD = re.compile(r"\S+")


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
    while batch := next_batch(iterator):
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


def next_batch(documents: Iterator[Document]) -> list[Document]:
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
