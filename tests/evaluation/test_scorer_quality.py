"""Order, calibration and the leak probe: by hand, by brute force, and where the answer is known."""

import itertools
import math

import numpy as np
import pytest

from data.errors import DataError
from evaluation.grouped import Groups
from evaluation.scorer_quality import (
    calibration,
    expected_rank,
    leak_probe,
    ordering,
    softmax_scores,
)
from evaluation.statistics import wilson_interval
from tests.evaluation.scored_blocks import BY_HAND, random_blocks


def groups_of(blocks, resamples=200):
    return Groups(blocks.group_M, resamples)


def test_order_by_hand():
    """Pairs with different errors: right in blocks 0 (1 of 1), 1 (1 of 3), 2 (1 of 3), 4 (2 of 2).

    Block 1: errors 0, 1, 2, scores 0, 2, -1: the second above the first is wrong, the others right.
    Block 2: errors 1, 2, 3, scores 0, 2, 1: only 2 before 3 is right.
    """
    found = ordering(BY_HAND, groups_of(BY_HAND))
    assert found.pairwise.value == pytest.approx((1 + 2 + 1 + 2) / 9) and found.pairwise.over == 9
    # One pair more, 1 against 0 in block 4, differs in score alone.
    assert found.tau.value == pytest.approx((6 - 3) / math.sqrt(9 * 10))
    # Truth against wrong candidates: 3 > 0; 0 < 2, 0 > -1; 1 between 2, 1 (equal) and 0; 2 > 1, 0.
    assert found.rank1.value == pytest.approx((1 + 0 + 0 + 1) / 4) and found.rank1.over == 4
    assert found.mrr.value == pytest.approx((1 + 1 / 2 + (1 / 2 + 1 / 3) / 2 + 1) / 4)
    assert found.chance_rank1 == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 3) / 4)
    thirds, fourths = (1 + 1 / 2 + 1 / 3) / 3, (1 + 1 / 2 + 1 / 3 + 1 / 4) / 4
    assert found.chance_mrr == pytest.approx((3 / 4 + 2 * thirds + fourths) / 4)


def test_order_equals_brute_force():
    blocks = random_blocks(0, 60)
    found = ordering(blocks, groups_of(blocks))
    right, pairs = 0.0, 0
    for m, valid in enumerate(blocks.valid_MC):
        for a, b in itertools.permutations(np.flatnonzero(valid), 2):
            if blocks.errors_MC[m, a] < blocks.errors_MC[m, b]:
                s, t = blocks.score_MC[m, [a, b]]
                right, pairs = right + (s > t) + (s == t) / 2, pairs + 1
    assert found.pairwise.value == pytest.approx(right / pairs) and found.pairwise.over == pairs
    assert found.tau.over == pairs


def test_tau_of_one_block_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    blocks = random_blocks(1, 1, width=12)._replace(valid_MC=np.ones((1, 12), dtype=bool))
    blocks = blocks._replace(score_MC=blocks.score_RMC[0])
    expected = stats.kendalltau(blocks.score_MC[0], -blocks.errors_MC[0]).statistic
    assert ordering(blocks, groups_of(blocks)).tau.value == pytest.approx(expected)


def test_order_of_scores_that_say_nothing_or_all():
    blocks = random_blocks(2, 300)
    flat = blocks._replace(score_MC=np.ones((300, 4)), truth_score_M=np.ones(300))
    found = ordering(flat, groups_of(flat))
    assert found.pairwise[:3] == (0.5, 0.5, 0.5) and found.tau.value is None
    assert found.rank1.value == pytest.approx(found.chance_rank1)
    assert found.mrr.value == pytest.approx(found.chance_mrr)
    best = blocks._replace(score_MC=-1.0 * blocks.errors_MC, truth_score_M=np.zeros(300))
    found = ordering(best, groups_of(best))
    assert found.pairwise[:3] == found.rank1[:3] == found.mrr[:3] == (1, 1, 1)
    assert found.tau.value == 1


def test_a_round_without_a_score_of_the_truth_has_no_rank():
    found = ordering(BY_HAND.round(0), groups_of(BY_HAND))
    assert found.rank1 == (None, None, None, 0) and found.chance_rank1 is None
    assert found.pairwise.value == pytest.approx(6 / 9)


def test_expected_rank_by_hand():
    first, reciprocal = expected_rank(np.array([0, 0, 2]), np.array([0, 1, 1]))
    assert first.tolist() == [1, 0.5, 0]
    assert reciprocal.tolist() == pytest.approx([1, 3 / 4, (1 / 3 + 1 / 4) / 2])


