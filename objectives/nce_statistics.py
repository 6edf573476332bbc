"""What the candidates of a step or a validation say of a scorer: sums over blocks, and their means.

A loss beside what it can be at best and at worst says whether a scorer learns:

    ln_slots           ln(n + 1), `ranking` of a scorer that knows nothing
    duplicate_floor    ln(1 + d), with d copies of the truth that are not crossed out
    scale_floor        ln(1 + n e^{-2 gamma}), while scores are bounded by gamma

Legend: M blocks, C = n + 1 slots, slot 0 the truth.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.contrastive import NCETerms, exact

# What is summed over blocks, in the order of `block_sums`.
SUMS = (
    "blocks", "loss", "ln_slots", "duplicate_floor", "scale_floor", "gamma_gradient",
    "rank_accuracy", "mrr", "score_spread", "copies", "slots",
)  # fmt: skip


def block_sums(
    score_MC: Float[Tensor, "M C"],
    terms: NCETerms,
    exists_MC: Bool[Tensor, "M C"],
    valid_MC: Bool[Tensor, "M C"],
    counted_MC: Bool[Tensor, "M C"],
    copy_MC: Bool[Tensor, "M C"],
    gamma: Tensor | None,
) -> Float[Tensor, " sums"]:
    """The sums that `SUMS` names; of all but copies and slots over the blocks that count.

    Args:
        score_MC: gamma s.
        terms: the loss.
        exists_MC: slots that hold something.
        valid_MC: those among which the truth is ranked.
        counted_MC: those that the loss sees.
        copy_MC: candidates that are the truth.
        gamma: bound of the scores; None: they have none.
    """
    score_MC, counts_M = score_MC.detach(), terms.weight_M
    rank = positive_rank(score_MC, valid_MC)
    scale_floor_M = torch.zeros_like(counts_M)
    if gamma is not None:
        scale_floor_M = bound_floor(gamma.detach(), counted_MC.sum(-1) - 1)
    columns = (
        torch.ones_like(counts_M), terms.loss_M.detach(), log_slots(counted_MC),
        duplicate_floor((copy_MC & valid_MC).sum(-1)), scale_floor_M,
        scale_gradient(terms, score_MC), rank.first_M, rank.reciprocal_M,
        score_spread(score_MC, valid_MC),
    )  # fmt: skip
    of_blocks = [(column * counts_M).sum().double() for column in columns]
    return torch.stack([*of_blocks, copy_MC.sum().double(), exists_MC[:, 1:].sum().double()])


def means_of(sums: Float[Tensor, " sums"]) -> dict[str, Tensor]:
    """What is logged: the loss (`nce_loss`) and the rest by block, and `duplicate_rate`, the share
    of candidates that are the truth."""
    named = dict(zip(SUMS, sums.unbind(), strict=True))
    blocks, copies, slots = (named.pop(name) for name in ("blocks", "copies", "slots"))
    # Without a block that counts there is no mean, and no 0 that would look like the best.
    means = {name: total / blocks for name, total in named.items()}
    means["nce_loss"] = means.pop("loss")
    return means | {"duplicate_rate": copies / slots.clamp(min=1.0)}


def log_slots(valid_MC: Bool[Tensor, "M C"]) -> Float[Tensor, " M"]:
    """ln(n + 1) of every block: `ranking` of a scorer that knows nothing; 0 without a slot."""
    return valid_MC.sum(-1).clamp(min=1).float().log()


def duplicate_floor(copies_M: Int[Tensor, " M"]) -> Float[Tensor, " M"]:
    """ln(1 + d), below which `ranking` cannot fall with d valid copies of the truth.

    With one copy in a share r of the blocks the mean is r ln 2.
    """
    return copies_M.float().log1p()


def bound_floor(
    bound: float | int | Float[Tensor, ""], negatives_M: Int[Tensor, " M"]
) -> Float[Tensor, " M"]:
    """ln(1 + n e^{-2g}), below which `ranking` cannot fall while |gamma s| <= g.

    n = 4: 0.905 for g = 0.5, 0.433 for 1, 0.071 for 2, 0.010 for 3; ln 5 = 1.609 for 0.
    """
    share = (-2.0 * bound).exp() if isinstance(bound, Tensor) else math.exp(-2.0 * bound)
    return (negatives_M.clamp(min=0) * share).log1p()


def scale_gradient(terms: NCETerms, score_MC: Float[Tensor, "M C"]) -> Float[Tensor, " M"]:
    """dL / d log gamma = sum_j (posterior_j - y_j) gamma s_j of every block."""
    difference_MC = terms.posterior_MC - terms.target_MC
    kept_MC = torch.where(difference_MC != 0, exact(score_MC.detach()), 0.0)
    return (difference_MC * kept_MC).sum(-1)


class PositiveRank(NamedTuple):
    """Of every block; 0 where slot 0 is not valid, 1 where nothing competes with it.

    first_M: probability that slot 0 comes first.
    reciprocal_M: mean of 1 / rank of slot 0, whose mean over blocks is the MRR.
    """

    first_M: Float[Tensor, " M"]
    reciprocal_M: Float[Tensor, " M"]


def positive_rank(score_MC: Float[Tensor, "M C"], valid_MC: Bool[Tensor, "M C"]) -> PositiveRank:
    """The place of the truth among the valid slots; equal scores are drawn by lot, on average.

    With a better slots and b equal ones 1[a = 0] / (b + 1) and sum_{r=a+1}^{a+b+1} 1 / (r (b + 1)):
    a scorer that gives one number to all is at chance, not at 1.
    """
    rivals_MC = valid_MC[:, 1:]
    better_M = ((score_MC[:, 1:] > score_MC[:, :1]) & rivals_MC).sum(-1)
    equal_M = ((score_MC[:, 1:] == score_MC[:, :1]) & rivals_MC).sum(-1)
    places = torch.arange(score_MC.shape[1] + 1, dtype=torch.float32, device=score_MC.device)
    harmonic = torch.cat([places[:1], places[1:].reciprocal()]).cumsum(0)
    present_M = valid_MC[:, 0].float()
    first_M = (better_M == 0) / (equal_M + 1) * present_M
    reciprocal_M = harmonic[better_M + equal_M + 1] - harmonic[better_M]
    return PositiveRank(first_M, reciprocal_M / (equal_M + 1) * present_M)


def score_spread(
    score_MC: Float[Tensor, "M C"], valid_MC: Bool[Tensor, "M C"]
) -> Float[Tensor, " M"]:
    """Standard deviation of gamma s over the valid slots of a block (divided by their number)."""
    slots_M = valid_MC.sum(-1).clamp(min=1)
    kept_MC = torch.where(valid_MC, exact(score_MC), 0.0)
    mean_M = kept_MC.sum(-1) / slots_M
    square_MC = (kept_MC - mean_M[:, None]).square().masked_fill(~valid_MC, 0.0)
    return (square_MC.sum(-1) / slots_M).sqrt()


def largest_score(
    score_MC: Float[Tensor, "M C"], valid_MC: Bool[Tensor, "M C"]
) -> Float[Tensor, " M"]:
    """max |gamma s| over the valid slots of a block: the g of `bound_floor`."""
    return torch.where(valid_MC, exact(score_MC), 0.0).abs().amax(-1)
