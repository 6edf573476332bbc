"""Cross-entropies against torch's own, and the one-pass head against autograd."""

import pytest
import torch
import torch.nn.functional as F

from objectives.likelihood import (
    head_cross_entropy,
    masked_cross_entropy,
    row_sums,
    subs_log_probabilities,
)


def make_head(rows=11, features=6, vocabulary=9, dtype=torch.float64):
    """Random head inputs that want gradients."""
    generator = torch.Generator().manual_seed(0)
    tensors = (
        torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((rows, features), (vocabulary, features), (vocabulary,))
    )
    target = torch.randint(0, vocabulary - 1, (rows,), generator=generator)
    weight = torch.rand(rows, generator=generator) * 3
    return *tensors, target, weight


@pytest.mark.parametrize("chunk", [1, 4, 11, 100])
@pytest.mark.parametrize("mask_id", [None, 8])
def test_head_equals_autograd(chunk, mask_id):
    """Loss, per-row losses and all three gradients; rows split into chunks of any size."""
    hidden, weight_VD, bias, target, weight = make_head()
    loss, rows = head_cross_entropy(hidden, weight_VD, bias, target, weight, mask_id, chunk)
    grads = torch.autograd.grad(loss * 0.7, (hidden, weight_VD, bias))

    logits = hidden @ weight_VD.t() + bias
    if mask_id is not None:
        logits = logits.index_fill(1, torch.tensor(mask_id), -torch.inf)
    expected_rows = F.cross_entropy(logits, target, reduction="none")
    expected = (expected_rows * weight).sum()
    expected_grads = torch.autograd.grad(expected * 0.7, (hidden, weight_VD, bias))

    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rows.double(), expected_rows, rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_head_in_bf16_stays_close():
    """Autocast rounds the products; softmax and sums stay fp32, so the loss moves by 1e-2 nats."""
    hidden, weight_VD, bias, target, weight = make_head(64, 32, 50, torch.float32)
    exact, _ = head_cross_entropy(hidden, weight_VD, bias, target, weight, None)
    with torch.autocast("cpu", torch.bfloat16):
        rounded, _ = head_cross_entropy(hidden, weight_VD, bias, target, weight, None)
    assert rounded.dtype == torch.float32
    assert abs(float(rounded - exact)) / float(weight.sum()) < 2e-2


def test_head_without_rows():
    """A batch in which nothing is masked costs nothing and has zero gradients."""
    hidden, weight_VD, bias, target, weight = make_head(rows=0)
    loss, rows = head_cross_entropy(hidden, weight_VD, bias, target, weight, 8)
    loss.backward()
    assert float(loss) == 0 and rows.numel() == 0
    assert not weight_VD.grad.any() and not bias.grad.any()


def test_subs_agrees_with_the_masked_rows():
    """At masked places SUBS is the softmax without the mask token; visible places are certain."""
    logits = torch.randn(2, 5, 7)
    xt = torch.tensor([[0, 6, 2, 6, 4], [6, 6, 6, 1, 0]])
    log_p = subs_log_probabilities(logits, xt, mask_id=6)
    masked = xt == 6
    target = torch.randint(0, 6, (int(masked.sum()),))
    ours = masked_cross_entropy(logits[masked], target, 6)
    torch.testing.assert_close(-log_p[masked].gather(1, target[:, None])[:, 0], ours)
    assert (log_p[masked][:, 6] == -torch.inf).all()
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(2, 5))
    assert (log_p.gather(-1, xt[..., None])[..., 0][~masked] == 0).all()


def test_row_sums():
    """Losses go to their own sequences; a sequence without any gets 0."""
    sums = row_sums(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([0, 2, 0]), 4)
    assert sums.tolist() == [5.0, 0.0, 2.0, 0.0]
