"""What is logged of a scorer: floors, ranks, spreads, and their sums, by hand."""

import math

import pytest
import torch

from objectives.contrastive import nce_loss, score_penalty
from objectives.nce_statistics import (
    SUMS,
    block_sums,
    bound_floor,
    duplicate_floor,
    largest_score,
    log_slots,
    means_of,
    positive_rank,
    score_spread,
)

LN2 = math.log(2)


def slots(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def every(x_MC):
    return torch.ones(x_MC.shape, dtype=torch.bool)


def test_sums_and_means_by_hand():
    """Two blocks of three slots, the second of copies alone: it counts nowhere but as copies."""
    score, exists = slots([1.0, 0.0, 0.0], [1.0, 1.0, 1.0]), torch.ones(2, 3, dtype=torch.bool)
    copy = torch.tensor([[False, False, True], [False, True, True]])
    valid = ~copy
    terms = nce_loss("ranking", score, score, valid)
    sums = block_sums(score, terms, exists, valid, valid, copy, torch.tensor(1.0))
    named = dict(zip(SUMS, sums.tolist(), strict=True))
    assert (named["blocks"], named["copies"], named["slots"]) == (1, 3, 4)
    means = {name: value.item() for name, value in means_of(sums).items()}
    p = math.e / (math.e + 1)
    assert means == pytest.approx({
        "nce_loss": -math.log(p), "ln_slots": LN2, "duplicate_floor": 0.0,
        "scale_floor": math.log1p(math.exp(-2)), "gamma_gradient": p - 1, "rank_accuracy": 1.0,
        "mrr": 1.0, "score_spread": 0.5, "duplicate_rate": 3 / 4,
    }, rel=1e-6)  # fmt: skip
    unbounded = block_sums(score, terms, exists, valid, every(score), copy, None)
    named = dict(zip(SUMS, unbounded.tolist(), strict=True))
    assert named["scale_floor"] == 0 and named["ln_slots"] == pytest.approx(math.log(3))


def test_floors():
    """Copies of the truth keep ln(1 + d); a bounded score keeps ln(1 + n e^-2g)."""
    assert duplicate_floor(torch.tensor([0, 1, 3])).tolist() == pytest.approx([0, LN2, 2 * LN2])
    floors = [bound_floor(g, torch.tensor([4])).item() for g in (0, 0.5, 1, 2, 3)]
    assert floors == pytest.approx([1.609, 0.905, 0.433, 0.071, 0.010], abs=6e-4)
    best = slots([2.0, -2.0, -2.0, -2.0, -2.0])
    terms = nce_loss("ranking", best, best, every(best))
    assert terms.loss_M.item() == pytest.approx(floors[3], rel=1e-6)
    # The copies score what the truth scores, however far ahead of the rest.
    copied = slots([40.0, 40.0, 40.0, -40.0])
    terms = nce_loss("ranking", copied, copied, every(copied))
    assert terms.loss_M.item() == pytest.approx(duplicate_floor(torch.tensor([2])).item())
    same = torch.zeros(2, 5)
    terms = nce_loss("ranking", same, same, every(same))
    torch.testing.assert_close(terms.loss_M, log_slots(every(same)))


def test_rank_of_the_truth():
    """First; third behind one better and one equal, half the time second; alone; absent."""
    nan = math.nan
    score = slots([2, 1, 0, nan], [1, 3, 1, 0], [5, nan, nan, nan], [9, 1, 1, 1], [1, 1, 1, 1])
    valid = score.isfinite()
    valid[3, 0] = False
    found = positive_rank(score, valid)
    assert found.first_M.tolist() == pytest.approx([1, 0, 1, 0, 1 / 4])
    means = [1, (1 / 2 + 1 / 3) / 2, 1, 0, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4]
    assert found.reciprocal_M.tolist() == pytest.approx(means)


def test_ties_are_drawn_by_lot():
    """Against the mean over orders in which ties are broken at random."""
    draw = torch.Generator().manual_seed(0)
    score = torch.randint(0, 3, (20, 5), generator=draw).double()
    valid = torch.rand(20, 5, generator=draw) < 0.8
    valid[:, 0] = True
    found = positive_rank(score, valid)
    noise = torch.rand(4000, 20, 5, generator=draw, dtype=torch.float64) / 2
    jittered = (score + noise).masked_fill(~valid, -1)
    ranks = 1 + (jittered[..., 1:] > jittered[..., :1]).sum(-1)
    torch.testing.assert_close(found.first_M, (ranks == 1).float().mean(0), atol=0.03, rtol=0)
    torch.testing.assert_close(found.reciprocal_M, (1 / ranks).mean(0), atol=0.03, rtol=0)


def test_spread_size_and_penalty():
    score = slots([1.0, 3.0, math.nan], [-4.0, math.nan, math.nan])
    valid = score.isfinite()
    assert score_spread(score, valid).tolist() == [1, 0]
    assert largest_score(score, valid).tolist() == [3, 4]
    assert score_penalty(score, valid).tolist() == [5, 16]
    assert log_slots(valid).tolist() == pytest.approx([LN2, 0])
