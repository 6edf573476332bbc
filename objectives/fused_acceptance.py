"""The losses of speculative drafts without their logits: one pass over the head, in chunks.

Draft and target share the frozen head W (no bias, no soft-capping), so the target enters through
one vector per position, e = W^T p, and its logits are never needed beside the draft's:

    KL(p || q) = -H(p) - h.e + logsumexp(W h),        d KL / d h = W^T q - e
    -log q(y)  = -h.W_y + logsumexp(W h),             d / d h    = W^T q - W_y

Both gradients need the one product W^T q, made from the logits while they exist; what stays of a
slot is its loss and the direction of its gradient, a vector of D numbers. Survival, suffix sums and
weights follow on the [N, K] losses by ordinary autograd and only scale these directions. So no
chunk has to hold whole blocks, and an objective may be any function of the slots' losses.

Memory: `chunk` rows of logits (two or three times that with `teacher_hidden_UD`) and one or two
vectors of D per valid slot. Time, in products of a vector with W: two per valid slot, and two per
target position in `teacher_summary`. In place of the latter `teacher_hidden_UD` takes one per
target position (on a GPU, one per valid slot), and one more per slot where KL and acceptance are
both learnt. One less per slot if nothing is learnt.

Where acceptance needs all of p (sum min(p, q)), a chunk of the teacher's logits stands beside the
draft's. Teacher and head get no gradient.

Legend: N blocks, K predicted slots, U unique target positions, R rows (slots that count), M = N K,
C rows of a chunk, D features, V vocabulary. Losses in nats.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.acceptance import AcceptanceObjective, BlockTerms
from objectives.slot_losses import Head, Pass, SlotLosses, Teacher, slices, soften_

# Logits alive at a time: products of few rows are slow (benchmarks/acceptance_loss.py --chunks, on
# a CPU; the number for a GPU is assumed).
_CHUNK_ELEMENTS = {"cpu": 2**25, "cuda": 2**26}


@dataclass(frozen=True)
class AcceptanceSums:
    """A loss and what it is made of; all but `loss` and `terms` are detached.

    loss: sum_n [-reward_scale EAL_n + kl_scale sum_k weight KL + ce_scale sum_k weight (-log a)],
        a sum over blocks: the losses of the parts of a batch add up to the loss of the batch.
    terms: its parts per block, differentiable where their weight in the objective is not 0.
    blocks, slots: how many blocks have a valid slot, how many slots are valid.
    weight: sum of the weights.
    expected_length: sum over blocks of EAL without smoothing, in tokens.
    kl, ce: sums over valid slots of KL (None without a teacher) and of -log q(y), unweighted.
    block_loss_N: the loss of every block, to name a bad one.
    hits_NK: whether the draft's most probable token is the label; False at invalid slots.
    """

    loss: Float[Tensor, ""]
    terms: BlockTerms
    blocks: Int[Tensor, ""]
    slots: Int[Tensor, ""]
    weight: Float[Tensor, ""]
    expected_length: Float[Tensor, ""]
    kl: Float[Tensor, ""] | None
    ce: Float[Tensor, ""]
    block_loss_N: Float[Tensor, " N"]
    hits_NK: Bool[Tensor, "N K"]


def _compute_dtype(x: Tensor) -> torch.dtype:
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _chunk_rows(chunk: int | None, head_VD: Tensor) -> int:
    elements = _CHUNK_ELEMENTS.get(head_VD.device.type, 2**25)
    return chunk or max(elements // len(head_VD), 1)


def _no_autocast(x: Tensor) -> torch.autocast:
    # Autocast would round the exact sums as well: the products choose their dtype themselves.
    return torch.autocast(x.device.type, enabled=False)


@torch.no_grad()
def teacher_summary(
    hidden_UD: Float[Tensor, "U D"],
    head_VD: Float[Tensor, "V D"],
    temperature: float | int = 1.0,
    chunk: int | None = None,
) -> tuple[Float[Tensor, "U D"], Float[Tensor, " U"]]:
    """e = W^T softmax(W h / T) and the entropy of that softmax (nats), in at least fp32.

    All that the KL needs of the target, once per position, however many slots look at it.

    Args:
        hidden_UD: the target's last hidden states, after its final norm.
        head_VD: the head that draft and target share.
        temperature: T of the objective.
        chunk: rows of logits alive at a time; None chooses.
    """
    rows = _chunk_rows(chunk, head_VD)
    how = Pass(False, False, "greedy", float(temperature), rows, _compute_dtype(hidden_UD))
    expected_UD = torch.empty_like(hidden_UD, dtype=how.exact)
    entropy_U = hidden_UD.new_empty(len(hidden_UD), dtype=how.exact)
    with _no_autocast(hidden_UD):
        head, low_UD = Head(head_VD, how, len(hidden_UD), 1), hidden_UD.to(how.dtype)
        for part in slices(len(hidden_UD), rows):
            p_CV = head.logits(low_UD[part])
            lse_C, _ = soften_(p_CV, how.exact, how.temperature)
            expected_UD[part] = head.features(p_CV)
            inner_C = (low_UD[part].to(how.exact) * expected_UD[part]).sum(-1)
            entropy_U[part] = lse_C - inner_C / how.temperature
    return expected_UD, entropy_U


def _check(
    objective: AcceptanceObjective, head_VD: Tensor, index_NK: Tensor | None,
    expected_UD: Tensor | None, entropy_U: Tensor | None, hidden_UD: Tensor | None,
) -> None:  # fmt: skip
    if head_VD.requires_grad:
        raise ValueError("the head gets no gradient here: freeze it (requires_grad_(False))")
    if (expected_UD is None) != (entropy_U is None):
        raise ValueError("expected_UD and entropy_U (teacher_summary) go together")
    if expected_UD is not None and hidden_UD is not None:
        raise ValueError("expected_UD and teacher_hidden_UD: allowed one of them")
    known = expected_UD is not None or hidden_UD is not None
    if known != (index_NK is not None):
        raise ValueError("teacher_index_NK goes with expected_UD or teacher_hidden_UD")
    if objective.needs_distribution and hidden_UD is None:
        raise ValueError(
            f"objective.verification={objective.verification}: needs teacher_hidden_UD; "
            "allowed without it: greedy"
        )
    if objective.needs_kl and not known:
        raise ValueError(
            f"objective.kl_weight={objective.kl_weight}: needs a teacher; allowed without one: 0"
        )


class _Slots:
    """The valid slots of a batch as rows, in the order of `index_NK`, and back.

    With `rows` given, rows beyond the valid ones stand for no slot: they gather zeros, and what
    they scatter is dropped.
    """

    def __init__(self, valid_NK: Tensor, rows: int | None, index_NK: Tensor | None) -> None:
        flat_M = valid_NK.flatten()
        self.shape, self.total = valid_NK.shape, len(flat_M)
        if rows is None:
            self.place_R = flat_M.nonzero()[:, 0]
        else:
            torch._assert_async(flat_M.sum() <= rows, f"more than rows={rows} valid slots")
            self.place_R = torch.nonzero_static(flat_M, size=rows, fill_value=self.total)[:, 0]

        if index_NK is not None:
            self.place_R = self.place_R[self.gather(index_NK).argsort()]

    def gather(self, x: Tensor) -> Tensor:
        """Entries of the rows from [N, K, ...]."""
        taken = x.flatten(0, 1)[self.place_R.clamp(max=self.total - 1)]
        real_R = self.place_R < self.total
        return torch.where(real_R.view(-1, *[1] * (taken.dim() - 1)), taken, 0)

    def scatter(self, x_R: Tensor) -> Tensor:
        """Entries of the slots, 0 where a slot is not valid."""
        flat = x_R.new_zeros(self.total + 1).scatter(0, self.place_R, x_R)
        return flat[:-1].view(self.shape)


def fused_acceptance_loss(
    hidden_NKD: Float[Tensor, "N K D"],
    head_VD: Float[Tensor, "V D"],
    labels_NK: Int[Tensor, "N K"],
    valid_NK: Bool[Tensor, "N K"],
    *,
    objective: AcceptanceObjective,
    teacher_index_NK: Int[Tensor, "N K"] | None = None,
    expected_UD: Float[Tensor, "U D"] | None = None,
    entropy_U: Float[Tensor, " U"] | None = None,
    teacher_hidden_UD: Float[Tensor, "U D"] | None = None,
    reward_scale: float | int | Float[Tensor, ""] | None = None,
    kl_scale: float | int | Float[Tensor, ""] | None = None,
    ce_scale: float | int | Float[Tensor, ""] | None = None,
    rows: int | None = None,
    chunk: int | None = None,
) -> AcceptanceSums:
    """The objective's loss of drafted blocks, and its parts, without the logits of the batch.

    Products run in the autocast dtype (the logits are rounded to it), softmax and sums in fp32, or
    in fp64 for fp64 input. What it costs stands at the top of this file.

    Args:
        hidden_NKD: the draft's hidden states after its final norm, at slots that predict.
        head_VD: the frozen head, best kept in the dtype of the products.
        labels_NK: tokens; not looked at where a slot is not valid, nor are the other inputs.
        valid_NK: slots that count. A padding block has none.
        objective: what is computed.
        teacher_index_NK: which of the U target positions holds p of the slot.
        expected_UD, entropy_U: of `teacher_summary` at the objective's temperature.
        teacher_hidden_UD: in their place, the target's last hidden states after its final norm; for
            a verification that needs them.
        reward_scale, kl_scale, ce_scale: see `AcceptanceSums.loss`; by default the weights of the
            objective. A term of weight 0 is left out whatever its scale.
        rows: bound on the number of valid slots that the host knows; None counts them, which waits
            for a GPU. Rows beyond the valid ones are computed and dropped.
        chunk: rows of logits alive at a time; None chooses.

    Raises:
        ValueError: a head that wants a gradient, or a teacher that does not fit the objective.
        RuntimeError: more valid slots than `rows`.
    """
    _check(objective, head_VD, teacher_index_NK, expected_UD, entropy_U, teacher_hidden_UD)
    learning = torch.is_grad_enabled() and hidden_NKD.requires_grad
    how = Pass(
        learning and objective.needs_acceptance, learning and objective.needs_kl,
        objective.verification, float(objective.temperature), _chunk_rows(chunk, head_VD),
        _compute_dtype(hidden_NKD),
    )  # fmt: skip
    with _no_autocast(hidden_NKD):
        # 1. The valid slots alone go through the head.
        slots = _Slots(valid_NK, rows, teacher_index_NK)
        teacher = None
        if teacher_index_NK is not None:
            index_R = slots.gather(teacher_index_NK)
            teacher = Teacher(index_R, expected_UD, entropy_U, teacher_hidden_UD)
        # 2. Losses and gradients of every slot, as if it stood alone.
        hidden_RD, labels_R = slots.gather(hidden_NKD), slots.gather(labels_NK)
        found = SlotLosses.apply(hidden_RD, head_VD, labels_R, teacher, how)
        accept_NK, kl_NK, nll_NK, hits_NK = map(slots.scatter, (*found[:3], found[3] == labels_R))
        # 3. What they weigh depends on the block.
        terms = objective.block_terms(-accept_NK, kl_NK, valid_NK)
        block_loss_N = _weighted(objective, terms, reward_scale, kl_scale, ce_scale)
        length_N = replace(objective, smoothing=0.0).survival(-accept_NK.detach(), valid_NK).sum(-1)
    return AcceptanceSums(
        block_loss_N.sum(), terms, valid_NK.any(-1).sum(), valid_NK.sum(), terms.weight_NK.sum(),
        length_N.sum(), None if teacher is None else kl_NK.detach().sum(), nll_NK.sum(),
        block_loss_N.detach(), hits_NK,
    )  # fmt: skip


def _weighted(
    objective: AcceptanceObjective,
    terms: BlockTerms,
    *scales: float | int | Tensor | None,
) -> Tensor:
    """[N] loss of every block: its terms by `scales` (reward, KL, CE), else by their weights."""
    weights = objective.reward_weight, objective.kl_weight, objective.ce_weight
    loss_N = torch.zeros_like(terms.reward_N)
    parts = -terms.reward_N, terms.kl_N, terms.ce_N
    for weight, scale, part_N in zip(weights, scales, parts, strict=True):
        if weight:
            loss_N = loss_N + (weight if scale is None else scale) * part_N
    return loss_N
