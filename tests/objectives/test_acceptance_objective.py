"""Acceptance of drafts: hand numbers, enumeration, the gradient identity, objectives as numbers."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.acceptance import (
    AcceptanceObjective,
    acceptance_probability,
    decay_weights,
    dpace_weights,
    expected_accepted_length,
    smoothed,
    suffix_weights,
    survival,
    survival_weights,
    unbroken,
)

A = torch.tensor([[0.5, 0.4, 1.0, 0.2]], dtype=torch.float64)
WHOLE = torch.ones(1, 4, dtype=torch.bool)
HOLE = torch.tensor([[True, True, False, True]])


def random_blocks(seed, blocks=3, slots=4):
    draw = torch.Generator().manual_seed(seed)
    a = torch.rand(blocks, slots, generator=draw, dtype=torch.float64)
    return a, torch.rand(blocks, slots, generator=draw) < 0.8


def test_decay_by_hand():
    """exp(-(k - 1) / 7): the first predicted slot weighs 1."""
    found = decay_weights(15, 7)
    assert found[0] == 1.0 and found[7] == pytest.approx(math.exp(-1))
    assert decay_weights(3, None).tolist() == decay_weights(3, math.inf).tolist() == [1, 1, 1]


def test_survival_and_weights_by_hand():
    def close(found, expected):
        torch.testing.assert_close(found, torch.tensor([expected], dtype=torch.float64))

    close(survival(A, WHOLE), [0.5, 0.2, 0.2, 0.04])
    close(suffix_weights(A, WHOLE), [0.94, 0.44, 0.24, 0.04])
    close(survival_weights(A, WHOLE), [1.0, 0.5, 0.2, 0.2])
    close(survival_weights(A, WHOLE, inclusive=True, floor=0.1), [0.5, 0.2, 0.2, 0.1])
    assert expected_accepted_length(A, WHOLE).item() == pytest.approx(0.94)
    # (1 - 1/2) a + 1/2 = .75, .7, 1, .6
    close(dpace_weights(A, WHOLE), [0.75 + 0.525 * 2 + 0.315, 0.525 * 2 + 0.315, 0.84, 0.315])


def test_a_hole_ends_the_block():
    """Slot 3 is no slot: nothing behind it survives, whatever its a and the floor."""
    assert unbroken(HOLE).tolist() == [[True, True, False, False]]
    torch.testing.assert_close(survival(A, HOLE)[0], A.new_tensor([0.5, 0.2, 0.0, 0.0]))
    weights = survival_weights(A, HOLE, floor=0.3)
    torch.testing.assert_close(weights[0], A.new_tensor([1.0, 0.5, 0.0, 0.0]))
    changed = A.clone()
    changed[0, 2:] = 0.7
    assert torch.equal(suffix_weights(changed, HOLE), suffix_weights(A, HOLE))
    assert not expected_accepted_length(A, torch.zeros_like(HOLE)).any()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_expected_length_is_the_mean_over_all_outcomes(seed):
    """Every slot accepted or not, 2^K outcomes with their probabilities, prefix counted."""
    a_NK, valid_NK = random_blocks(seed)
    found_N = expected_accepted_length(a_NK, valid_NK)
    for a, valid, found in zip(a_NK, valid_NK, found_N, strict=True):
        mean = 0.0
        for outcome in itertools.product((False, True), repeat=len(a)):
            pairs = zip(a.tolist(), outcome, strict=True)
            chance = math.prod(x if hit else 1 - x for x, hit in pairs)
            kept = [hit and there for hit, there in zip(outcome, valid.tolist(), strict=True)]
            mean += chance * [*kept, False].index(False)
        assert found.item() == pytest.approx(mean, abs=1e-12)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6))
def test_gradient_of_the_length_is_the_suffix_sum(seed):
    """d EAL / d log a_j = sum_{m>=j} S_m, so -EAL is NLL with these weights, detached."""
    a_NK, valid_NK = random_blocks(seed)
    log_a_NK = a_NK.log().requires_grad_()
    length = expected_accepted_length(log_a_NK.exp(), valid_NK).sum()
    (found,) = torch.autograd.grad(length, log_a_NK)
    torch.testing.assert_close(found, suffix_weights(a_NK, valid_NK), rtol=1e-12, atol=1e-14)


def distributions(seed, vocabulary=5):
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(2, 2, 3, vocabulary, generator=draw, dtype=torch.float64) * 2
    p, q = logits.softmax(-1)
    return p, q, torch.randint(vocabulary, (2, 3), generator=draw)


@pytest.mark.parametrize("seed", range(3))
def test_acceptance_by_enumeration(seed):
    """All pairs of a draft token and what the verifier does with it."""
    p, q, labels = distributions(seed)
    expected = {name: torch.zeros(2, 3) for name in ("greedy", "greedy_match", "match", "overlap")}
    for n, k in itertools.product(range(2), range(3)):
        target, draft = p[n, k].tolist(), q[n, k].tolist()
        best = draft.index(max(draft))
        expected["greedy"][n, k] = float(best == labels[n, k])
        expected["greedy_match"][n, k] = sum(x for y, x in enumerate(target) if y == best)
        for x, y in itertools.product(range(5), repeat=2):
            expected["match"][n, k] += draft[x] * target[y] * (x == y)
        for x in range(5):
            expected["overlap"][n, k] += draft[x] * min(1.0, target[x] / draft[x])
    for name, value in expected.items():
        found = acceptance_probability(p, q, labels, name)
        torch.testing.assert_close(found.float(), value)
    surrogate = acceptance_probability(p, q, labels, "greedy", differentiable=True)
    assert torch.equal(surrogate, q.gather(-1, labels[..., None])[..., 0])
    total_variation = (p - q).abs().sum(-1) / 2
    torch.testing.assert_close(acceptance_probability(p, q, labels, "overlap"), 1 - total_variation)


def test_gradient_of_the_overlap():
    """d sum min(p, q) / dz = q (1[q<p] - sum q 1[q<p])."""
    p, q, labels = distributions(7)
    logits = q.log().requires_grad_()
    found = acceptance_probability(p, logits.softmax(-1), labels, "overlap", differentiable=True)
    (gradient,) = torch.autograd.grad(found.sum(), logits)
    below = (q < p).double()
    expected = q * (below - (q * below).sum(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=1e-14)


def test_an_unknown_verification_is_named():
    p, q, labels = distributions(0)
    with pytest.raises(ValueError, match="verification=typical: allowed greedy, greedy_match, mat"):
        acceptance_probability(p, q, labels, "typical")


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6), st.sampled_from(["survival", "suffix"]), st.booleans(),
    st.sampled_from([0.0, 0.2]), st.sampled_from([0.0, 0.5]), st.sampled_from([None, 2.0]),
)  # fmt: skip
def test_the_objective_has_the_weights_of_the_definitions(
    seed, position, inclusive, floor, smoothing, gamma
):
    """Sums of logarithms against products of probabilities."""
    a, valid = random_blocks(seed)
    objective = AcceptanceObjective(
        kl_weight=1, position=position, inclusive=inclusive, floor=floor, smoothing=smoothing,
        gamma=gamma,
    )  # fmt: skip
    soft = smoothed(a, smoothing)
    expected = survival_weights(soft, valid, inclusive, floor)
    if position == "suffix":
        expected = suffix_weights(soft, valid).clamp(min=floor) * unbroken(valid)
    expected = expected * decay_weights(4, gamma, torch.float64)
    found = objective.position_weights(a.log().requires_grad_(), valid)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected)
    rewards = objective.block_terms(a.log(), torch.zeros_like(a), valid).reward_N
    torch.testing.assert_close(rewards, expected_accepted_length(soft, valid))


def test_what_is_not_valid_is_not_looked_at():
    """NaN and infinity at invalid slots change neither terms nor gradients."""
    objective = AcceptanceObjective(reward_weight=1, kl_weight=1, ce_weight=1, position="survival")
    log_a = torch.tensor([[-0.5, -0.1, math.nan, -math.inf]], requires_grad=True)
    kl = torch.tensor([[0.3, 0.2, math.inf, math.nan]], requires_grad=True)
    valid = torch.tensor([[True, True, False, False]])
    terms = objective.block_terms(log_a, kl, valid)
    total = terms.reward_N.sum() + terms.kl_N.sum() + terms.ce_N.sum()
    grads = torch.autograd.grad(total, (log_a, kl))
    assert total.isfinite() and all(g.isfinite().all() for g in grads)
    assert not any(g[0, 2:].any() for g in grads) and all(g[0, :2].all() for g in grads)


def test_normaliser_is_the_sum_for_fixed_weights_and_a_bound_for_others():
    a, valid = random_blocks(4, blocks=9)
    fixed = AcceptanceObjective(kl_weight=1, position="decay", gamma=3)
    weights = fixed.position_weights(a.log(), valid)
    assert fixed.normaliser(valid).item() == pytest.approx(weights.sum().item())
    assert weights.sum().item() == pytest.approx((valid * decay_weights(4, 3)).sum().item())
    moving = AcceptanceObjective(kl_weight=1, position="survival")
    assert moving.position_weights(a.log(), valid).sum() < moving.normaliser(valid)
    assert moving.normaliser(valid) == unbroken(valid).sum()


@pytest.mark.parametrize("position", ["uniform", "decay", "survival", "suffix"])
def test_scales_make_means(position):
    """Of blocks with all their slots; reward and KL stay as they are beside each other."""
    gamma = None if position == "uniform" else 3.0
    objective = AcceptanceObjective(
        reward_weight=2.0, kl_weight=3.0, ce_weight=0.5, position=position, gamma=gamma
    )
    torch.manual_seed(0)
    a, kl, valid = torch.rand(5, 4), torch.rand(5, 4), torch.ones(5, 4, dtype=torch.bool)
    terms = objective.block_terms(a.log(), kl, valid)
    normaliser = objective.normaliser(valid)
    scales = objective.scales(4, terms.weight_NK.sum() / normaliser)
    found = {
        "reward_scale": terms.reward_N, "kl_scale": terms.kl_N, "ce_scale": terms.ce_N,
    }  # fmt: skip
    weight = terms.weight_NK.sum()
    expected = {
        "reward_scale": 2.0 * terms.reward_N.mean() / 4,
        "kl_scale": 3.0 * (terms.weight_NK * kl).sum() / weight,
        "ce_scale": 0.5 * (terms.weight_NK * -a.log()).sum() / weight,
    }
    for name, term in found.items():
        mean = scales[name] * term.sum() / normaliser
        assert float(mean) == pytest.approx(float(expected[name]), rel=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "objective: reward_weight, kl_weight, ce_weight are all 0: allowed one above 0"),
        ({"kl_weight": -1.0}, r"objective\.kl_weight=-1\.0: allowed a number of at least 0"),
        ({"kl_weight": math.nan}, r"objective\.kl_weight=nan: allowed"),
        ({"kl_weight": 1, "position": "late"}, r"objective\.position=late: allowed uniform, decay"),
        ({"kl_weight": 1, "verification": "x"}, r"objective\.verification=x: allowed greedy, mat"),
        ({"kl_weight": 1, "floor": 1.5}, r"objective\.floor=1\.5: allowed a number in \[0, 1\]"),
        ({"kl_weight": 1, "smoothing": 1.0}, r"objective\.smoothing=1\.0: allowed .* \[0, 1\)"),
        ({"kl_weight": 1, "temperature": 0.0}, r"objective\.temperature=0\.0: allowed"),
        ({"kl_weight": 1, "gamma": -2}, r"objective\.gamma=-2: allowed null or a number above 0"),
        ({"kl_weight": 1, "gamma": 7}, r"objective\.gamma=7: allowed null with .*=uniform"),
        ({"kl_weight": 1, "position": "decay"}, r"objective\.gamma=None: allowed a number with"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AcceptanceObjective(**options)
