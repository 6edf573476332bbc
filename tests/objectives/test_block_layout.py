"""Blocks of packed documents: layouts worked out by hand, brute force, and what is refused."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.block_layout import block_layout
from tests.blocks import SIZE, rows

# Two documents of 3 + 4 and 4 + 2 tokens, filled up to 8 each, and four places of padding.
IDS = [[11, 12, 13, 21, 22, 23, 24, 2, 31, 32, 33, 34, 41, 42, 2, 2, 0, 0, 0, 0]]
SEGMENT = [[0] * 8 + [1] * 8 + [-1] * 4]
RESPONSE = [[0, 0, 0, 1, 1, 1, 1, -1, 0, 0, 0, 0, 1, 1, -1, -1, -1, -1, -1, -1]]


def by_hand(**options):
    columns = (torch.tensor(column) for column in (IDS, SEGMENT, RESPONSE))
    return block_layout(*columns, SIZE, **options)


def test_two_documents_by_hand():
    layout = by_hand()
    assert layout.position_BL[0, :16].tolist() == [*range(8), *range(8)]
    assert layout.start_BN[0, :4].tolist() == [0, 0, 8, 8]
    assert layout.stop_BN.tolist() == [[0, 4, 8, 12, 16]]
    # The answer begins inside of block 0; block 2 is all prompt, block 4 padding.
    assert layout.block_BM.tolist() == [[0, 1, 3]] and layout.exists_BM.all()
    assert layout.target_BMS.tolist() == [[[11, 12, 13, 21], [22, 23, 24, 2], [41, 42, 2, 2]]]
    assert layout.predict_BMS.int().tolist() == [[[0, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]]
    assert layout.scored_BMS.int().tolist() == [[[0, 0, 0, 1], [1, 1, 1, 0], [1, 1, 0, 0]]]
    assert torch.equal(layout.of_blocks(torch.tensor(IDS)), layout.target_BMS)


def test_only_chosen_blocks_that_are_written():
    layout = by_hand(chosen_BN=torch.tensor([[False, True, True, False, True]]))
    assert layout.block_BM.tolist() == [[1]] and layout.exists_BM.tolist() == [[True]]
    none = by_hand(chosen_BN=torch.zeros(1, 5, dtype=torch.bool))
    assert none.exists_BM.tolist() == [[False]] and not none.predict_BMS.any()


@pytest.mark.parametrize(("bucket", "blocks"), [(1, 3), (2, 4), (4, 4), (5, 5), (8, 5), (100, 5)])
def test_the_number_of_blocks_is_rounded_up_to_a_bucket(bucket, blocks):
    layout = by_hand(bucket=bucket)
    assert layout.block_BM.shape == (1, blocks)
    assert layout.exists_BM.tolist() == [[True] * 3 + [False] * (blocks - 3)]
    assert layout.block_BM[0, 3:].tolist() == [0] * (blocks - 3)
    assert not layout.predict_BMS[0, 3:].any() and not layout.scored_BMS[0, 3:].any()


def test_which_blocks_are_written_in_their_row():
    """Block 0 among them, whatever number the padding behind the others has."""
    for bucket in (1, 8):
        assert by_hand(bucket=bucket).written_BN.tolist() == [[True, True, False, True, False]]


def test_text_without_a_prompt_begins_in_its_first_block():
    ids, segment, response = rows([[(0, 5), (0, 8)]], 20)
    layout = block_layout(ids, segment, response, SIZE)
    assert layout.block_BM.tolist() == [[0, 1, 2, 3]]
    assert layout.scored_BMS.sum() == 13 and layout.predict_BMS.sum() == 16
    assert layout.start_BN[0, :4].tolist() == [0, 0, 8, 8]


def test_rows_with_unlike_numbers_of_blocks():
    layout = block_layout(*rows([[(0, 16)], [(7, 3)], [(4, 4), (0, 4)]], 16), SIZE)
    assert layout.block_BM.tolist() == [[0, 1, 2, 3], [1, 2, 0, 0], [1, 2, 0, 0]]
    assert layout.exists_BM.sum(-1).tolist() == [4, 2, 2]


def test_blocks_of_one_token_are_the_places_of_the_answers():
    layout = by_hand()
    single = block_layout(*(torch.tensor(c) for c in (IDS, SEGMENT, RESPONSE)), 1)
    assert single.block_BM.tolist() == [[3, 4, 5, 6, 12, 13]]
    assert torch.equal(single.position_BL, layout.position_BL)
    assert torch.equal(single.predict_BMS, single.scored_BMS)


documents = st.lists(
    st.tuples(st.integers(0, 9), st.integers(1, 9)), min_size=1, max_size=3
).filter(lambda parts: sum(-(-(p + a) // SIZE) * SIZE for p, a in parts) <= 40)


@given(st.lists(documents, min_size=1, max_size=3), st.integers(1, 9))
def test_equals_walking_over_the_places(table, bucket):
    ids, segment, response = rows(table, 40)
    layout = block_layout(ids, segment, response, SIZE, bucket)
    for b in range(len(table)):
        found = layout.block_BM[b][layout.exists_BM[b]].tolist()
        written = []
        for block in range(10):
            places = range(block * SIZE, block * SIZE + SIZE)
            if any(segment[b, p] >= 0 and response[b, p] == 1 for p in places):
                written.append(block)
                first = next(p for p in range(40) if segment[b, p] == segment[b, places[0]])
                assert layout.start_BN[b, block] == first
                assert layout.position_BL[b, places[0]] == places[0] - first
        assert found == written
        assert layout.written_BN[b].nonzero()[:, 0].tolist() == written
    assert layout.scored_BMS.sum() == (response == 1).sum()
    fill = (response == -1) & (segment >= 0)
    assert layout.predict_BMS.sum() == layout.scored_BMS.sum() + fill.sum()


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ([[0] * 3 + [1] * 5], "block_size=4: a document begins or ends inside of a block"),
        ([[0] * 6 + [-1] * 2], r"begins or ends inside of a block; allowed: data\.align=4"),
        ([[0] * 7], r"block_size=4: allowed are divisors of model\.length=7"),
    ],
)
def test_rows_that_do_not_consist_of_blocks(segment, message):
    segment = torch.tensor(segment)
    with pytest.raises(ValueError, match=message):
        block_layout(torch.ones_like(segment), segment, torch.ones_like(segment), SIZE)
