"""Whole documents joined into rows: nothing lost, nothing cut that fits, segments told apart."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.blocks import IDS, LENGTH, RESPONSE, SEGMENT, PackingReport, TokenBatch
from data.errors import DataError
from data.packing import PackingOptions, pack
from data.tokenization import load_tokenizer, special_ids

TOKENIZER = load_tokenizer("word", documents=["a b c d e f g h"])
SPECIAL = special_ids(TOKENIZER)
LENGTH_OF_ROW = 12


def options(**changes):
    return PackingOptions(
        **{"length": LENGTH_OF_ROW, "wrap": False, "insert_special": False, "insert_eos": False,
           "join": True, **changes}
    )  # fmt: skip


def rows_of(conversations):
    """Pack (prompt tokens, answer tokens) pairs; ids are running numbers, so each occurs once."""
    report = PackingReport()
    lengths = np.array([prompt + answer for prompt, answer in conversations])
    flags = [np.repeat(np.array([0, 1], np.int8), pair) for pair in conversations]
    ids = np.arange(1, lengths.sum() + 1).astype(np.uint32)
    batch = TokenBatch({IDS: ids, RESPONSE: np.concatenate(flags)}, lengths)
    blocks = list(pack([], TOKENIZER, SPECIAL, options(), report, lambda *_: iter([batch])))
    joined = {n: np.concatenate([b[n] for b in blocks]) for n in blocks[0]} if blocks else {}
    return joined, report, ids, lengths


@given(
    st.lists(st.tuples(st.integers(1, 15), st.integers(1, 15)), min_size=1, max_size=30),
)
def test_every_answered_document_is_in_one_row_once(conversations):
    joined, report, ids, lengths = rows_of(conversations)
    expected, lost, cut = [], 0, 0
    for (prompt, answer), part in zip(
        conversations, np.split(ids, np.cumsum(lengths)[:-1]), strict=True
    ):
        if min(answer, LENGTH_OF_ROW - prompt) < 2:
            lost += 1
            continue
        cut += len(part) > LENGTH_OF_ROW
        expected.append(tuple(part[:LENGTH_OF_ROW]))
    found = []
    for row in range(len(joined.get(IDS, []))):
        segments = joined[SEGMENT][row]
        size = joined[LENGTH][row]
        assert (segments[:size] >= 0).all() and (segments[size:] == -1).all()
        assert (joined[RESPONSE][row, size:] == -1).all()
        numbers = np.unique(segments[:size])
        assert (numbers == np.arange(len(numbers))).all()
        found += [tuple(joined[IDS][row][segments == number]) for number in numbers]
    assert sorted(found) == sorted(expected)
    assert report.unanswered_documents == lost and report.truncated_documents == cut
    kept = sum(map(len, found))
    assert kept + report.dropped_tokens + report.truncated_tokens == len(ids)
    assert report.rows == len(joined.get(IDS, []))


def test_short_documents_fill_the_room_that_long_ones_leave():
    joined, _, _, _ = rows_of([(2, 2), (4, 5), (1, 2), (5, 3)])
    # 9 + 3 and 8 + 4 fill two rows of 12.
    assert joined[LENGTH].tolist() == [12, 12]


def test_a_row_has_no_more_documents_than_segments_have_numbers():
    report = PackingReport()
    batch = TokenBatch(
        {IDS: np.ones(600, np.uint32), RESPONSE: np.ones(600, np.int8)}, np.full(300, 2)
    )
    blocks = list(
        pack([], TOKENIZER, SPECIAL, options(length=600), report, lambda *_: iter([batch]))
    )
    assert [len(np.unique(row[row >= 0])) for row in blocks[0][SEGMENT]] == [128, 128, 44]


def test_one_document_to_a_row():
    report = PackingReport()
    batch = TokenBatch(
        {IDS: np.ones(9, np.uint32), RESPONSE: np.ones(9, np.int8)}, np.array([2, 4, 3])
    )
    blocks = list(
        pack([], TOKENIZER, SPECIAL, options(per_row=1), report, lambda *_: iter([batch]))
    )
    assert blocks[0][LENGTH].tolist() == [4, 3, 2]


def test_joining_leaves_documents_as_they_are():
    with pytest.raises(DataError, match=r"data\.join=true.*data\.wrap=false"):
        options(wrap=True)
    assert "join" not in PackingOptions(length=4).identity()
    assert options().identity()["join"]
