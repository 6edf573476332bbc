"""Masks of unequal probability against enumeration, and the bound they give."""

import itertools
import math

import pytest
import torch
from numpy.polynomial.legendre import leggauss

from objectives.corruption import MaskingProcess
from objectives.masking import (
    conditioned_bernoulli_mask,
    count_distribution,
    count_mask,
    enumerate_masks,
    truncated_binomial,
)
from objectives.noise import LogLinear

P = torch.tensor([0.2, 0.9, 0.5, 0.05])


def probability(mask, p=P):
    return float(torch.where(mask, p, 1 - p).prod())


def test_count_distribution_equals_enumeration():
    masks = enumerate_masks(torch.ones(4, dtype=torch.bool))
    last, *_, whole = count_distribution(P.view(1, 1, 4), torch.ones(1, 1, 4, dtype=torch.bool))
    for count in range(5):
        exact = sum(probability(mask) for mask in masks if mask.sum() == count)
        assert float(whole[0, 0, count]) == pytest.approx(exact)
    assert last[0, 0].tolist() == pytest.approx([0.95, 0.05, 0, 0, 0])
    unmaskable = torch.tensor([True, False, True, True]).view(1, 1, 4)
    *_, whole = count_distribution(P.view(1, 1, 4), unmaskable)
    assert float(whole[0, 0, 4]) == 0.0


@pytest.mark.parametrize(("least", "most"), [(0, 4), (1, 2), (3, 3), (2, 4)])
def test_conditioned_masks_have_the_law_of_redrawing(least, most):
    """Frequencies of all masks against p(mask) / p(count fits)."""
    size = 40_000
    uniform = torch.rand(size, 4, generator=torch.Generator().manual_seed(0))
    everything = torch.ones(size, 4, dtype=torch.bool)
    found = conditioned_bernoulli_mask(uniform, P.expand(size, 4), everything, 4, least, most)
    masks = [m for m in enumerate_masks(everything[0]) if least <= m.sum() <= most]
    total = sum(probability(mask) for mask in masks)
    assert ((found.sum(-1) >= least) & (found.sum(-1) <= most)).all()
    for mask in masks:
        expected = probability(mask) / total
        frequency = float((found == mask).all(-1).float().mean())
        assert abs(frequency - expected) < 4.5 * math.sqrt(expected * (1 - expected) / size) + 1e-9


def test_too_few_maskable_tokens_are_all_masked():
    maskable = torch.tensor([[False, True, False, True], [False] * 4])
    found = conditioned_bernoulli_mask(torch.full((2, 4), 0.99), P.expand(2, 4), maskable, 4, 3, 4)
    assert torch.equal(found, maskable)
    certain = torch.tensor([[1.0, 0.0, 0.0, 0.0]])  # what rounding may make of probabilities
    all_maskable = torch.ones(1, 4, dtype=torch.bool)
    found = conditioned_bernoulli_mask(torch.full((1, 4), 0.5), certain, all_maskable, 4, 2, 3)
    assert 2 <= int(found.sum()) <= 3


def test_equal_probabilities_give_the_truncated_binomial():
    """Counts of the sequential draw against those by inversion: means within their errors."""
    size, p = 20_000, torch.full((20_000, 1), 0.4)
    draw = torch.Generator().manual_seed(2)
    everything = torch.ones(size, 8, dtype=torch.bool)
    trials = torch.full((size, 1), 8)
    count = truncated_binomial(torch.rand(size, 1, generator=draw), trials, p, 3, 6)
    first = count_mask(torch.rand(size, 8, generator=draw), everything, count, 8)
    second = conditioned_bernoulli_mask(
        torch.rand(size, 8, generator=draw), p.expand(size, 8), everything, 8, 3, 6
    )
    for one, two in zip(first.float().mean(0), second.float().mean(0), strict=True):
        assert abs(one - two) < 5 * math.sqrt(2 * 0.25 / size)
    assert first.sum(-1).float().var() == pytest.approx(
        float(second.sum(-1).float().var()), rel=0.05
    )


# A joint distribution of three binary tokens in which everything depends on everything.
TABLE = torch.tensor([0.25, 0.02, 0.08, 0.15, 0.05, 0.2, 0.05, 0.2], dtype=torch.float64)
TABLE = TABLE.view(2, 2, 2)


def conditional_nll(tokens, mask, place):
    """-log p(token at `place` | the tokens that are not masked), from the joint."""
    seen = tuple(slice(None) if hidden else t for t, hidden in zip(tokens, mask, strict=True))
    known = TABLE[seen].sum()
    both = tuple(t if i == place else s for i, (t, s) in enumerate(zip(tokens, seen, strict=True)))
    return -math.log(float(TABLE[both].sum() / known))


