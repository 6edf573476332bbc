"""The fused pass equals autograd on whole logits, for every objective, shape, hole and chunk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from objectives.acceptance import (
    AcceptanceObjective,
    BlockTerms,
    acceptance_probability,
    decay_weights,
    expected_accepted_length,
    smoothed,
    suffix_weights,
    survival_weights,
    unbroken,
)
from objectives.draft_losses import (
    cross_entropy,
    dpace_loss,
    eal_loss,
    forward_kl,
    kd_loss,
    lk_loss,
    survival_eal_loss,
)
from objectives.fused_acceptance import fused_acceptance_loss, teacher_summary
from objectives.slot_losses import Head

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "objective"


class Batch:
    """Blocks over a few target positions; invalid slots hold labels that do not exist."""

    def __init__(self, seed, blocks=3, slots=4, vocabulary=13, features=5, dtype=torch.float64):
        draw = torch.Generator().manual_seed(seed)
        positions = blocks + slots
        self.head = torch.randn(vocabulary, features, generator=draw, dtype=torch.float64).to(dtype)
        self.target = torch.randn(positions, features, generator=draw, dtype=torch.float64).to(
            dtype
        )
        self.hidden = torch.randn(blocks, slots, features, generator=draw, dtype=torch.float64)
        self.hidden = self.hidden.to(dtype).requires_grad_()
        self.valid = torch.rand(blocks, slots, generator=draw) < 0.75
        self.valid[0, 0] = True
        if blocks > 1:
            self.valid[-1] = False
        labels = torch.randint(vocabulary, (blocks, slots), generator=draw)
        self.labels = torch.where(self.valid, labels, -100)
        index = torch.arange(blocks)[:, None] + torch.arange(slots)
        self.index = torch.where(self.valid, index, -1)
        self.safe = self.labels.clamp(min=0), self.index.clamp(min=0)

    def teacher(self, whole, temperature=1.0):
        """Arguments that describe the teacher."""
        if whole:
            return {"teacher_index_NK": self.index, "teacher_hidden_UD": self.target}
        e, entropy = teacher_summary(self.target, self.head, temperature)
        return {"teacher_index_NK": self.index, "expected_UD": e, "entropy_U": entropy}

    def fused(self, objective, whole=False, **options):
        teacher = self.teacher(whole, objective.temperature)
        return fused_acceptance_loss(
            self.hidden, self.head, self.labels, self.valid, objective=objective,
            **(teacher | options),
        )  # fmt: skip

    def logits(self):
        """Draft's and teacher's of every slot."""
        return self.hidden @ self.head.T, self.target[self.safe[1]] @ self.head.T


def definition(batch, objective):
    """Loss by probabilities and whole logits; weights by the functions of the definition."""
    logits, teacher = batch.logits()
    labels, valid = batch.safe[0], batch.valid
    a = acceptance_probability(
        teacher.softmax(-1), logits.softmax(-1), labels, objective.verification, differentiable=True
    )
    soft = smoothed(a, objective.smoothing)
    fixed = soft.detach()
    weights = {
        "uniform": valid.double(),
        "decay": valid.double(),
        "survival": survival_weights(fixed, valid, objective.inclusive, objective.floor),
        "suffix": suffix_weights(fixed, valid).clamp(min=objective.floor) * unbroken(valid),
    }[objective.position] * decay_weights(valid.shape[1], objective.gamma, a.dtype)
    kl = forward_kl(teacher, logits, objective.temperature)
    reward = objective.reward_weight * expected_accepted_length(soft, valid)
    slots = objective.kl_weight * kl - objective.ce_weight * a.log()
    loss_N = (weights * slots).sum(-1) - reward
    exact = expected_accepted_length(a, valid).sum()
    return loss_N, weights.sum(), exact, (kl * valid).sum()


positions = st.sampled_from([("uniform", None), ("decay", 3.0), ("survival", None),
                             ("survival", 2.0), ("suffix", None)])  # fmt: skip
weights = st.sampled_from([0.0, 0.3, 1.0])


@settings(deadline=None, max_examples=150)
@given(
    st.integers(0, 10**6), st.integers(1, 4), st.integers(1, 5), positions,
    st.tuples(weights, weights, weights).filter(any), st.booleans(), st.sampled_from([0.0, 0.2]),
    st.sampled_from([0.0, 0.5]), st.sampled_from(["greedy", "match", "overlap"]),
    st.sampled_from([1.0, 2.0]), st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_equals_the_definition(
    seed, blocks, slots, position, weight, inclusive, floor, smoothing, verification, temperature,
    chunk, whole,
):  # fmt: skip
    """fp64, values and gradients, with holes and a padding block, the teacher in both forms."""
    batch = Batch(seed, blocks, slots)
    objective = AcceptanceObjective(
        *weight, *position, inclusive, floor, smoothing, verification, temperature
    )
    found = batch.fused(objective, whole or verification != "greedy", chunk=chunk)
    loss_N, weight_sum, length, kl = definition(batch, objective)
    close = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(found.block_loss_N, loss_N.detach(), **close)
    torch.testing.assert_close(found.loss, loss_N.sum(), **close)
    torch.testing.assert_close(found.weight, weight_sum, **close)
    torch.testing.assert_close(found.expected_length, length.detach(), **close)
    torch.testing.assert_close(found.kl, kl.detach(), **close)
    ours, theirs = (torch.autograd.grad(x.sum(), batch.hidden)[0] for x in (found.loss, loss_N))
    torch.testing.assert_close(ours, theirs, **close)


def named(name, **changes):
    """An objective of configs/objective."""
    config = {}
    while name:
        above = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"))
        config = above | config
        name = above.get("defaults", [None])[0]
        config.pop("defaults", None)
    for key in ("name", "_target_"):
        config.pop(key)
    return AcceptanceObjective(**(config | changes))


def means(batch, objective):
    """The scales of a batch that is all there is."""
    blocks, slots = batch.valid.any(-1).sum().item() or 1, batch.valid.shape[1]
    weight = objective.normaliser(batch.valid).item() or 1
    return {
        "reward_scale": objective.reward_weight / (blocks * slots),
        "kl_scale": objective.kl_weight / weight,
        "ce_scale": objective.ce_weight / weight,
    }


def test_configured_objectives_are_the_losses_they_are_named_after():
    batch = Batch(5)
    logits, teacher = batch.logits()
    labels, valid = batch.safe[0], batch.valid
    alpha = acceptance_probability(teacher.softmax(-1), logits.softmax(-1), labels, "overlap")
    decay = valid * decay_weights(4, 7.0, torch.float64)
    expected = {
        "kd": kd_loss(logits, teacher, labels, valid, 7.0),
        "ce": kd_loss(logits, teacher, labels, valid, 7.0, hard=1.0),
        "eal": eal_loss(logits, teacher, labels, valid, 1.0),
        "overlap": (decay * lk_loss(alpha)).sum() / decay.sum(),
    }
    for name, value in expected.items():
        objective = named(name)
        found = batch.fused(objective, objective.needs_distribution, **means(batch, objective))
        torch.testing.assert_close(found.loss, value)
        pair = [torch.autograd.grad(x, batch.hidden, retain_graph=True)[0]
                for x in (found.loss, value)]  # fmt: skip
        torch.testing.assert_close(*pair)
    found = batch.fused(named("dpace"))
    torch.testing.assert_close(found.loss, dpace_loss(logits, labels, valid, 0.5))


@pytest.mark.parametrize("options", [{}, {"inclusive": True, "floor": 0.1, "smoothing": 0.25}])
def test_survival_weights_can_divide_their_own_sum(options):
    """`terms` stay differentiable apart, for a denominator that is known only afterwards."""
    batch = Batch(6)
    found = batch.fused(named("survival_eal", **options))
    blocks, slots = found.blocks, batch.valid.shape[1]
    ours = 0.4 * found.terms.kl_N.sum() / found.weight
    ours = ours - found.terms.reward_N.sum() / (blocks * slots)
    theirs = survival_eal_loss(*batch.logits(), batch.safe[0], batch.valid, 0.4, **options)
    torch.testing.assert_close(ours, theirs)
    pair = [torch.autograd.grad(x, batch.hidden)[0] for x in (ours, theirs)]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("verification", ["greedy", "match", "overlap"])
def test_gradcheck(verification):
    """Numerical derivatives of all terms at once, under weights that do not follow the draft."""
    batch = Batch(8, blocks=2, slots=3, vocabulary=7, features=3)
    objective = AcceptanceObjective(
        0.7, 0.4, 0.3, "decay", 2.0, verification=verification, smoothing=0.1, temperature=1.5
    )
    scales = [torch.tensor(x, dtype=torch.float64) for x in (0.3, 0.2, 0.1)]

    def loss(hidden):
        batch.hidden = hidden
        names = ("reward_scale", "kl_scale", "ce_scale")
        return batch.fused(objective, True, **dict(zip(names, scales, strict=True))).loss

    assert torch.autograd.gradcheck(loss, (batch.hidden,))


def test_sums_by_counting():
    batch = Batch(9, blocks=6)
    found = batch.fused(named("kd"))
    logits, _ = batch.logits()
    assert found.slots == batch.valid.sum() > 6
    assert found.blocks == sum(True in row for row in batch.valid.tolist()) > 2
    assert torch.equal(found.hits_NK, (logits.argmax(-1) == batch.labels) & batch.valid)
    nll = cross_entropy(logits, batch.safe[0])
    torch.testing.assert_close(found.ce, nll[batch.valid].sum().detach())
    assert found.loss.requires_grad and not found.weight.requires_grad
    assert not found.block_loss_N.requires_grad and not found.expected_length.requires_grad


@pytest.mark.parametrize("name", ["kd", "survival_eal", "dpace", "overlap"])
def test_parts_of_a_batch_add_up(name):
    """However the blocks are cut, with scales of the whole: loss, sums and gradients."""
    batch, objective = Batch(10, blocks=6), named(name)
    scales = means(batch, objective)
    whole = batch.fused(objective, True, **scales)
    parts = []
    for rows in (slice(0, 1), slice(1, 4), slice(4, 6)):
        parts.append(
            fused_acceptance_loss(
                batch.hidden[rows], batch.head, batch.labels[rows], batch.valid[rows],
                objective=objective, teacher_index_NK=batch.index[rows],
                teacher_hidden_UD=batch.target, **scales,
            )
        )  # fmt: skip
    for key in ("loss", "blocks", "slots", "weight", "expected_length", "kl", "ce"):
        total = sum(getattr(part, key) for part in parts)
        torch.testing.assert_close(total, getattr(whole, key))
    pair = [torch.autograd.grad(x, batch.hidden)[0]
            for x in (whole.loss, sum(part.loss for part in parts))]  # fmt: skip
    torch.testing.assert_close(*pair)


def test_both_forms_of_the_teacher_agree():
    batch, objective = Batch(11), named("survival_eal", temperature=1.7)
    one, two = (batch.fused(objective, whole) for whole in (False, True))
    torch.testing.assert_close(one.loss, two.loss)
    torch.testing.assert_close(one.kl, two.kl)


def test_summary_of_the_teacher():
    """e = W^T p and H(p) by the definition; a head of more positions than a chunk."""
    batch = Batch(12)
    for temperature in (1.0, 0.6):
        p = (batch.target @ batch.head.T / temperature).softmax(-1)
        e, entropy = teacher_summary(batch.target, batch.head, temperature, chunk=2)
        torch.testing.assert_close(e, p @ batch.head)
        torch.testing.assert_close(entropy, -(p * p.log()).sum(-1))
    assert not e.requires_grad


def test_rows_beyond_the_valid_ones_change_nothing():
    """Padding to a bucket, even where the last slot holds what must not be looked at."""
    batch, objective = Batch(13), named("survival_eal")
    batch.hidden.data[-1] = torch.nan
    exact = batch.fused(objective)
    padded = batch.fused(objective, rows=int(batch.valid.sum()) + 3)
    torch.testing.assert_close(padded.loss, exact.loss)
    assert torch.equal(padded.hits_NK, exact.hits_NK)
    pair = [torch.autograd.grad(x.loss, batch.hidden)[0] for x in (exact, padded)]
    torch.testing.assert_close(*pair)
    assert not pair[1][-1].any()
    with pytest.raises(RuntimeError, match="more than rows=2 valid slots"):
        batch.fused(objective, rows=2)


def test_a_batch_without_slots():
    batch = Batch(14)
    batch.valid[:] = False
    found = batch.fused(named("survival_eal"), **means(batch, named("survival_eal")))
    assert found.loss == 0.0 and found.slots == 0 and found.blocks == 0
    assert not torch.autograd.grad(found.loss, batch.hidden)[0].any()


@pytest.mark.parametrize("name", ["kd", "survival_eal", "overlap"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bf16_is_close(name, autocast):
    """bf16 logits, sums in fp32: near the fp64 loss and gradient of the same rounded numbers."""
    low = Batch(15, blocks=9, vocabulary=97, features=32, dtype=torch.bfloat16)
    high = Batch(15, blocks=9, vocabulary=97, features=32, dtype=torch.bfloat16)
    for key in ("head", "target", "hidden"):
        scale = 0.3 if key == "head" else 1.0
        value = (getattr(low, key).detach() * scale).bfloat16()
        setattr(high, key, value.double())
        setattr(low, key, value.float() if autocast else value)
    low.hidden.requires_grad_()
    high.hidden.requires_grad_()
    objective = named(name)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        ours = low.fused(objective, objective.needs_distribution)
    theirs = high.fused(objective, objective.needs_distribution)
    assert ours.loss.dtype == torch.float32
    torch.testing.assert_close(ours.loss.double(), theirs.loss, rtol=5e-3, atol=0.0)
    grads = [
        torch.autograd.grad(x.loss, y.hidden)[0].double() for x, y in ((ours, low), (theirs, high))
    ]
    assert (grads[0] - grads[1]).norm() < 1e-2 * grads[1].norm()


def test_nothing_is_kept_where_nothing_is_learnt():
    """Evaluation has the same sums; a term that the objective leaves out has no gradient."""
    batch = Batch(16)
    with torch.no_grad():
        quiet = batch.fused(named("eal"))
    loud = batch.fused(named("eal"))
    torch.testing.assert_close(quiet.loss, loud.loss.detach())
    assert not quiet.loss.requires_grad
    found = batch.fused(named("kd"))
    assert found.terms.kl_N.requires_grad and not found.terms.reward_N.requires_grad
    hard = batch.fused(named("ce"), teacher_index_NK=None, expected_UD=None, entropy_U=None)
    assert hard.kl is None and not hard.terms.kl_N.requires_grad


@pytest.mark.parametrize(
    ("name", "whole", "projected", "returned"),
    [("kd", False, 0, 1), ("survival_eal", False, 0, 1), ("ce", True, 1, 1),
     ("survival_eal", True, 1, 2), ("overlap", True, 1, 1)],
)  # fmt: skip
def test_what_goes_through_the_head(name, whole, projected, returned, monkeypatch):
    """The valid slots once, every target position they share once; back only what is learnt."""
    batch, counts = Batch(20, blocks=8), {"logits": 0, "features": 0}
    teacher = batch.teacher(whole)
    for key in counts:
        product = getattr(Head, key)

        def counted(self, x, *more, key=key, product=product, **named):
            counts[key] += len(x)
            return product(self, x, *more, **named)

        monkeypatch.setattr(Head, key, counted)
    slots = int(batch.valid.sum())
    positions = len(batch.index[batch.valid].unique())
    assert positions < slots < batch.valid.numel()
    for learning in (True, False):
        counts.update(logits=0, features=0)
        with torch.set_grad_enabled(learning):
            fused_acceptance_loss(
                batch.hidden, batch.head, batch.labels, batch.valid, objective=named(name),
                **teacher,
            )  # fmt: skip
        assert counts["logits"] == slots + projected * positions
        assert counts["features"] == (returned * slots if learning else 0)


def lk_hybrid(alpha, kl):
    """l KL + (1 - l) (1 - alpha) with detached l = exp(-3 alpha) (arXiv 2602.23881)."""
    share = torch.exp(-3.0 * alpha.detach())
    return share * kl + (1.0 - share) * (1.0 - alpha)


class Hybrid(AcceptanceObjective):
    """A rule of one's own: the LK hybrid, uniform over slots."""

    def block_terms(self, log_a_NK, kl_NK, valid_NK):
        terms = super().block_terms(log_a_NK, kl_NK, valid_NK)
        loss_NK = torch.where(valid_NK, lk_hybrid(log_a_NK.exp(), kl_NK), 0.0)
        return BlockTerms(torch.zeros_like(terms.reward_N), *[loss_NK.sum(-1)] * 2, terms.weight_NK)


