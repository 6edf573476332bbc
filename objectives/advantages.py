"""Advantages of a group of samples of one prefix, and what the rewards of groups look like.

K samples of a prefix are judged and each is compared with the others of its group, so no value
network is needed (GRPO, arXiv 2402.03300; Dr.GRPO, arXiv 2503.20783; RLOO, arXiv 2402.14740):

    grpo     A_k = (r_k - mean) / (std + eps), 0 where std < eps       std of the population
    dr_grpo  A_k = r_k - mean
    rloo     A_k = r_k - mean of the others = K / (K - 1) dr_grpo

Only rloo gives the exact policy gradient in expectation, dr_grpo (K - 1) / K of it; dividing by std
weighs prefixes by how hard they are.

A sample without a verdict is not a sample with reward 0: it is left out of mean, std and K, and
its own advantage is 0, which trains nothing. So is that of one with nobody to be compared with, and
of one in a group of equal rewards, exactly: rounded, 0.7 less the mean of sixteen 0.7 is not 0.

Legend: G groups (prefixes), K samples of each.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

# A group whose rewards spread less tells its samples apart by nothing but rounding.
NEAR_ZERO_STD = 1e-5


class _Moments(NamedTuple):
    """Over the valid samples of each group; 0 where there is none."""

    count_G: Float[Tensor, " G"]
    mean_G: Float[Tensor, " G"]
    std_G: Float[Tensor, " G"]


def _moments(kept_GK: Tensor, valid_GK: Tensor) -> _Moments:
    """`kept_GK` has 0 where nothing is valid."""
    count_G = valid_GK.sum(-1).to(kept_GK.dtype)
    mean_G = kept_GK.sum(-1) / count_G.clamp(min=1.0)
    square_GK = (kept_GK - mean_G[:, None]).square().masked_fill(~valid_GK, 0.0)
    return _Moments(count_G, mean_G, (square_GK.sum(-1) / count_G.clamp(min=1.0)).sqrt())


def _grpo(kept_GK: Tensor, moments: _Moments, eps: float) -> Tensor:
    scale_G = torch.where(moments.std_G < eps, 0.0, 1.0 / (moments.std_G + eps))
    return (kept_GK - moments.mean_G[:, None]) * scale_G[:, None]


def _dr_grpo(kept_GK: Tensor, moments: _Moments, eps: float) -> Tensor:
    return kept_GK - moments.mean_G[:, None]


def _rloo(kept_GK: Tensor, moments: _Moments, eps: float) -> Tensor:
    total_G1 = (moments.mean_G * moments.count_G)[:, None]
    return kept_GK - (total_G1 - kept_GK) / (moments.count_G - 1.0).clamp(min=1.0)[:, None]


ADVANTAGES: dict[str, Callable[[Tensor, _Moments, float], Tensor]] = {
    "grpo": _grpo,
    "dr_grpo": _dr_grpo,
    "rloo": _rloo,
}


def group_advantages(
    reward_GK: Float[Tensor, "G K"],
    valid_GK: Bool[Tensor, "G K"],
    kind: str = "grpo",
    eps: float | int = 1e-6,
) -> Float[Tensor, "G K"]:
    """A_k of every sample; 0 for invalid ones, and in groups whose valid ones are all equal or
    fewer than two.

    Args:
        reward_GK: rewards; what stands where nothing is valid is not looked at.
        valid_GK: samples that have a reward.
        kind: a name in `ADVANTAGES`.
        eps: of `grpo` alone.

    Raises:
        ValueError: a name that is not listed.
    """
    if kind not in ADVANTAGES:
        raise ValueError(f"advantage={kind}: allowed {', '.join(ADVANTAGES)}")
    kept_GK = reward_GK.detach().masked_fill(~valid_GK, 0.0)
    moments = _moments(kept_GK, valid_GK)
    largest_G = kept_GK.masked_fill(~valid_GK, -torch.inf).amax(-1)
    smallest_G = kept_GK.masked_fill(~valid_GK, torch.inf).amin(-1)
    # Of infinite rewards it is nan, and so are their advantages, which the guard of a step sees.
    spread_G = largest_G - smallest_G
    compared_GK = valid_GK & (spread_G != 0.0)[:, None]
    return ADVANTAGES[kind](kept_GK, moments, eps).masked_fill(~compared_GK, 0.0)


class GroupStatistics(NamedTuple):
    """Scalars; rates and `mean_group_std` are over all groups.

    reward_mean, reward_std: over all valid samples, the population's; nan if there is none.
    invalid_rate: share of samples without a reward.
    near_zero: groups with std < 1e-5; one with at most one valid sample is such a group.
    mixed: groups with max - min > 0; near_zero + mixed = 1 if rewards are 0 or 1.
    all_zero, all_one: groups in which every valid sample has reward 0, or 1.
    any_success, all_success: groups in which a valid sample, or every one, has a reward above 0.
    mean_group_std: mean std of a group, 0 for one without a valid sample.

    A group without a valid sample is near_zero and none of the others.
    """

    reward_mean: Float[Tensor, ""]
    reward_std: Float[Tensor, ""]
    invalid_rate: Float[Tensor, ""]
    near_zero: Float[Tensor, ""]
    mixed: Float[Tensor, ""]
    all_zero: Float[Tensor, ""]
    all_one: Float[Tensor, ""]
    any_success: Float[Tensor, ""]
    all_success: Float[Tensor, ""]
    mean_group_std: Float[Tensor, ""]


def group_statistics(
    reward_GK: Float[Tensor, "G K"], valid_GK: Bool[Tensor, "G K"]
) -> GroupStatistics:
    """How the rewards of groups are spread; see `GroupStatistics`."""
    kept_GK = reward_GK.detach().double().masked_fill(~valid_GK, 0.0)
    std_G = _moments(kept_GK, valid_GK).std_G
    largest_G = kept_GK.masked_fill(~valid_GK, -torch.inf).amax(-1)
    smallest_G = kept_GK.masked_fill(~valid_GK, torch.inf).amin(-1)
    judged_G = valid_GK.any(-1)

    def rate(groups_G: Tensor) -> Tensor:
        return (groups_G & judged_G).double().mean()

    count = valid_GK.sum()
    mean = kept_GK.sum() / count
    square_GK = (kept_GK - mean).square().masked_fill(~valid_GK, 0.0)
    return GroupStatistics(
        reward_mean=mean,
        reward_std=(square_GK.sum() / count).sqrt(),
        invalid_rate=(~valid_GK).double().mean(),
        near_zero=(std_G < NEAR_ZERO_STD).double().mean(),
        mixed=rate(largest_G > smallest_G),
        all_zero=rate((largest_G == 0.0) & (smallest_G == 0.0)),
        all_one=rate((largest_G == 1.0) & (smallest_G == 1.0)),
        any_success=rate(largest_G > 0.0),
        all_success=rate(smallest_G > 0.0),
        mean_group_std=std_G.mean(),
    )
