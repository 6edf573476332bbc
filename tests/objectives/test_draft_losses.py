"""Losses of drafts on whole logits: hand numbers, the KL identity, equivalent forms."""

import math

import pytest
import torch

from objectives.acceptance import decay_weights, suffix_weights
from objectives.draft_losses import (
    cross_entropy,
    dpace_loss,
    eal_loss,
    forward_kl,
    kd_loss,
    lk_loss,
    survival_eal_loss,
    weighted_mean,
)


def batch(seed=0, blocks=3, slots=4, vocabulary=6):
    draw = torch.Generator().manual_seed(seed)
    shape = 2, blocks, slots, vocabulary
    logits, teacher = torch.randn(shape, generator=draw, dtype=torch.float64)
    labels = torch.randint(vocabulary, (blocks, slots), generator=draw)
    valid = torch.rand(blocks, slots, generator=draw) < 0.7
    return logits.requires_grad_(), teacher, labels, valid


def gradient(loss, logits):
    return torch.autograd.grad(loss, logits)[0]


def test_kd_by_hand():
    """Two slots, two tokens: p = (3/4, 1/4), q = (1/2, 1/2), then q = p; gamma 2."""
    teacher = torch.tensor([[[3.0, 1.0], [3.0, 1.0]]]).log()
    logits = torch.tensor([[[1.0, 1.0], [3.0, 1.0]]]).log()
    labels, valid = torch.tensor([[0, 1]]), torch.ones(1, 2, dtype=torch.bool)
    kl = 0.75 * math.log(1.5) + 0.25 * math.log(0.5)
    late = math.exp(-1 / 2)
    assert kd_loss(logits, teacher, labels, valid, gamma=2).item() == pytest.approx(
        kl / (1 + late), rel=1e-5
    )
    hard = (math.log(2) + late * math.log(4)) / (1 + late)
    assert kd_loss(logits, teacher, labels, valid, 2, hard=1.0).item() == pytest.approx(hard)
    mixed = kd_loss(logits, teacher, labels, valid, 2, hard=0.25).item()
    assert mixed == pytest.approx(0.75 * kl / (1 + late) + 0.25 * hard, rel=1e-5)
    only_first = torch.tensor([[True, False]])
    assert kd_loss(logits, teacher, labels, only_first).item() == pytest.approx(kl, rel=1e-5)
    assert kd_loss(logits, teacher, labels, ~valid).item() == 0.0


def test_kl_by_one_vector_of_the_target():
    """KL = -H(p) - h.e + logsumexp(W h) with e = W^T p, also with a temperature."""
    draw = torch.Generator().manual_seed(1)
    head = torch.randn(11, 5, generator=draw, dtype=torch.float64)
    h, target = torch.randn(2, 2, 3, 5, generator=draw, dtype=torch.float64)
    for temperature in (1.0, 2.5):
        p = (target @ head.T / temperature).softmax(-1)
        entropy = -(p * p.log()).sum(-1)
        lse = (h @ head.T / temperature).logsumexp(-1)
        expected = lse - (h * (p @ head)).sum(-1) / temperature - entropy
        found = forward_kl(target @ head.T, h @ head.T, temperature)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)


def test_eal_by_hand():
    """a = 1/2, 1/4: EAL = 1/2 + 1/8 tokens of two slots; KL is 0 where the teacher is the draft."""
    logits = torch.tensor([[[1.0, 1.0], [1.0, 3.0]]]).log()
    labels, valid = torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.bool)
    assert eal_loss(logits, logits, labels, valid, 1.0).item() == pytest.approx(-0.625 / 2)
    padded = [torch.cat([x, x]) for x in (logits, labels)]
    both = torch.tensor([[True, True], [False, False]])
    found = eal_loss(padded[0], padded[0], padded[1], both, 1.0).item()
    assert found == pytest.approx(-0.625 / 2), "a padding block counts as none"
    teacher = torch.zeros(1, 2, 2)
    kl = (0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)) / 2  # of the second slot, mean
    found = eal_loss(logits, teacher, labels, valid, 0.3).item()
    assert found == pytest.approx(-0.625 / 2 + 0.3 * kl, rel=1e-5)
    reached = (0.5 * kl * 2) / 1.5  # weights 1 and a_1
    found = survival_eal_loss(logits, teacher, labels, valid, 0.3).item()
    assert found == pytest.approx(-0.625 / 2 + 0.3 * reached, rel=1e-5)


def test_eal_is_likelihood_with_suffix_weights():
    logits, teacher, labels, valid = batch()
    ours = gradient(eal_loss(logits, teacher, labels, valid, 0.0), logits)
    nll = cross_entropy(logits, labels)
    weights = suffix_weights(nll.detach().neg().exp(), valid)
    blocks = valid.any(-1).sum()
    theirs = gradient((weights * nll).sum() / (blocks * 4), logits)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)


def test_dpace_without_smoothing_is_the_length():
    logits, teacher, labels, valid = batch(1)
    blocks = valid.any(-1).sum()
    ours = gradient(dpace_loss(logits, labels, valid, 0.0), logits)
    theirs = gradient(eal_loss(logits, teacher, labels, valid, 0.0), logits) * blocks * 4
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-15)
    smooth = gradient(dpace_loss(logits, labels, valid, 0.5), logits)
    assert not torch.allclose(smooth, ours)


def test_survival_weights_are_detached():
    """With S_0..S_K held fixed the loss has the same gradient."""
    logits, teacher, labels, valid = batch(2)
    whole = torch.ones_like(valid)
    a = cross_entropy(logits, labels).neg().exp().detach()
    reached = torch.cat([torch.ones(3, 1), a.cumprod(-1)[:, :-1]], dim=1)
    expected = weighted_mean(forward_kl(teacher, logits), reached)
    reward = eal_loss(logits, teacher, labels, whole, 0.0)
    ours = survival_eal_loss(logits, teacher, labels, whole, 0.7)
    torch.testing.assert_close(ours, 0.7 * expected + reward)
    torch.testing.assert_close(gradient(ours, logits), gradient(0.7 * expected + reward, logits))


def test_a_certain_floor_is_the_uniform_weight():
    """Floor 1 on unbroken blocks: survival-EAL is EAL; decay enters KD alone."""
    logits, teacher, labels, _ = batch(3)
    valid = torch.ones(3, 4, dtype=torch.bool)
    one = survival_eal_loss(logits, teacher, labels, valid, 0.4, floor=1.0)
    torch.testing.assert_close(one, eal_loss(logits, teacher, labels, valid, 0.4))
    uniform = kd_loss(logits, teacher, labels, valid)
    assert uniform.item() == pytest.approx(forward_kl(teacher, logits).mean().item())
    kl, decay = forward_kl(teacher, logits), decay_weights(4, 2, torch.float64)
    expected = (kl * decay).sum() / (3 * decay.sum())
    torch.testing.assert_close(kd_loss(logits, teacher, labels, valid, 2), expected)


def test_lk_losses():
    """-log alpha has 1/alpha times the gradient of total variation."""
    alpha = torch.tensor([[0.25, 0.5]], dtype=torch.float64, requires_grad=True)
    assert lk_loss(alpha)[0].tolist() == pytest.approx([math.log(4), math.log(2)])
    assert gradient(lk_loss(alpha).sum(), alpha)[0].tolist() == pytest.approx([-4.0, -2.0])