def expected_loss(tokens, odds, points=200):
    """E_t sum over masks P(mask) sum over masked i (p_i' / p_i) nll_i for p(t) = t, by quadrature.

    p_i and its derivative are written out here: p_i = w t / (1 + (w - 1) t), p_i' = w / (...)^2.
    """
    total = 0.0
    for node, weight in zip(*leggauss(points), strict=True):
        t = (node + 1) / 2
        p = [w * t / (1 + (w - 1) * t) for w in odds]
        slope = [w / (1 + (w - 1) * t) ** 2 for w in odds]
        for mask in itertools.product([False, True], repeat=3):
            chance = math.prod(q if m else 1 - q for q, m in zip(p, mask, strict=True))
            total += (weight / 2) * chance * sum(
                slope[i] / p[i] * conditional_nll(tokens, mask, i) for i in range(3) if mask[i]
            )  # fmt: skip
    return total


@pytest.mark.parametrize("odds", [(1.0, 1.0, 1.0), (0.4, 1.7, 0.9), (2.5, 0.1, 0.4)])
@pytest.mark.parametrize("tokens", [(0, 0, 1), (1, 1, 1), (1, 0, 0)])
def test_true_conditionals_attain_the_likelihood_under_every_tilt(tokens, odds):
    """The loss of a schedule per token is -log p, whatever the odds."""
    exact = -math.log(float(TABLE[tokens]))
    assert expected_loss(tokens, odds) == pytest.approx(exact, rel=1e-9)


def test_weights_without_the_schedule_are_no_bound():
    """target=loss, w_i / t under p(t) = t, misses the likelihood: a surrogate."""
    tokens, weights = (0, 0, 1), (2.5, 0.1, 0.4)
    nodes, node_weights = leggauss(200)
    surrogate = 0.0
    for node, weight in zip(nodes, node_weights, strict=True):
        t = (node + 1) / 2
        for mask in itertools.product([False, True], repeat=3):
            chance = math.prod(t if m else 1 - t for m in mask)
            surrogate += (weight / 2) * chance / t * sum(
                weights[i] * conditional_nll(tokens, mask, i) for i in range(3) if mask[i]
            )  # fmt: skip
    assert abs(surrogate + math.log(float(TABLE[tokens]))) > 0.1


def test_the_process_draws_what_the_quadrature_integrates():
    """Monte Carlo over `MaskingProcess.draw` against the expected loss."""
    tokens, odds, size = (0, 0, 1), (0.4, 1.7, 0.9), 60_000
    process = MaskingProcess(LogLinear(), 3, seed=3, interval=(1e-6, 1.0))
    everything = torch.ones(size, 3, dtype=torch.bool)
    noise = process.draw(everything, torch.arange(size), (0,), torch.tensor([odds] * size))
    nll = torch.zeros(2, 2, 2, 3, dtype=torch.float64)
    for mask in itertools.product([0, 1], repeat=3):
        nll[mask] = torch.tensor(
            [conditional_nll(tokens, mask, i) if mask[i] else 0.0 for i in range(3)]
        )
    a, b, c = noise.mask_BL.long().unbind(-1)
    loss = (nll[a, b, c] * noise.weight_BL).sum(-1)
    error = float(loss.std()) / math.sqrt(size)
    assert abs(float(loss.mean()) - expected_loss(tokens, odds)) < 4 * error
    assert error < 0.05


def test_odds_of_one_change_nothing():
    process = MaskingProcess(LogLinear(), 4, seed=1)
    everything, rows = torch.ones(16, 8, dtype=torch.bool), torch.arange(16)
    plain = process.draw(everything, rows, (5,))
    ones = process.draw(everything, rows, (5,), torch.ones(16, 8))
    assert torch.equal(plain.mask_BL, ones.mask_BL)
    assert torch.equal(plain.weight_BL, ones.weight_BL)


def test_another_interval_can_be_drawn_without_changing_the_process():
    process = MaskingProcess(LogLinear(), 4, seed=1, resample=True, interval=(0.25, 0.75))
    everything, rows = torch.ones(50, 8, dtype=torch.bool), torch.arange(50)
    other = process.draw(everything, rows, (0,), interval=(0.5, 1.0))
    counts = other.mask_BL.view(50, 2, 4).sum(-1)
    assert counts.min() >= 2 and counts.max() == 4
    assert other.time_BK.min() >= 0.5 and process.interval == (0.25, 0.75)
    counts = process.draw(everything, rows, (0,)).mask_BL.view(50, 2, 4).sum(-1)
    assert counts.min() >= 1 and counts.max() <= 3
