"""Cross-entropies and what they add up to.

Legend: B sequences, L tokens, M selected rows, V vocabulary, D features.
All likelihoods are in nats.
"""

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

_CACHED_ROWS = 16  # of a vocabulary of 30,000 in fp32: 2 MB


def subs_log_probabilities(
    logits_BLV: Float[Tensor, "B L V"], xt_BL: Int[Tensor, "B L"], mask_id: int
) -> Float[Tensor, "B L V"]:
    """SUBS parameterisation of log p(x_0 | x_t) at every position (arXiv 2406.07524, sec. 3.2.3).

    Zero masking probability: the mask token is never predicted. Carry-over unmasking: a token
    that is visible is kept with probability one. The training step never builds this tensor:
    visible tokens cost nothing, so it looks at masked rows alone (`masked_cross_entropy`).
    """
    logits_BLV = logits_BLV.float().clone()
    logits_BLV[..., mask_id] = -torch.inf
    log_p_BLV = logits_BLV.log_softmax(-1)
    visible_BL = xt_BL != mask_id
    kept_BLV = torch.full_like(log_p_BLV, -torch.inf).scatter_(-1, xt_BL[..., None], 0.0)
    return torch.where(visible_BL[..., None], kept_BLV, log_p_BLV)


def masked_cross_entropy(
    logits_MV: Float[Tensor, "M V"], target_M: Int[Tensor, " M"], mask_id: int | None
) -> Float[Tensor, " M"]:
    """-log p(target) in fp32, the mask token (None: there is none) excluded from the softmax."""
    logits_MV = logits_MV.float()
    if mask_id is not None:
        logits_MV = logits_MV.index_fill(-1, torch.tensor(mask_id, device=logits_MV.device), -1e9)
    return F.cross_entropy(logits_MV, target_M, reduction="none")


class _HeadCrossEntropy(torch.autograd.Function):
    """Output projection and weighted cross-entropy in one pass over the logits.

    The loss is a weighted sum whose weights are known before the forward pass, so its gradient
    with respect to the logits, w (softmax - onehot), takes the place of the logits as soon as they
    exist. They are computed once, never kept for the backward pass, and only `chunk` rows of them
    are alive at a time. The weights multiply the narrow side of each product, [M, D], not [M, V].
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_MD: Tensor,
        weight_VD: Tensor,
        bias_V: Tensor,
        target_M: Tensor,
        weight_M: Tensor,
        mask_id: int | None,
        chunk: int,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor]:
        """Loss and, already, its gradients."""
        low_VD, low_MD, low_bias_V = weight_VD.to(dtype), hidden_MD.to(dtype), bias_V.to(dtype)
        weighted_MD = (hidden_MD * weight_M[:, None]).to(dtype)
        loss_M = torch.empty_like(weight_M)
        grad_hidden_MD = torch.empty_like(low_MD)
        grad_weight_VD = torch.zeros_like(low_VD) if hidden_MD.shape[0] > chunk else None
        grad_bias_V = torch.zeros_like(bias_V, dtype=torch.float32)
        for start in range(0, max(hidden_MD.shape[0], 1), chunk):
            rows = slice(start, start + chunk)
            logits_CV = torch.addmm(low_bias_V, low_MD[rows], low_VD.t())
            if mask_id is not None:
                logits_CV[:, mask_id] = -torch.inf
            loss_M[rows] = _softmax_residual_(
                logits_CV, target_M[rows], weight_M[rows], grad_bias_V
            )
            grad_hidden_MD[rows] = logits_CV @ low_VD
            if grad_weight_VD is None:
                grad_weight_VD = logits_CV.t() @ weighted_MD[rows]
            else:
                grad_weight_VD.addmm_(logits_CV.t(), weighted_MD[rows])
        grad_hidden_MD *= weight_M[:, None].to(dtype)
        ctx.save_for_backward(grad_hidden_MD, grad_weight_VD, grad_bias_V)
        ctx.dtypes = hidden_MD.dtype, weight_VD.dtype, bias_V.dtype
        ctx.mark_non_differentiable(loss_M)
        return loss_M @ weight_M, loss_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the gradients in place; torch refuses a second call, which finds them changed."""
        grads = (
            grad.mul_(grad_loss).to(dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None, None, None


def _softmax_residual_(
    logits_CV: Tensor, target_C: Tensor, weight_C: Tensor, grad_bias_V: Tensor
) -> Tensor:
    """Replace logits by softmax - onehot(target), in fp32 inside; return -log softmax[target].

    Adds sum_c weight_c (softmax - onehot)_c to `grad_bias_V`. On a CPU the rows go in groups that
    stay in its cache, so that the logits travel to memory once and no second matrix is allocated.
    """
    group = len(logits_CV) if logits_CV.is_cuda else _CACHED_ROWS
    loss_C = torch.empty_like(weight_C)
    for start in range(0, len(logits_CV), max(group, 1)):
        rows = slice(start, start + group)
        target_G1 = target_C[rows, None]
        log_p_GV = F.log_softmax(logits_CV[rows], -1, dtype=torch.float32)
        loss_C[rows] = -log_p_GV.gather(1, target_G1)[:, 0]
        residual_GV = log_p_GV.exp_()
        residual_GV.scatter_add_(1, target_G1, torch.full_like(loss_C[rows, None], -1.0))
        grad_bias_V.addmv_(residual_GV.t(), weight_C[rows])
        logits_CV[rows] = residual_GV
    return loss_C


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def head_cross_entropy(
    hidden_MD: Float[Tensor, "M D"],
    weight_VD: Float[Tensor, "V D"],
    bias_V: Float[Tensor, " V"],
    target_M: Int[Tensor, " M"],
    weight_M: Float[Tensor, " M"],
    mask_id: int | None,
    chunk: int = 1024,
) -> tuple[Float[Tensor, ""], Float[Tensor, " M"]]:
    """sum_m w_m CE_m and the detached CE_m (nats), CE = -log softmax(W h + b)[target].

    The products run in the autocast dtype (so do the rounded logits), softmax and sums in fp32.
    Only the first result carries a gradient. Rows of weight 0 add nothing to loss or gradient.

    Args:
        hidden_MD: features of the rows whose token is predicted.
        weight_VD: output projection; bias_V its bias.
        target_M: the tokens.
        weight_M: weight of each row in the loss; no gradient flows into it.
        mask_id: token excluded from the softmax, None for a model without one.
        chunk: rows of logits alive at a time.
    """
    dtype = _compute_dtype(hidden_MD)
    # Autocast would round the fp32 sums as well: the two products choose their dtype themselves.
    with torch.autocast(hidden_MD.device.type, enabled=False):
        return _HeadCrossEntropy.apply(
            hidden_MD, weight_VD, bias_V, target_M, weight_M.float(), mask_id, chunk, dtype
        )


def row_sums(
    loss_M: Float[Tensor, " M"], row_M: Int[Tensor, " M"], batch: int
) -> Float[Tensor, " B"]:
    """Add the losses of each sequence in double precision; `row_M` says whose each one is."""
    total_B = torch.zeros(batch, dtype=torch.float64, device=loss_M.device)
    return total_B.index_add_(0, row_M, loss_M.double())
