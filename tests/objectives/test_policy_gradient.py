"""The clipped policy gradient: each choice by hand, against plain Python, added up in parts."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.policy_gradient import (
    AGGREGATIONS,
    LEVELS,
    importance_correction,
    k3,
    policy_loss,
)

SEED = {"ratio": "sequence", "aggregation": "sequence_mean", "kl_level": "sequence"}
PAPER = {"ratio": "token", "aggregation": "constant", "kl_level": "token"}
DEFAULTS = {"longest": 4, "clip_low": 0.2, "clip_high": 0.2, "kl_coefficient": 0.0}


def log(*values):
    return torch.tensor(values, dtype=torch.float64).log()


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def terms(ratios, advantages, lengths, **options):
    """Terms and gradient of log pi: `ratios` are of tokens, the old policy gives each a half."""
    old = log(0.5).expand(sum(lengths))
    logp = (old + log(*ratios)).requires_grad_()
    sequence = torch.tensor([n for n, length in enumerate(lengths) for _ in range(length)])
    counts = options.pop("counts", torch.ones(len(lengths), dtype=torch.bool))
    reference = options.pop("reference", None)
    found = policy_loss(
        logp, old, reference, sequence, tensor(*advantages), counts,
        **{**PAPER, **DEFAULTS, **options},
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(found.loss, logp)
    return found, gradient.tolist()


def test_token_ratios_and_both_clips():
    """A > 0 is held above 1.3, A < 0 below 0.8; the other side of each stays free."""
    found, gradient = terms(
        [1.1, 1.5, 0.5, 1.5, 0.5, 0.9], [2.0, -1.0], [3, 3], clip_low=0.2, clip_high=0.3
    )
    loss = [-2.0 * (1.1 + 1.3 + 0.5), 1.0 * (1.5 + 0.8 + 0.9)]
    assert found.loss_N.tolist() == pytest.approx(loss)
    assert found.loss.item() == pytest.approx(sum(loss))
    assert gradient == pytest.approx([-2.2, 0.0, -1.0, 1.5, 0.0, 0.9])
    assert (found.clipped, found.ratios) == (2, 6)
    means = [(1.1 * 1.5 * 0.5) ** (1 / 3), (1.5 * 0.5 * 0.9) ** (1 / 3)]
    assert found.ratio_N.tolist() == pytest.approx(means)


def test_sequence_ratios_and_both_clips():
    """Ratios 1.21 (held for A > 0), 0.5 (held for A < 0) and 1.1 are geometric means of tokens."""
    found, gradient = terms(
        [1.1**3, 1.1, 0.25, 1.0, 1.1], [3.0, -2.0, 1.0], [2, 2, 1], **SEED
    )  # fmt: skip
    assert found.ratio_N.tolist() == pytest.approx([1.21, 0.5, 1.1])
    assert found.loss_N.tolist() == pytest.approx([-3.0 * 1.2, 2.0 * 0.8, -1.1])
    assert gradient == pytest.approx([0.0, 0.0, 0.0, 0.0, -1.1])
    assert (found.clipped, found.ratios, found.weight) == (2, 3, 3)
    _, free = terms([1.1**3, 1.1, 0.25, 1.0, 1.1], [-3.0, 2.0, 1.0], [2, 2, 1], **SEED)
    assert free == pytest.approx([3 * 1.21 / 2] * 2 + [-2 * 0.5 / 2] * 2 + [-1.1])


@pytest.mark.parametrize(
    ("aggregation", "loss", "weight"),
    [
        ("sequence_mean", [-1.0, 2.0], 2),
        ("constant", [-3.0, 2.0], 8),
        ("token_mean", [-3.0, 2.0], 4),
    ],
)
def test_aggregations(aggregation, loss, weight):
    """Three tokens with A = 1, one with A = -2; at most four tokens."""
    found, gradient = terms([1.0] * 4, [1.0, -2.0], [3, 1], aggregation=aggregation)
    assert found.loss_N.tolist() == pytest.approx(loss)
    assert found.weight == weight
    assert gradient == pytest.approx([loss[0] / 3] * 3 + [loss[1]])
    both, _ = terms([1.0] * 4, [1.0, -2.0], [3, 1], aggregation=aggregation, ratio="sequence")
    assert both.loss_N.tolist() == pytest.approx(loss), "the surrogate stands at each token"


def test_k3_of_tokens_and_sequences():
    """Reference 2 and 1/2 times as likely: k3 = 1 - ln 2 and ln 2 - 1/2, of the mean 0."""
    reference = log(1.0, 0.25, 1.0)
    found, gradient = terms(
        [1.0] * 3, [0.0, 0.0], [2, 1], kl_coefficient=0.1, reference=reference, kl_level="token"
    )
    tokens = [1.0 - math.log(2), math.log(2) - 0.5, 1.0 - math.log(2)]
    assert k3(reference - log(0.5)).tolist() == pytest.approx(tokens)
    assert found.loss_N.tolist() == pytest.approx([0.1 * sum(tokens[:2]), 0.1 * tokens[2]])
    assert found.kl_N.tolist() == pytest.approx([0.25, tokens[2]])
    assert gradient == pytest.approx([0.1 * (1 - 2), 0.1 * (1 - 0.5), 0.1 * (1 - 2)])
    found, gradient = terms(
        [1.0] * 3, [0.0, 0.0], [2, 1], kl_coefficient=0.1, reference=reference, **SEED
    )
    assert found.loss_N.tolist() == pytest.approx([0.0, 0.1 * tokens[2]])
    assert found.kl_N.tolist() == pytest.approx([0.25, tokens[2]]), "reported by token as ever"
    assert gradient == pytest.approx([0.0, 0.0, -0.1])


def test_kl_may_leave_sequences_out():
    """The weight stays that of the sequences whose policy term counts."""
    options = {"kl_coefficient": 0.5, "reference": log(1.0, 1.0), "aggregation": "sequence_mean"}
    kl = 0.5 * (1.0 - math.log(2))
    found, gradient = terms([1.0] * 2, [1.0, 0.0], [1, 1], **options)
    assert found.loss_N.tolist() == pytest.approx([-1.0 + kl, kl])
    found, gradient = terms(
        [1.0] * 2, [1.0, 0.0], [1, 1], kl_counts_N=torch.tensor([True, False]), **options
    )
    assert found.loss_N.tolist() == pytest.approx([-1.0 + kl, 0.0]) and found.weight == 2
    assert gradient == pytest.approx([-1.0 - 0.5, 0.0])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_what_does_not_count_cannot_harm(level, aggregation):
    """Infinities at the tokens of another sequence, nan as its advantage."""
    shared = {"ratio": level, "kl_level": level, "aggregation": aggregation, "kl_coefficient": 0.1}
    alone, expected = terms([1.1, 0.9], [1.0], [2], reference=log(0.4, 0.6), **shared)
    found, gradient = terms(
        [1.1, 0.9, math.inf, 0.0], [1.0, math.nan], [2, 2], reference=log(0.4, 0.6, 0.0, 1.0),
        counts=torch.tensor([True, False]), correction_P=tensor(1.0, 1.0, math.nan, math.inf),
        **shared,
    )  # fmt: skip
    assert gradient == pytest.approx([*expected, 0.0, 0.0])
    for name in ("loss", "weight", "clipped", "ratios"):
        assert getattr(found, name).item() == pytest.approx(getattr(alone, name).item()), name


@pytest.mark.parametrize(
    ("aggregation", "weight"), [("sequence_mean", 2), ("constant", 8), ("token_mean", 2)]
)
@pytest.mark.parametrize("level", LEVELS)
def test_sequences_without_tokens_were_sampled(level, aggregation, weight):
    found, gradient = terms(
        [1.1, 1.1], [1.0, 5.0], [2, 0], ratio=level, aggregation=aggregation, kl_level=level
    )
    assert found.loss_N[1] == 0.0 and found.weight == weight
    assert found.ratio_N[1] == 1.0 and found.kl_N[1] == 0.0
    assert found.ratios == (2 if level == "token" else 1)
    assert all(map(math.isfinite, gradient))


def test_importance_correction_by_hand():
    """Token weights 2, 1/2, 3; sums of the sequences 1 and 3; the cap 1.5 cuts two of three."""
    trainer, sampler = log(0.8, 0.2, 0.6), log(0.4, 0.4, 0.2)
    sequence = torch.tensor([0, 0, 1])
    weight, cut = importance_correction(trainer, sampler, sequence, 2, "token", 1.5)
    assert weight.tolist() == pytest.approx([1.5, 0.5, 1.5]) and cut == pytest.approx(2 / 3)
    weight, cut = importance_correction(trainer, sampler, sequence, 3, "sequence", 1.5)
    assert weight.tolist() == pytest.approx([1.0, 1.0, 1.5]) and cut == pytest.approx(1 / 2)
    weight, cut = importance_correction(trainer + 900, sampler, sequence, 2, "token", 4.0)
    assert weight.tolist() == [4.0] * 3 and cut == 1.0
    empty = importance_correction(trainer[:0], sampler[:0], sequence[:0], 2, "sequence", 2.0)
    assert empty.cut == 0.0
    leaf = trainer.clone().requires_grad_()
    weight, _ = importance_correction(leaf, sampler, sequence, 2, "token", 2.0)
    assert not weight.requires_grad


def test_correction_weighs_the_surrogate_alone():
    reference = log(1.0, 1.0)
    plain, _ = terms([1.0] * 2, [1.0], [2], kl_coefficient=0.1, reference=reference)
    found, gradient = terms(
        [1.0] * 2, [1.0], [2], kl_coefficient=0.1, reference=reference,
        correction_P=tensor(0.5, 3.0),
    )  # fmt: skip
    assert (found.loss - plain.loss).item() == pytest.approx(-(0.5 + 3.0) + 2.0)
    assert gradient == pytest.approx([-0.5 - 0.1, -3.0 - 0.1])


def test_no_gradient_flows_into_what_was_given():
    leaves = [torch.randn(3, dtype=torch.float64, requires_grad=True) for _ in range(4)]
    logp, old, reference, correction = leaves
    advantage = torch.ones(1, dtype=torch.float64, requires_grad=True)
    found = policy_loss(
        logp, old, reference, torch.zeros(3, dtype=torch.long), advantage, torch.tensor([True]),
        **{**PAPER, **DEFAULTS, "kl_coefficient": 0.1}, correction_P=correction,
    )  # fmt: skip
    found.loss.backward()
    assert logp.grad is not None
    assert all(leaf.grad is None for leaf in (old, reference, correction, advantage))
    assert not any(value.requires_grad for value in found[1:])


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("ratio", "ratio=x: allowed token, sequence"),
        ("aggregation", "aggregation=x: allowed sequence_mean, constant, token_mean"),
        ("kl_level", "kl_level=x: allowed token, sequence"),
    ],
)
def test_unknown_names_are_refused(key, message):
    with pytest.raises(ValueError, match=message):
        terms([1.0], [1.0], [1], **{key: "x"})


def test_unknown_levels_of_correction_are_refused():
    with pytest.raises(ValueError, match="level=mean: allowed token, sequence"):
        importance_correction(log(0.5), log(0.5), torch.tensor([0]), 1, "mean", 2.0)


def random_batch(lengths, seed):
    """Arguments of `policy_loss`; ratios far enough from 1 that clips hold."""
    draw = torch.Generator().manual_seed(seed)
    tokens, number = sum(lengths), len(lengths)
    logp, old, reference = -torch.rand(3, tokens, generator=draw, dtype=torch.float64) * 2
    sequence = torch.repeat_interleave(torch.arange(number), torch.tensor(lengths))
    advantage = torch.randn(number, generator=draw, dtype=torch.float64)
    counts, kl_counts = torch.rand(2, number, generator=draw) < 0.7
    correction = torch.rand(tokens, generator=draw, dtype=torch.float64) * 2
    order = torch.randperm(tokens, generator=draw)  # tokens need not lie together
    leaf = logp[order].requires_grad_()
    given_arguments = leaf, old[order], reference[order], sequence[order], advantage, counts
    return given_arguments, {"kl_counts_N": kl_counts, "correction_P": correction[order]}


def slow(arguments, extra, ratio, aggregation, kl_level):
    """Sum and weight, sequence by sequence and token by token."""
    logp, old, reference, sequence, advantage, counts = arguments
    total, weight = 0.0, 0.0
    for n in range(len(counts)):
        mine = [p for p in range(len(logp)) if sequence[p] == n]
        if counts[n]:
            weight += {"sequence_mean": 1, "constant": 4, "token_mean": len(mine)}[aggregation]
        share = len(mine) if aggregation == "sequence_mean" else 1
        for p in mine:
            used = mine if ratio == "sequence" else [p]
            rho = torch.exp(sum(logp[q] - old[q] for q in used) / len(used))
            value = rho * advantage[n]
            value = torch.minimum(value, rho.clamp(0.8, 1.3) * advantage[n])
            if counts[n]:
                total = total - value * extra["correction_P"][p] / share
            used = mine if kl_level == "sequence" else [p]
            d = sum(reference[q] - logp[q] for q in used) / len(used)
            if extra["kl_counts_N"][n]:
                total = total + 0.3 * (torch.exp(d) - d - 1) / share
    return total, weight


CHOICES = list(itertools.product(LEVELS, AGGREGATIONS, LEVELS))


@pytest.mark.parametrize("choice", CHOICES, ids="-".join)
def test_against_plain_python(choice):
    names = dict(zip(("ratio", "aggregation", "kl_level"), choice, strict=True))
    options = {"longest": 4, "clip_low": 0.2, "clip_high": 0.3, "kl_coefficient": 0.3, **names}
    arguments, extra = random_batch([3, 1, 0, 4, 2, 4], seed=1)
    found = policy_loss(*arguments, **options, **extra)
    total, weight = slow(arguments, extra, **names)
    assert found.loss.item() == pytest.approx(total.item(), rel=1e-12)
    assert found.weight.item() == weight and found.clipped > 0
    ours, theirs = (torch.autograd.grad(x, arguments[0])[0] for x in (found.loss, total))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=6), st.integers(1, 5),
    st.integers(0, 1000), st.sampled_from(CHOICES),
)  # fmt: skip
def test_parts_add_up_to_the_whole(lengths, cut, seed, choice):
    """So the loss of a global batch does not depend on how it is dealt to ranks and steps."""
    cut = min(cut, len(lengths) - 1)
    names = dict(zip(("ratio", "aggregation", "kl_level"), choice, strict=True))
    options = {"longest": 4, "clip_low": 0.2, "clip_high": 0.3, "kl_coefficient": 0.3, **names}
    arguments, extra = random_batch(lengths, seed)
    whole = policy_loss(*arguments, **options, **extra)
    parts = []
    sequence = arguments[3]
    for inside, first, last in ((sequence < cut, 0, cut), (sequence >= cut, cut, len(lengths))):
        own = [x[inside] for x in arguments[:4]]
        own[3] = own[3] - first
        own += [x[first:last] for x in arguments[4:]]
        kl_counts, correction = extra["kl_counts_N"][first:last], extra["correction_P"][inside]
        parts.append(
            policy_loss(*own, **options, kl_counts_N=kl_counts, correction_P=correction)
        )  # fmt: skip
    for name in ("loss", "weight", "clipped", "ratios"):
        total = sum(getattr(part, name) for part in parts)
        torch.testing.assert_close(getattr(whole, name), total, rtol=1e-12, atol=1e-12)
    for name in ("loss_N", "kl_N", "ratio_N"):
        joined = torch.cat([getattr(part, name) for part in parts])
        torch.testing.assert_close(getattr(whole, name), joined, rtol=1e-12, atol=1e-12)
