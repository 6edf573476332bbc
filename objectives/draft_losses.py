"""The losses of speculative drafts on whole logits: slow, clear, what the fast ones must equal.

Every function takes the draft's logits and, where it distils, the teacher's, [N, K, V] each; in
training no such tensor exists (`objectives/fused_acceptance.py`). The formulas around S, EAL and
the weights are in `objectives/acceptance.py`.

Legend: N blocks, K predicted slots of a block, V vocabulary. Losses are in nats.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.acceptance import (
    decay_weights,
    dpace_weights,
    expected_accepted_length,
    label_probability,
    smoothed,
    survival_weights,
)


def cross_entropy(
    logits_NKV: Float[Tensor, "N K V"], labels_NK: Int[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """-log q(y) of every slot."""
    return -label_probability(logits_NKV, logits_NKV.log_softmax(-1), labels_NK)


def forward_kl(
    teacher_NKV: Float[Tensor, "N K V"],
    logits_NKV: Float[Tensor, "N K V"],
    temperature: float | int = 1.0,
) -> Float[Tensor, "N K"]:
    """KL(p || q) of every slot over the whole vocabulary, both logits divided by `temperature`."""
    log_p_NKV = (teacher_NKV / temperature).log_softmax(-1)
    log_q_NKV = (logits_NKV / temperature).log_softmax(-1)
    return (log_p_NKV.exp() * (log_p_NKV - log_q_NKV)).sum(-1)


def weighted_mean(
    loss_NK: Float[Tensor, "N K"], weight_NK: Float[Tensor, "N K"]
) -> Float[Tensor, ""]:
    """sum w l / sum w over all slots; 0 where no slot has weight, which need not be finite."""
    kept_NK = loss_NK.masked_fill(weight_NK == 0, 0.0)
    total = weight_NK.sum()
    return (weight_NK * kept_NK).sum() / torch.where(total > 0, total, 1.0)


def kd_loss(
    logits_NKV: Float[Tensor, "N K V"],
    teacher_NKV: Float[Tensor, "N K V"],
    labels_NK: Int[Tensor, "N K"],
    valid_NK: Bool[Tensor, "N K"],
    gamma: float | int | None = None,
    hard: float | int = 0.0,
    temperature: float | int = 1.0,
) -> Float[Tensor, ""]:
    """sum m w ((1 - hard) KL + hard CE) / sum m w with w the decay; hard = 1 is plain CE.

    Every valid slot counts, also one behind a hole.
    """
    loss_NK = (1.0 - hard) * forward_kl(teacher_NKV, logits_NKV, temperature)
    loss_NK = loss_NK + hard * cross_entropy(logits_NKV, labels_NK)
    weight_K = decay_weights(valid_NK.shape[1], gamma, logits_NKV.dtype, logits_NKV.device)
    return weighted_mean(loss_NK, valid_NK * weight_K)


def _length_reward(a_NK: Tensor, valid_NK: Tensor) -> Tensor:
    """Mean over the blocks that have a valid slot of EAL / K."""
    blocks = valid_NK.any(-1).sum().clamp(min=1)
    return expected_accepted_length(a_NK, valid_NK).sum() / (blocks * valid_NK.shape[1])


def eal_loss(
    logits_NKV: Float[Tensor, "N K V"],
    teacher_NKV: Float[Tensor, "N K V"],
    labels_NK: Int[Tensor, "N K"],
    valid_NK: Bool[Tensor, "N K"],
    kl_weight: float | int,
) -> Float[Tensor, ""]:
    """-mean EAL / K + kl_weight mean KL, the KL uniform over slots, a = q(y)."""
    a_NK = cross_entropy(logits_NKV, labels_NK).neg().exp()
    kl_NK = forward_kl(teacher_NKV, logits_NKV)
    kl = weighted_mean(kl_NK, valid_NK.to(kl_NK.dtype))
    return kl_weight * kl - _length_reward(a_NK, valid_NK)


def survival_eal_loss(
    logits_NKV: Float[Tensor, "N K V"],
    teacher_NKV: Float[Tensor, "N K V"],
    labels_NK: Int[Tensor, "N K"],
    valid_NK: Bool[Tensor, "N K"],
    kl_weight: float | int,
    inclusive: bool = False,
    floor: float | int = 0.0,
    smoothing: float | int = 0.0,
) -> Float[Tensor, ""]:
    """-mean EAL / K + kl_weight sum s KL / sum s, s the detached survival weights.

    `smoothing` replaces a in the products of both terms.
    """
    a_NK = smoothed(cross_entropy(logits_NKV, labels_NK).neg().exp(), smoothing)
    weight_NK = survival_weights(a_NK.detach(), valid_NK, inclusive, floor)
    kl = weighted_mean(forward_kl(teacher_NKV, logits_NKV), weight_NK)
    return kl_weight * kl - _length_reward(a_NK, valid_NK)


def dpace_loss(
    logits_NKV: Float[Tensor, "N K V"],
    labels_NK: Int[Tensor, "N K"],
    valid_NK: Bool[Tensor, "N K"],
    smoothing: float | int = 0.5,
) -> Float[Tensor, ""]:
    """sum_n sum_k w CE of a batch with D-PACE's detached weights; who calls it chooses the mean."""
    ce_NK = cross_entropy(logits_NKV, labels_NK)
    weight_NK = dpace_weights(ce_NK.detach().neg().exp(), valid_NK, smoothing)
    return (weight_NK * ce_NK.masked_fill(~valid_NK, 0.0)).sum()


def lk_loss(alpha_NK: Float[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """-log alpha, alpha = sum min(p, q) (arXiv 2602.23881)."""
    return -alpha_NK.log()
