"""What a scorer picks: every rate by hand and by brute force, its intervals, the ship gate."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from evaluation.grouped import Groups
from evaluation.scorer import (
    ALPHAS,
    ScoredBlocks,
    baselines,
    check_blocks,
    picked,
    selection,
    ship_gate,
    sweep,
)
from tests.evaluation.scored_blocks import BY_HAND, random_blocks


def test_picking_by_hand():
    assert picked(BY_HAND, 1).tolist() == [1, 1, 1, 0, 0]
    assert picked(BY_HAND, 0).tolist() == [0] * 5
    # Block 0 flips for alpha > 1/3, blocks 1 and 2 for alpha > 1/2, block 4 for alpha > 3.
    assert picked(BY_HAND, 0.4).tolist() == [1, 0, 0, 0, 0]
    assert picked(BY_HAND, math.inf).tolist() == [1, 1, 1, 0, 2]
    # Equal values: the first.
    assert picked(BY_HAND, 0.5).tolist() == [1, 0, 0, 0, 0]
    with pytest.raises(DataError, match=r"alpha=-1: allowed 0 <= alpha"):
        picked(BY_HAND, -1)


def test_rates_by_hand():
    found = selection(BY_HAND, 1.0, Groups(BY_HAND.group_M))
    assert (found.blocks, found.flips, found.right, found.wrong) == (5, 3, 1, 1)
    assert found.oracle.value == pytest.approx(4 / 5)
    assert found.greedy.value == found.bon.value == pytest.approx(2 / 5)
    assert found.gain.value == 0 and found.regret.value == pytest.approx(2 / 5)
    assert found.flip_rate.value == pytest.approx(3 / 5)
    assert found.right_given_flip.value == found.wrong_given_flip.value == pytest.approx(1 / 3)
    assert found.right_given_flip.over == 3 and found.gain.over == 5
    alone = selection(BY_HAND, math.inf, Groups(BY_HAND.group_M))
    assert alone.gain.value == pytest.approx(1 / 5) and alone.right == 2


def test_at_alpha_0_everything_is_greedy():
    found = selection(BY_HAND, 0.0, Groups(BY_HAND.group_M))
    assert found.bon == found.greedy and found.flips == 0
    assert found.gain[:3] == (0, 0, 0) and found.gain_p == 1
    assert found.right_given_flip == (None, None, None, 0)
    assert not ship_gate(found, Groups(BY_HAND.group_M)).ships


def brute_force(blocks: ScoredBlocks, alpha: float):
    """bon, right and wrong flips by loops."""
    hits, right, wrong = [], 0, 0
    for m in range(len(blocks.valid_MC)):
        best, value = 0, -math.inf
        for c in np.flatnonzero(blocks.valid_MC[m]):
            s, l = blocks.score_MC[m, c], blocks.log_q_MC[m, c]  # noqa: E741
            here = s if alpha == math.inf else l + alpha * s if alpha else l
            if here > value:
                best, value = int(c), here
        hit = blocks.errors_MC[m, best] == 0
        hits.append(hit)
        right += best != 0 and hit
        wrong += best != 0 and blocks.errors_MC[m, 0] == 0
    return np.mean(hits), right, wrong


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(ALPHAS))
def test_rates_equal_brute_force(seed, alpha):
    blocks = random_blocks(seed, 40)
    found = selection(blocks, alpha, Groups(blocks.group_M, 50))
    bon, right, wrong = brute_force(blocks, alpha)
    assert (found.bon.value, found.right, found.wrong) == (pytest.approx(bon), right, wrong)
    assert found.gain.value == pytest.approx((right - wrong) / 40)
    if found.flips:
        odds = found.right_given_flip.value - found.wrong_given_flip.value
        assert found.gain.value == pytest.approx(found.flip_rate.value * odds)
    assert found.oracle.value >= found.bon.value
    assert found.regret.value == pytest.approx(found.oracle.value - found.bon.value)


def test_the_sweep_is_of_the_same_draws():
    """The interval of the gain is that of differences, narrower than of independent rates."""
    blocks = random_blocks(0, 400, skill=2.0)
    groups = Groups(blocks.group_M)
    found = {one.alpha: one for one in sweep(blocks, groups)}
    assert tuple(found) == ALPHAS
    assert found[0.0].gain.value == 0 < found[0.3].gain.value < found[1.0].gain.value
    one = found[1.0]
    gain, bon, greedy = (high - low for _, low, high, _ in (one.gain, one.bon, one.greedy))
    assert gain < math.hypot(bon, greedy)
    assert sweep(blocks, Groups(blocks.group_M))[5] == one
    assert sweep(blocks, Groups(blocks.group_M, seed=1))[5].gain != one.gain


def test_intervals_draw_whole_groups():
    """Ten copies of every block in its own group are worth no more than one."""
    blocks = random_blocks(3, 60, skill=2.0)
    single = blocks._replace(group_M=np.arange(60))
    copied = single.among(np.repeat(np.arange(60), 10))
    once = selection(single, 1.0, Groups(single.group_M)).gain
    often = selection(copied, 1.0, Groups(copied.group_M)).gain
    assert often[:3] == pytest.approx(once[:3]) and often.over == 600
    naive = selection(copied, 1.0, Groups(np.arange(600))).gain
    assert naive.high - naive.low < 0.5 * (once.high - once.low)


def test_the_interval_is_about_normal():
    blocks = random_blocks(1, 400, skill=1.0)._replace(group_M=np.arange(400))
    found = selection(blocks, 1.0, Groups(blocks.group_M, 4000)).gain
    pick = picked(blocks, 1.0)
    hit = blocks.is_truth_MC[np.arange(400), pick].astype(float) - blocks.is_truth_MC[:, 0]
    error = hit.std() / 20
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.3 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.3 * error)


def test_ship_gate():
    """A good scorer ships, one that points the wrong way does not, one group says nothing."""
    good = random_blocks(0, 400, skill=3.0)
    groups = Groups(good.group_M)
    gate = ship_gate(selection(good, 1.0, groups), groups)
    assert gate.ships and gate.gain.low > 0 and gate.p == 1 / 2000
    assert gate.groups == len(np.unique(good.group_M)) and gate.alpha == 1.0
    bad = good._replace(score_MC=-good.score_MC)
    worse = ship_gate(selection(bad, 1.0, groups), groups)
    assert not worse.ships and worse.gain.high < 0 and worse.p == 1 / 2000
    lone = Groups(np.zeros(400, dtype=np.int64))
    alone = ship_gate(selection(good, 1.0, lone), lone)
    assert not alone.ships and alone.p is None and alone.gain.low is None
    assert alone.gain.value == gate.gain.value


def test_the_gate_is_rarely_wrong():
    """Of scorers that know nothing about 2.5 % ship."""
    shipped = 0
    for seed in range(100):
        blocks = random_blocks(seed, 120, skill=0.0)
        flat = blocks._replace(  # any candidate is as likely as any other, so the gain is 0
            errors_MC=np.random.default_rng(seed).permuted(
                np.tile([0, 1, 1, 1], (120, 1)), axis=-1
            ),
            valid_MC=np.ones((120, 4), dtype=bool),
            score_MC=blocks.score_RMC[0],
            log_q_MC=np.zeros((120, 4)),
            group_M=np.arange(120),
        )
        groups = Groups(flat.group_M, 400)
        shipped += ship_gate(selection(flat, 1.0, groups), groups).ships
    assert shipped <= 8  # P(more | 2.5 % of 100) < 0.1 %


def test_baselines_by_hand():
    """Truth in the set: 1 of 2, 1 of 3, none, 1 of 1, 1 of 3."""
    found = baselines(BY_HAND, Groups(BY_HAND.group_M))
    assert found.random.value == pytest.approx((1 / 2 + 1 / 3 + 0 + 1 + 1 / 3) / 5)
    assert found.proposal.value == pytest.approx(2 / 5) and found.proposal_flips == 0
    swapped = BY_HAND._replace(log_q_MC=BY_HAND.log_q_MC * [5, 1, 1])
    assert baselines(swapped, Groups(BY_HAND.group_M)).proposal_flips == 4


def test_a_random_scorer_is_at_its_expectation():
    blocks = random_blocks(2, 300)
    expected = baselines(blocks, Groups(blocks.group_M, 10)).random.value
    rng = np.random.default_rng(0)
    rates = [
        selection(blocks._replace(score_MC=rng.normal(size=(300, 4))), math.inf,
                  Groups(blocks.group_M, 2)).bon.value
        for _ in range(200)
    ]  # fmt: skip
    assert np.mean(rates) == pytest.approx(expected, abs=4 * np.std(rates) / math.sqrt(200))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"valid_MC": np.zeros((0, 3), dtype=bool)}, r"valid_MC has shape \(0, 3\), want \[M, C\]"),
        ({"errors_MC": np.zeros((5, 2), dtype=np.int64)}, r"errors_MC has shape \(5, 2\), want"),
        ({"score_RMC": np.zeros((5, 3))}, r"score_RMC has shape \(5, 3\), want"),
        ({"entropy_M": np.zeros(4)}, r"entropy_M has shape \(4,\), want \(5,\)"),
        ({"valid_MC": ~BY_HAND.valid_MC}, "block 0: candidate 0 is not valid"),
        ({"errors_MC": np.zeros((5, 3), dtype=np.int64)}, "block 0: two candidates are the truth"),
        ({"errors_MC": np.full((5, 3), -1)}, "block 0: a negative number of errors"),
        ({"score_MC": BY_HAND.score_MC * [[1], [1], [np.nan], [1], [1]]},
         "block 2: a number is not finite"),
        ({"truth_score_M": np.array([1, 1, 1, 1, np.inf])}, "block 4: a number is not finite"),
    ],
)  # fmt: skip
def test_blocks_that_cannot_be_measured(change, message):
    check_blocks(BY_HAND)
    with pytest.raises(DataError, match=message):
        check_blocks(BY_HAND._replace(**change))
