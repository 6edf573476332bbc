"""Noise-contrastive losses of a scorer that ranks candidates of a block against the truth.

A block has C = n + 1 slots: slot 0 holds the true tokens, drawn from p0(. | context), the others n
candidates of a proposal q. s is the scorer, gamma > 0 its scale, y the target distribution over
the slots, 1 at slot 0 unless another is given. The sums run over the slots that count. `score_MC`
is gamma s everywhere, so that what is learned of gamma flows through it.

    loss               terms                                                     gamma s becomes
    ranking            -sum_j y_j gamma s_j + log sum_j exp(gamma s_j)           log p0 - log q + C
    ranking_corrected  the same of u_j = gamma s_j - log q_j                     log p0 + C
    binary             -sum_j [y_j log sigma(l_j) + (1 - y_j) log sigma(-l_j)],  log p0 - log q
                       l_j = gamma s_j - log nu, nu the number of negatives

That is so for negatives drawn from q independently, with C a constant of the context (Ma and
Collins 2018, arXiv 1809.01812; Gutmann and Hyvarinen 2010 for `binary`, which normalises itself).
Copies of the truth among the negatives belong to such a draw, and so do repeated candidates: to
mask them changes the optimum. On a deterministic beam without copies q cancels from `ranking`,
which becomes log p0 + C on the beam; a sample whose copies are masked, or that is drawn without
replacement, lies between the two. `objectives/pairing.py`: what decoding may add to such a score.

A new loss is a function of the same arguments; a yaml names it (`_target_`, `_partial_: true`).

Legend: M blocks, C slots, S places of a block. Losses are in nats per block; what is computed in
half precision elsewhere is float32 here.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid


class NCETerms(NamedTuple):
    """The loss of every block and what its gradient is made of.

    loss_M: 0 where the block does not count.
    weight_M: 1 where it counts: at least one valid slot besides the one the target names.
    posterior_MC: probability of each slot to be the truth: the softmax, or sigma(l) of `binary`.
    target_MC: y. The derivative of the loss by gamma s_j is posterior_j - y_j; both are 0 in
        blocks that do not count.
    """

    loss_M: Float[Tensor, " M"]
    weight_M: Float[Tensor, " M"]
    posterior_MC: Float[Tensor, "M C"]
    target_MC: Float[Tensor, "M C"]


Loss = Callable[[Tensor, Tensor, Tensor, Tensor | None], NCETerms]


def ranking(
    score_MC: Float[Tensor, "M C"],
    log_q_MC: Float[Tensor, "M C"],
    valid_MC: Bool[Tensor, "M C"],
    target_MC: Float[Tensor, "M C"] | None = None,
) -> NCETerms:
    """-sum_j y_j gamma s_j + log sum_j exp(gamma s_j) (InfoNCE, arXiv 1807.03748, eq. 4).

    With graded targets it is ListNet's cross-entropy (Cao et al. 2007). `log_q_MC` is not used.
    """
    return _softmax_terms(exact(score_MC), valid_MC, target_MC)


def ranking_corrected(
    score_MC: Float[Tensor, "M C"],
    log_q_MC: Float[Tensor, "M C"],
    valid_MC: Bool[Tensor, "M C"],
    target_MC: Float[Tensor, "M C"] | None = None,
) -> NCETerms:
    """`ranking` of gamma s - log q (arXiv 1809.01812); log q is finite where a slot counts."""
    return _softmax_terms(exact(score_MC) - exact(log_q_MC), valid_MC, target_MC)


def binary(
    score_MC: Float[Tensor, "M C"],
    log_q_MC: Float[Tensor, "M C"],
    valid_MC: Bool[Tensor, "M C"],
    target_MC: Float[Tensor, "M C"] | None = None,
) -> NCETerms:
    """-sum_j [y_j log sigma(l_j) + (1 - y_j) log sigma(-l_j)], l = gamma s - log nu.

    nu is the number of valid negatives of the block; one negative is the loss of EDLM (arXiv
    2410.21357). `log_q_MC` is not used.
    """
    slots = _Slots(exact(score_MC), valid_MC, target_MC)
    negatives_M1 = (valid_MC.sum(-1, keepdim=True) - 1).clamp(min=1)
    logit_MC = slots.value_MC - negatives_M1.to(slots.value_MC.dtype).log()
    loss_MC = slots.target_MC * logsigmoid(logit_MC) + (1 - slots.target_MC) * logsigmoid(-logit_MC)
    return slots.terms(-(loss_MC * slots.valid_MC).sum(-1), logit_MC.sigmoid())


LOSSES: dict[str, Loss] = {
    "ranking": ranking,
    "ranking_corrected": ranking_corrected,
    "binary": binary,
}


def nce_loss(
    kind: str | Loss,
    score_MC: Float[Tensor, "M C"],
    log_q_MC: Float[Tensor, "M C"],
    valid_MC: Bool[Tensor, "M C"],
    target_MC: Float[Tensor, "M C"] | None = None,
) -> NCETerms:
    """The loss of a name in `LOSSES`, or of a function like them.

    Args:
        kind: which.
        score_MC: gamma s.
        log_q_MC: log-probability of each slot's tokens under the proposal, at its temperature.
        valid_MC: slots that count. What stands at the others is not looked at.
        target_MC: y, a distribution over valid slots; None: the truth is slot 0. A block counts if
            all of y lies on valid slots and at least two slots are valid.

    Raises:
        ValueError: a name that is not listed.
    """
    if isinstance(kind, str) and kind not in LOSSES:
        raise ValueError(f"nce.loss={kind}: allowed {', '.join(LOSSES)}")
    terms = LOSSES[kind] if isinstance(kind, str) else kind
    return terms(score_MC, log_q_MC, valid_MC, target_MC)


class _Slots:
    """Values, targets and which blocks count, prepared so that nothing invalid meets a gradient."""

    def __init__(self, value_MC: Tensor, valid_MC: Tensor, target_MC: Tensor | None) -> None:
        if target_MC is None:
            target_MC = torch.zeros_like(value_MC)
            target_MC[:, 0] = 1.0
        misplaced_M = (target_MC.masked_fill(valid_MC, 0.0) != 0).any(-1)
        self.counts_M = (valid_MC.sum(-1) >= 2) & ~misplaced_M
        self.valid_MC = valid_MC
        # Not a product with 0: what stands at an invalid slot need not be finite.
        self.value_MC = torch.where(valid_MC, value_MC, 0.0)
        self.target_MC = torch.where(self.counts_M[:, None], target_MC, 0.0).to(value_MC.dtype)

    def terms(self, loss_M: Tensor, posterior_MC: Tensor) -> NCETerms:
        """The loss where a block counts, else 0."""
        used_MC = self.valid_MC & self.counts_M[:, None]
        return NCETerms(
            torch.where(self.counts_M, loss_M, 0.0),
            self.counts_M.to(loss_M.dtype),
            torch.where(used_MC, posterior_MC, 0.0).detach(),
            self.target_MC,
        )


def _softmax_terms(value_MC: Tensor, valid_MC: Tensor, target_MC: Tensor | None) -> NCETerms:
    slots = _Slots(value_MC, valid_MC, target_MC)
    # Blocks that do not count keep their slots: a softmax over none has no gradient but nan.
    closed_MC = ~valid_MC & slots.counts_M[:, None]
    logit_MC = slots.value_MC.masked_fill(closed_MC, -torch.inf)
    loss_M = logit_MC.logsumexp(-1) - (slots.target_MC * slots.value_MC).sum(-1)
    return slots.terms(loss_M, logit_MC.softmax(-1))


def exact(x: Float[Tensor, "*A"]) -> Float[Tensor, "*A"]:
    """In float32, or as it is in float64."""
    return x if x.dtype == torch.float64 else x.float()


class Duplicates(NamedTuple):
    """Candidates that bring nothing new; slot 0 is never one.

    positive_MC: equals the true tokens of slot 0.
    earlier_MC: equals a candidate of an earlier slot (which may equal the truth as well).
    """

    positive_MC: Bool[Tensor, "M C"]
    earlier_MC: Bool[Tensor, "M C"]

    @property
    def any_MC(self) -> Bool[Tensor, "M C"]:
        """What `nce.dedup` masks."""
        return self.positive_MC | self.earlier_MC


def duplicates(
    tokens_MCS: Int[Tensor, "M C S"],
    exists_MC: Bool[Tensor, "M C"] | None = None,
    counted_MS: Bool[Tensor, "M S"] | None = None,
) -> Duplicates:
    """Compare the tokens of every candidate with the truth and with the candidates before it.

    Args:
        tokens_MCS: slot 0 is the truth.
        exists_MC: slots that hold a candidate; the others equal nothing. None: all.
        counted_MS: places whose tokens matter (not padding). None: all.
    """
    same_MCCS = tokens_MCS[:, :, None] == tokens_MCS[:, None]
    if counted_MS is not None:
        same_MCCS = same_MCCS | ~counted_MS[:, None, None]
    same_MCC = same_MCCS.all(-1)
    if exists_MC is not None:
        same_MCC = same_MCC & exists_MC[:, :, None] & exists_MC[:, None]
    before_MCC = same_MCC.tril(-1)
    return Duplicates(before_MCC[:, :, 0], before_MCC[:, :, 1:].any(-1))


def graded_target(
    errors_MC: Int[Tensor, "M C"], valid_MC: Bool[Tensor, "M C"], temperature: float | int
) -> Float[Tensor, "M C"]:
    """softmax(-errors / temperature) over the valid slots; temperature 0: the first of the fewest.

    A target for sets in which no slot need be the truth, as in decoding (`hard_positive`): mark
    slot 0 invalid. 0 in blocks without a valid slot.

    Raises:
        ValueError: a negative temperature.
    """
    if not temperature >= 0:
        raise ValueError(f"nce.target_temperature={temperature}: allowed a number of at least 0")
    cost_MC = errors_MC.float().masked_fill(~valid_MC, torch.inf)
    if temperature == 0:
        y_MC = torch.zeros_like(cost_MC).scatter(-1, cost_MC.argmin(-1, keepdim=True), 1.0)
    else:
        y_MC = (-cost_MC / temperature).softmax(-1)
    return y_MC.masked_fill(~valid_MC, 0.0)


def score_penalty(
    score_MC: Float[Tensor, "M C"], valid_MC: Bool[Tensor, "M C"]
) -> Float[Tensor, " M"]:
    """Mean of (gamma s)^2 over the valid slots: keeps separable sets from growing gamma for ever.

    The coefficient of BBox-Adapter (arXiv 2402.08219) is 1.
    """
    kept_MC = torch.where(valid_MC, exact(score_MC), 0.0)
    return kept_MC.square().sum(-1) / valid_MC.sum(-1).clamp(min=1)