def test_another_rule_is_a_subclass():
    batch = Batch(17)
    objective = Hybrid(kl_weight=1.0, ce_weight=1e-9, verification="overlap")
    found = batch.fused(objective, whole=True, ce_scale=0.0)
    logits, teacher = batch.logits()
    alpha = torch.minimum(teacher.softmax(-1), logits.softmax(-1)).sum(-1)
    expected = (lk_hybrid(alpha, forward_kl(teacher, logits)) * batch.valid).sum()
    torch.testing.assert_close(found.loss, expected)
    pair = [torch.autograd.grad(x, batch.hidden)[0] for x in (found.loss, expected)]
    torch.testing.assert_close(*pair)


def test_what_does_not_fit_is_named():
    batch = Batch(18)
    kd, none = named("kd"), {"teacher_index_NK": None, "expected_UD": None, "entropy_U": None}
    with pytest.raises(ValueError, match=r"objective\.kl_weight=1\.0: needs a teacher"):
        batch.fused(kd, **none)
    with pytest.raises(ValueError, match=r"objective\.verification=overlap: needs teacher_hidden"):
        batch.fused(named("overlap"))
    with pytest.raises(ValueError, match="allowed one of them"):
        batch.fused(kd, teacher_hidden_UD=batch.target)
    with pytest.raises(ValueError, match="go together"):
        batch.fused(kd, entropy_U=None)
    with pytest.raises(ValueError, match="teacher_index_NK goes with"):
        batch.fused(kd, teacher_index_NK=None)
    batch.head.requires_grad_()
    with pytest.raises(ValueError, match="freeze it"):
        batch.fused(kd)


def test_the_reading_of_temperature():
    """KL of both softened distributions; acceptance keeps the plain one."""
    batch = Batch(19)
    plain, warm = named("eal"), replace(named("eal"), temperature=2.0)
    one, two = batch.fused(plain), batch.fused(warm)
    torch.testing.assert_close(one.expected_length, two.expected_length)
    assert two.kl < one.kl
