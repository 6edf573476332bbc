"""Anchors and blocks against loops over places."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.anchors import blocks_at, deal_anchors, eligible_anchors, places_in_document
from objectives.keyed import keyed_uniform

# A row of documents (prompt, answer), then padding.
documents = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=5)


def row_of(parts, padding=3):
    segment, response = [], []
    for number, (prompt, answer) in enumerate(parts):
        segment += [number] * (prompt + answer)
        response += [False] * prompt + [True] * answer
    segment += [-1] * padding
    response += [False] * padding
    return torch.tensor([segment]), torch.tensor([response])


def uniform(length, step=0):
    return keyed_uniform((1, step), torch.zeros(1, dtype=torch.int64), length)


@given(documents, st.integers(1, 12), st.integers(1, 6), st.integers(0, 5))
def test_anchors_are_dealt_in_turn(parts, count, per_document, step):
    segment, response = row_of(parts)
    eligible = eligible_anchors(response, segment)
    expected = [
        i for i in range(segment.shape[1] - 1)
        if response[0, i] and response[0, i + 1] and segment[0, i] == segment[0, i + 1]
    ]  # fmt: skip
    assert eligible[0].nonzero()[:, 0].tolist() == expected
    place, exists = deal_anchors(
        eligible, segment, uniform(segment.shape[1], step), count, per_document
    )
    chosen = place[0][exists[0]].tolist()
    assert chosen == sorted(set(chosen)) and set(chosen) <= set(expected)
    assert not exists[0, len(chosen) :].any() and (place[~exists] == 0).all()

    room = [min(per_document, max(0, answer - 1)) for _, answer in parts]
    assert len(chosen) == min(count, sum(room), segment.shape[1])
    dealt = [sum(segment[0, i].item() == number for i in chosen) for number in range(len(parts))]
    # Nobody has two more than somebody who could still have given one.
    for mine, most in zip(dealt, room, strict=True):
        assert mine <= most
        assert mine == most or max(dealt) - mine <= 1


def test_every_place_is_drawn_equally_often():
    segment, response = row_of([(2, 6)], padding=0)
    eligible = eligible_anchors(response, segment)
    counts = torch.zeros(8)
    for step in range(3000):
        place, exists = deal_anchors(eligible, segment, uniform(8, step), 2, 8)
        counts[place[exists]] += 1
    assert counts[:2].sum() == 0 and counts[7] == 0
    expected = 3000 * 2 / 5
    chi_square = ((counts[2:7] - expected) ** 2 / expected).sum()
    assert chi_square < 18.5  # 4 degrees of freedom, p = 0.001


def test_rows_do_not_see_each_other():
    segment, response = row_of([(2, 6), (1, 9)])
    eligible = eligible_anchors(response, segment)
    noise = keyed_uniform((3,), torch.arange(4), segment.shape[1])
    together = deal_anchors(*(x.expand(4, -1) for x in (eligible, segment)), noise, 5, 4)
    for row in range(4):
        alone = deal_anchors(eligible, segment, noise[row : row + 1], 5, 4)
        assert torch.equal(alone[0][0], together[0][row])


@given(documents, st.integers(1, 7))
def test_blocks_end_with_the_answer(parts, predicted):
    segment, response = row_of(parts)
    length = segment.shape[1]
    ids = torch.arange(100, 100 + length)[None]
    eligible = eligible_anchors(response, segment)
    place, exists = deal_anchors(eligible, segment, uniform(length), length, length)
    blocks = blocks_at(place, exists, ids, response, segment, predicted)
    for n in range(place.shape[1]):
        anchor = place[0, n].item()
        alive = bool(exists[0, n])
        for k in range(predicted):
            at = anchor + k + 1
            alive = alive and at < length and bool(response[0, at])
            alive = alive and segment[0, at].item() == segment[0, anchor].item()
            assert blocks.valid_BNK[0, n, k].item() == alive
            assert blocks.label_BNK[0, n, k].item() == (100 + at if alive else 0)
            assert blocks.teacher_BNK[0, n, k].item() == (at - 1 if alive else 0)


def test_positions_begin_anew_with_every_document():
    segment = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1]])
    assert places_in_document(segment).tolist() == [[0, 1, 2, 0, 1, 0, 0, 1]]
