"""Masks: their laws against enumeration, closed forms and a slow rejection loop."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.keyed import keyed_uniform
from objectives.masking import (
    bernoulli_mask,
    count_mask,
    enumerate_masks,
    exact_count,
    maskable_per_block,
    rate_bounds,
    spread_times,
    truncated_binomial,
)


@given(st.integers(1, 64), st.integers(1, 16), st.floats(0, 0.999))
def test_spread_times_cover_the_interval_evenly(batch, blocks, phase):
    """No gap between neighbouring times exceeds 2.7 / N: the three-gap theorem, golden ratio."""
    times = spread_times(torch.arange(batch), blocks, phase, 0.0, 1.0).flatten().double()
    ordered = times.sort().values
    gaps = torch.cat([ordered.diff(), (ordered[0] + 1 - ordered[-1])[None]])
    assert gaps.max() <= 2.7 / len(times) + 1e-5


def test_spread_times_spread_within_each_sequence_and_ignore_the_partition():
    """One sequence's blocks cover the interval too; half a batch gets the half of the whole."""
    whole = spread_times(torch.arange(8), 16, 0.3, 0.2, 0.8)
    assert whole.min() >= 0.2 and whole.max() < 0.8
    assert (whole.sort(dim=1).values.diff(dim=1) < 0.6 * 2.7 / 16).all()
    assert torch.equal(spread_times(torch.arange(4, 8), 16, 0.3, 0.2, 0.8), whole[4:])


def test_bernoulli_rate():
    """The realised rate is p, at five standard errors."""
    u = keyed_uniform((1,), torch.arange(4000), 16)
    mask = bernoulli_mask(u, torch.full_like(u, 0.3))
    assert abs(mask.double().mean() - 0.3) < 5 * math.sqrt(0.3 * 0.7 / mask.numel())
    assert bernoulli_mask(u, torch.ones_like(u)).all()
    assert not bernoulli_mask(u, torch.zeros_like(u)).any()


@given(st.integers(0, 1000), st.sampled_from([1, 2, 4, 8]))
def test_count_mask_masks_exactly_the_count(seed, block_size):
    """Whatever the maskable places, each block loses min(count, maskable) of them."""
    generator = torch.Generator().manual_seed(seed)
    maskable = torch.rand(3, 8, generator=generator) < 0.7
    available = maskable_per_block(maskable, block_size)
    count = (torch.rand(available.shape, generator=generator) * (available + 1)).long()
    mask = count_mask(torch.rand(3, 8, generator=generator), maskable, count, block_size)
    assert torch.equal(maskable_per_block(mask, block_size), torch.minimum(count, available))
    assert not (mask & ~maskable).any()


def test_count_mask_chooses_places_uniformly():
    """All 6 pairs out of 4 places are equally likely: chi-square with 5 degrees of freedom."""
    u = keyed_uniform((2,), torch.arange(12_000), 4)
    mask = count_mask(u, torch.ones_like(u).bool(), torch.full((12_000, 1), 2), 4)
    code = (mask.long() * torch.tensor([1, 2, 4, 8])).sum(-1)
    counts = torch.bincount(code, minlength=16)[[3, 5, 6, 9, 10, 12]].double()
    assert counts.sum() == 12_000
    assert ((counts - 2000) ** 2 / 2000).sum() < 5 + 5 * math.sqrt(10)


@pytest.mark.parametrize("p", [0.05, 0.4, 0.95])
@pytest.mark.parametrize("bounds", [(0, 4), (1, 3), (2, 2), (3, 4)])
def test_truncated_binomial_equals_its_closed_form(p, bounds):
    """Counts of the inversion against the exact conditional probabilities."""
    n, (least, most) = 4, bounds
    uniform = (torch.arange(40_000) + 0.5)[None] / 40_000
    ones = torch.ones_like(uniform)
    counts = truncated_binomial(uniform, ones.long() * n, ones * p, least, most)
    support = range(least, most + 1)
    mass = torch.tensor([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in support])
    share = torch.bincount(counts[0], minlength=n + 1)[least : most + 1] / 40_000
    torch.testing.assert_close(share, mass / mass.sum(), atol=2e-4, rtol=0)
    assert int(counts.min()) >= least and int(counts.max()) <= most


def test_truncated_binomial_has_the_law_of_rejection():
    """Redrawing whole blocks until the rate fits, the published loop, gives the same counts."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.rand(60_000, 8, generator=generator) < 0.35
    kept = draws[(draws.sum(-1) >= 3) & (draws.sum(-1) <= 6)].sum(-1)
    rejection = torch.bincount(kept, minlength=9) / len(kept)
    uniform = keyed_uniform((3,), torch.arange(60_000), 1)
    trials = torch.full((60_000, 1), 8)
    counts = truncated_binomial(uniform, trials, torch.full((60_000, 1), 0.35), 3, 6)
    inversion = torch.bincount(counts[:, 0], minlength=9) / 60_000
    torch.testing.assert_close(inversion, rejection, atol=0.012, rtol=0)


@given(st.integers(0, 12), st.floats(0, 1), st.floats(0, 1), st.integers(0, 12), st.integers(0, 12))
@settings(max_examples=200)
def test_truncated_binomial_stays_in_its_support(trials, p, u, a, b):
    """Also at p = 0 and 1, and where fewer places can be masked than the bound asks for."""
    least, most = min(a, b), max(a, b)
    count = truncated_binomial(
        torch.tensor([[u]]).clamp(max=1 - 2**-24), torch.tensor([[trials]]),
        torch.tensor([[p]]), least, most,
    )  # fmt: skip
    assert min(least, trials) <= int(count) <= min(most, trials)


def test_rate_bounds():
    """Inclusive, tolerant of float32 configurations, and an error where nothing fits."""
    assert rate_bounds(16, 0.3, 0.8) == (5, 12)
    assert rate_bounds(10, 0.30000001, 0.8) == (3, 8)
    assert rate_bounds(1, 1.0, 1.0) == (1, 1)
    with pytest.raises(ValueError, match="block_size=2 has a rate"):
        rate_bounds(2, 0.6, 0.9)


@given(st.integers(0, 9))
def test_exact_count_is_uniform(m):
    """Every n in 1..m gets the same share of an even grid of u; a block without places gets 0."""
    u = (torch.arange(2520) + 0.5)[None] / 2520
    counts = exact_count(u, torch.full_like(u, m).long())
    if m == 0:
        assert not counts.any()
    else:
        share = torch.bincount(counts[0], minlength=m + 1)[1:]
        assert (share == 2520 // m).all() if 2520 % m == 0 else True
        assert int(counts.min()) == 1 and int(counts.max()) == m


def test_enumerate_masks():
    """All subsets of the maskable places, each once."""
    masks = enumerate_masks(torch.tensor([False, True, True]))
    assert masks.tolist() == [
        [False, False, False], [False, True, False], [False, False, True], [False, True, True],
    ]  # fmt: skip
