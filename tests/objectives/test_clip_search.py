"""The search's statistics: published intervals, known variances, and both ways agree on them."""

import math

import pytest
import torch

from objectives.clip_search import (
    batch_variance,
    candidate_intervals,
    interval_variances,
    least_variance,
    weighted_variance,
)
from objectives.corruption import FULL_INTERVAL, MaskingProcess
from objectives.masking import count_distribution
from objectives.noise import LogLinear

WIDTHS = [0.5, 0.6, 0.7, 0.8, 0.9]
SIZE = 8


def test_published_intervals():
    found = candidate_intervals(WIDTHS, 0.05, 16, True)
    assert len(found) == 36 == len(set(found))
    assert found[0] == FULL_INTERVAL and found[1] == (1e-3, 0.5) and found[11] == (0.5, 1.0)
    assert found[12] == (1e-3, 0.6) and found[-1] == (0.1, 1.0)
    assert candidate_intervals(WIDTHS, 0.05, 1, True) == [FULL_INTERVAL, (1.0, 1.0)]
    assert candidate_intervals([], 0.05, 16, True) == [FULL_INTERVAL]
    assert candidate_intervals([0.63], 0.2, 16, False) == [FULL_INTERVAL, (1e-3, 0.63), (0.2, 0.83)]


def test_an_interval_without_any_rate_is_refused():
    with pytest.raises(ValueError, match="no number of masked tokens out of block_size=2"):
        candidate_intervals([0.3], 0.05, 2, True)
    assert len(candidate_intervals([0.3], 0.05, 2, False)) == 16


def test_variances_by_hand():
    values = torch.tensor([1.0, 2.0, 4.0, 9.0])
    assert float(weighted_variance(values, torch.ones(4))) == pytest.approx(float(values.var()))
    assert float(weighted_variance(values, torch.tensor([2.0, 2.0, 0.0, 0.0]))) == 0.5
    assert math.isnan(weighted_variance(values, torch.tensor([1.0, 0.0, 0.0, 0.0])))
    assert math.isnan(weighted_variance(values, torch.zeros(4)))
    # Two batches, variances 0.5 and 12.5; a batch of one block says nothing.
    loss, batch = torch.tensor([1.0, 2.0, 4.0, 9.0, 7.0]), torch.tensor([0, 0, 1, 1, 2])
    assert float(batch_variance(loss, batch)) == 6.5
    assert math.isnan(batch_variance(loss[:1], batch[:1]))


def test_ties_go_to_the_first_and_nan_never_wins():
    assert least_variance(torch.tensor([2.0, 1.0, 1.0, math.nan])) == 1
    assert least_variance(torch.tensor([math.nan, 3.0])) == 1
    assert least_variance(torch.tensor([math.nan, math.inf])) is None


def toy_loss(time_N, count_N):
    """Loss of a block whose masked tokens cost (1.5 + 6 (t - 0.6)^2) / t each.

    A cost that grows away from t = 0.6 makes a middle interval the best one.
    """
    return count_N / time_N * (1.5 + 6 * (time_N - 0.6).square()) / SIZE


def known_variance(interval, resample):
    """Var over t ~ U[low, high] and the (truncated) binomial count, on a fine grid."""
    low, high = interval
    time = low + (high - low) * (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000
    count = torch.arange(SIZE + 1, dtype=torch.float64)
    log_choose = torch.lgamma(torch.tensor(SIZE + 1.0)) - torch.lgamma(count + 1)
    log_choose = log_choose - torch.lgamma(SIZE - count + 1)
    pmf = (
        log_choose + count * time[:, None].log() + (SIZE - count) * (-time[:, None]).log1p()
    ).exp()
    if resample and interval != FULL_INTERVAL:
        lower = 0.0 if low == FULL_INTERVAL[0] else low
        pmf = pmf * ((count >= lower * SIZE - 1e-6) & (count <= high * SIZE + 1e-6))
    pmf = pmf / pmf.sum(-1, keepdim=True)
    value = toy_loss(time[:, None], count)
    mean = (pmf * value).sum(-1).mean()
    return float((pmf * value.square()).sum(-1).mean() - mean**2)


def draws(process, interval, number, counter, rows=20_000):
    """Times, counts and count distributions of blocks, as a model's batch would give them."""
    maskable = torch.ones(rows, SIZE, dtype=torch.bool)
    noise = process.draw(maskable, torch.arange(rows) + number, (counter, number), None, interval)
    *_, pmf = count_distribution(noise.probability_BL[:, None], maskable[:, None])
    return noise.time_BK[:, 0], noise.mask_BL.sum(-1), pmf[:, 0]


@pytest.mark.parametrize("resample", [False, True])
def test_both_ways_find_the_known_variances_and_the_same_interval(resample):
    intervals = candidate_intervals([0.5, 0.75], 0.125, SIZE, resample)
    known = [known_variance(interval, resample) for interval in intervals]
    process = MaskingProcess(LogLinear(), SIZE, seed=5, resample=resample, antithetic=False)
    exact = []
    for number, interval in enumerate(intervals):
        time, count, _ = draws(process, interval, number, 0)
        exact.append(batch_variance(toy_loss(time, count), torch.arange(20_000) // 500))
    time, count, pmf = draws(process, FULL_INTERVAL, 0, 1, rows=60_000)
    options = (pmf, count, torch.full_like(count, SIZE)) if resample else ()
    binned = interval_variances(time, toy_loss(time, count), intervals, *options)
    # The full interval and those from 1e-3 on have a few huge losses; the others are told exactly.
    inner = [i for i, (low, _) in enumerate(intervals) if low > 0.01]
    for found in (torch.stack(exact), binned):
        assert found[inner].tolist() == pytest.approx([known[i] for i in inner], rel=0.08)
        assert least_variance(found) == min(range(len(known)), key=known.__getitem__)
    runner_up = sorted(known)[1]
    assert runner_up > 1.05 * min(known), "the toy problem must have a clear answer"


def test_unequal_schedules_are_read_off_as_well():
    """Tilted odds, resampled: variances from draws over [0, 1] equal those of draws inside."""
    odds = torch.tensor([0.3, 0.5, 0.8, 1.0, 1.0, 1.2, 1.4, 1.8])
    process = MaskingProcess(LogLinear(), SIZE, seed=5, resample=True, antithetic=False)

    def tilted(interval, counter, rows):
        maskable = torch.ones(rows, SIZE, dtype=torch.bool)
        rows_N = torch.arange(rows)
        noise = process.draw(maskable, rows_N, (counter,), odds.expand(rows, -1), interval)
        *_, pmf = count_distribution(noise.probability_BL[:, None], maskable[:, None])
        loss = (noise.mask_BL * noise.weight_BL * torch.arange(1, 9)).mean(-1)
        return noise.time_BK[:, 0], noise.mask_BL.sum(-1), pmf[:, 0], loss

    interval = (0.25, 0.75)
    *_, loss = tilted(interval, 0, 20_000)
    time, count, pmf, all_losses = tilted(FULL_INTERVAL, 1, 60_000)
    full = torch.full_like(count, SIZE)
    (binned,) = interval_variances(time, all_losses, [interval], pmf, count, full)
    assert float(binned) == pytest.approx(float(loss.var()), rel=0.05)
