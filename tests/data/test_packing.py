"""Packing against a slow reference, token by token."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, pre_tokenizers

from data import encoding
from data.blocks import FEATURE_FILL, IDS, LENGTH, PackingReport
from data.encoding import _encode_batch
from data.errors import DataError
from data.packing import PackingOptions, pack
from data.tokenization import load_tokenizer, special_ids

WORDS = "abcdefgh"
TOKENIZER = load_tokenizer("word", documents=[" ".join(WORDS)])
SPECIAL = special_ids(TOKENIZER)
BOS, EOS, PAD = SPECIAL.bos, SPECIAL.eos, SPECIAL.pad

documents_of_words = st.lists(st.lists(st.sampled_from(WORDS), max_size=9), max_size=12)
flags = st.booleans()


def run(words_of_documents, options, features=False):
    documents = [
        {"text": " ".join(words)}
        | ({"features": {"rank": [WORDS.index(w) for w in words]}} if features else {})
        for words in words_of_documents
    ]
    report = PackingReport()
    blocks = list(pack(documents, TOKENIZER, SPECIAL, options, report))
    return blocks, report


def ids_of(words):
    return TOKENIZER.convert_tokens_to_ids(list(words))


def rows_of(blocks, name=IDS):
    return [list(map(int, row)) for block in blocks for row in block[name]]


def wrapped_reference(words_of_documents, length, insert_special, insert_eos):
    stream = []
    for words in words_of_documents:
        stream += ids_of(words) + [EOS] * (insert_eos and bool(words))
    body = length - 2 * insert_special
    chunks = [stream[i : i + body] for i in range(0, len(stream) - body + 1, body)]
    rows = [[BOS] * insert_special + chunk + [EOS] * insert_special for chunk in chunks]
    return rows, len(stream) - body * len(chunks)


@given(documents_of_words, st.integers(3, 8), flags, flags, st.integers(1, 4))
def test_wrapped_equals_reference(documents, length, insert_special, insert_eos, batch):
    options = PackingOptions(length, True, insert_special, insert_eos)
    original = encoding._DOCUMENTS_PER_BATCH
    encoding._DOCUMENTS_PER_BATCH = batch
    try:
        blocks, report = run(documents, options)
    finally:
        encoding._DOCUMENTS_PER_BATCH = original
    rows, dropped = wrapped_reference(documents, length, insert_special, insert_eos)
    assert rows_of(blocks) == rows
    assert report.rows == len(rows) and report.dropped_tokens == dropped
    assert report.documents == len(documents)
    assert report.empty_documents == sum(not words for words in documents)


@given(documents_of_words, st.integers(3, 8), flags, flags)
def test_padded_equals_reference(documents, length, insert_special, insert_eos):
    blocks, report = run(documents, PackingOptions(length, False, insert_special, insert_eos))
    room = length - insert_special - (insert_special or insert_eos)
    expected = []
    for words in filter(None, documents):
        row = [BOS] * insert_special + ids_of(words)[:room] + [EOS] * (insert_special or insert_eos)
        expected.append(row)
    assert [row[:n] for row, n in zip(rows_of(blocks), lengths_of(blocks), strict=True)] == expected
    pairs = list(zip(rows_of(blocks), lengths_of(blocks), strict=True))
    assert all(set(row[n:]) <= {PAD} for row, n in pairs)
    assert report.truncated_documents == sum(len(words) > room for words in documents)
    assert report.truncated_tokens == sum(max(0, len(words) - room) for words in documents)
    assert report.tokens == sum(map(len, documents))


def lengths_of(blocks):
    return [int(n) for block in blocks for n in block[LENGTH]]


@given(documents_of_words, st.integers(3, 8), flags, flags, flags)
def test_features_travel_with_their_tokens(documents, length, wrap, insert_special, insert_eos):
    blocks, _ = run(documents, PackingOptions(length, wrap, insert_special, insert_eos), True)
    rank_of = {ids_of([word])[0]: rank for rank, word in enumerate(WORDS)}
    for ids, ranks in zip(rows_of(blocks), rows_of(blocks, "rank"), strict=True):
        assert ranks == [rank_of.get(token, FEATURE_FILL) for token in ids]


def test_every_token_of_a_word_has_its_value():
    tokenizer = load_tokenizer("bpe", documents=["x"], vocab_size=260)
    document = {"text": " né  ab\nc", "features": {"depth": [3, 2, 7]}}
    options = PackingOptions(10, True, False, False)
    report = PackingReport()
    (block,) = pack([document], tokenizer, special_ids(tokenizer), options, report)
    # One token per byte: space n é(2) space space a b newline c.
    assert block["depth"].tolist() == [[-1, 3, 3, 3, -1, -1, 2, 2, -1, 7]]
    assert block["depth"].dtype == np.int8
    assert (report.tokens_of_words, report.tokens_without_word) == (6, 4)
    assert (report.tokens_of_several_words, report.words_without_token) == (0, 0)


def test_words_may_be_given_by_their_places():
    document = {
        "text": "don't go. ok",
        "spans": [(0, 2), (2, 5), (6, 8), (8, 9)],
        "features": {"depth": [4, 5, 6, 7]},
    }
    report = PackingReport()
    backend = Tokenizer(models.WordLevel({"don": 0, "'t": 1, "go.": 2, "ok": 3}, unk_token="ok"))
    split = pre_tokenizers.Split(Regex(r"don|'t|go\.|ok"), "isolated")
    space = pre_tokenizers.Split(" ", "removed")
    backend.pre_tokenizer = pre_tokenizers.Sequence([space, split])
    encoded = _encode_batch([document], backend, 0, report)
    # "don" is do + n't, "go." is go + the stop; no word was found in "ok".
    assert encoded.columns[IDS].tolist() == [0, 1, 2, 3]
    assert encoded.columns["depth"].tolist() == [4, 5, 6, FEATURE_FILL]
    assert (report.tokens_of_words, report.tokens_without_word) == (3, 1)
    assert (report.tokens_of_several_words, report.words_without_token) == (2, 1)


@pytest.mark.parametrize("spans", [[(0, 0)], [(1, 3), (0, 2)], [(0, 99)], [(-1, 2)]])
def test_bad_spans_are_named(spans):
    document = {"text": "abc", "spans": spans, "features": {"depth": [1] * len(spans)}}
    with pytest.raises(DataError, match="document 0: spans must be pairs"):
        list(pack([document], TOKENIZER, SPECIAL, PackingOptions(4), PackingReport()))


def test_special_tokens_in_text_are_text():
    tokenizer = load_tokenizer("bpe", documents=["[EOS] [MASK]"], vocab_size=270)
    special = special_ids(tokenizer)
    options = PackingOptions(4, True, False, False)
    blocks = list(pack([{"text": "[MASK] [EOS]"}], tokenizer, special, options, PackingReport()))
    found = {token for row in rows_of(blocks) for token in row}
    assert not found & {special.bos, special.eos, special.mask, special.pad}


def test_unknown_words_are_counted():
    _, report = run([["a", "zebra", "b"]], PackingOptions(3, True, False, False))
    assert report.unknown_tokens == 1


@pytest.mark.parametrize(
    ("document", "message"),
    [
        ({"body": "a"}, "document 1: no text under the key 'text'"),
        ({"text": "a [MASK]"}, "document 1: its text contains the mask token"),
        ({"text": "a", "features": {"d": [1]}}, "document 1: its features differ from none"),
    ],
)
def test_bad_documents_are_numbered(document, message):
    options = PackingOptions(4)
    with pytest.raises(DataError, match=message):
        list(pack([{"text": "b"}, document], TOKENIZER, SPECIAL, options, PackingReport()))


def test_bad_features_are_named():
    def attempt(values):
        document = {"text": "a b", "features": {"depth": values}}
        list(pack([document], TOKENIZER, SPECIAL, PackingOptions(4), PackingReport()))

    with pytest.raises(DataError, match="document 0: 3 values of depth for 2 words"):
        attempt([1, 2, 3])
    with pytest.raises(DataError, match=r"document 0: depth must lie in -128\.\.127"):
        attempt([1, 70_000])


def test_row_too_short_for_text():
    with pytest.raises(DataError, match=r"model\.length=2: leaves no room for text"):
        PackingOptions(2)
    assert PackingOptions(1, insert_special=False).body == 1