def test_calibration_by_hand():
    """Scores 0 and ln 3: p = 1/4 and 3/4; the truth has 3/4, 3/4 and 1/4."""
    blocks = BY_HAND.among(np.array([0, 0, 0, 2, 3]))
    blocks = blocks._replace(
        score_MC=np.tile([0.0, math.log(3), np.nan], (5, 1)),
        valid_MC=np.array([[1, 1, 0]] * 4 + [[1, 0, 0]], dtype=bool),
        errors_MC=np.array([[1, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 0]]),
    )
    found = calibration(blocks, groups_of(blocks), bins=4)
    # A block without the truth, and one with a single candidate, decide nothing.
    assert found.decidable == 3 and found.brier.over == 6
    # Bin [1/4, 1/2): p 1/4, truths 1 of 3; bin [3/4, 1]: p 3/4, truths 2 of 3; gaps of 1/12.
    assert found.ece.value == pytest.approx(1 / 12)
    assert found.brier.value == pytest.approx((4 * (1 / 16) + 2 * (9 / 16)) / 6)
    # Truths 3/4, 3/4, 1/4 against others 1/4, 1/4, 3/4: 2 + 2 + 0 wins, 1 + 1 + 2 equal, of 9.
    assert found.auroc.value == pytest.approx((4 + 4 / 2) / 9)
    assert [one.observations for one in found.bins] == [0, 3, 0, 3]
    assert found.bins[0][2:] == (0, None, None, None)
    assert found.bins[3][:5] == pytest.approx((0.75, 1.0, 3, 0.75, 2 / 3))
    assert found.bins[3].interval == wilson_interval(2, 3)


def test_auroc_and_brier_equal_brute_force():
    blocks = random_blocks(4, 60)
    found = calibration(blocks, groups_of(blocks))
    used = blocks.truth_in_set_M & (blocks.valid_MC.sum(-1) > 1)
    seen = blocks.valid_MC & used[:, None]
    p, y = softmax_scores(blocks)[seen], blocks.is_truth_MC[seen]
    wins = [(a > b) + (a == b) / 2 for a in p[y] for b in p[~y]]
    assert found.auroc.value == pytest.approx(np.mean(wins))
    assert found.brier.value == pytest.approx(np.mean((p - y) ** 2))
    gaps = [abs((p - y)[np.minimum(p * 15 // 1, 14) == b].sum()) for b in range(15)]
    assert found.ece.value == pytest.approx(sum(gaps) / len(p))
    assert sum(one.observations for one in found.bins) == len(p)


def test_the_interval_of_auroc_is_that_of_resampled_blocks():
    blocks = random_blocks(5, 40)
    groups = Groups(blocks.group_M, 30)
    found = calibration(blocks, groups)
    draws = []
    for resample in range(30):
        times = groups.times_of_blocks(resample).astype(int)
        again = blocks.among(np.repeat(np.arange(40), times))
        draws.append(calibration(again, groups_of(again, 1)).auroc.value)
    assert found.auroc[1:3] == pytest.approx(np.quantile(draws, [0.025, 0.975]))


def test_a_score_that_is_the_posterior_is_calibrated():
    """The truth drawn from softmax(S): all bins on the diagonal; doubled scores are too sure."""
    rng = np.random.default_rng(0)
    blocks = random_blocks(6, 4000)
    score = rng.normal(size=(4000, 4)) * 1.5
    honest = blocks._replace(valid_MC=np.ones((4000, 4), dtype=bool), score_MC=score)
    truth = (softmax_scores(honest).cumsum(-1) < rng.random((4000, 1))).sum(-1)
    honest = honest._replace(errors_MC=(np.arange(4) != truth[:, None]).astype(np.int64))
    found = calibration(honest, Groups(honest.group_M, 2))
    assert found.ece.value < 0.015
    inside = [one.interval.low <= one.mean <= one.interval.high for one in found.bins]
    assert sum(inside) >= 12
    sure = calibration(honest._replace(score_MC=2 * score), Groups(honest.group_M, 2))
    assert sure.ece.value > 0.05 and sure.brier.value > found.brier.value
    assert sure.bins[-1].rate < sure.bins[-1].interval.high < sure.bins[-1].mean


def test_leak_probe_by_hand():
    """Of three slots: first, last, first of two equal ones; a set of one slot is left out."""
    score = np.array([[3, 1, 2], [0, 1, 2], [2, 2, np.nan], [1, 9, 9]], dtype=np.float64)
    valid = np.array([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]], dtype=bool)
    found = leak_probe(score, valid)
    assert (found.sets, found.first, found.rate) == (3, 1.5, 0.5)
    assert found.chance == pytest.approx((1 / 3 + 1 / 3 + 1 / 2) / 3) and found.at_chance
    assert found.interval == wilson_interval(2, 3)
    with pytest.raises(DataError, match="a leak probe needs at least 1 set"):
        leak_probe(score[3:], valid[3:])


def test_leak_probe_tells_a_leak():
    rng = np.random.default_rng(0)
    score, valid = rng.normal(size=(500, 5)), np.ones((500, 5), dtype=bool)
    honest = leak_probe(score, valid)
    assert honest.at_chance and honest.chance == pytest.approx(1 / 5)
    leaking = leak_probe(score + np.eye(5)[0], valid)
    assert not leaking.at_chance and leaking.rate > 0.3
    constant = leak_probe(np.zeros((500, 5)), valid)
    assert constant.at_chance and constant.rate == pytest.approx(1 / 5)
