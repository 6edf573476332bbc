"""The forward process of masked diffusion: from clean blocks to times, masks and loss weights.

    t_k  ~ U[low, high]                one time per block, spread over the global batch
    m_i  ~ Bernoulli(p_i(t_k))         p_i = p, or tilted by token weights (objectives.reweighting)
    weight of a masked token           p_i'(t_k) / p_i(t_k)

With `resample` the masks of a block are conditioned on a rate m / S inside [low, high]
(arXiv 2503.09573, sec. 5). Every random number is a hash of what it is for.

Legend: B sequences, L tokens, K blocks, S block size (L = K S).
"""

from collections import deque
from typing import NamedTuple

from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.keyed import keyed_phase, keyed_uniform
from objectives.masking import (
    bernoulli_mask,
    conditioned_bernoulli_mask,
    count_distribution,
    count_mask,
    exact_count,
    maskable_per_block,
    rate_bounds,
    spread_times,
    truncated_binomial,
)
from objectives.noise import Schedule
from objectives.reweighting import tilted_schedule

FULL_INTERVAL = (1e-3, 1.0)
# What a random number is for: part of its key.
TIME, MASK, COUNT, EVAL_MASK, EVAL_COUNT, SHUFFLE = range(6)


class Corruption(NamedTuple):
    """A draw: t and p(t) of every block; p_i of every token, whether it is masked, its weight."""

    time_BK: Tensor
    probability_BK: Tensor
    probability_BL: Tensor
    mask_BL: Tensor
    weight_BL: Tensor


class BoundDraw(NamedTuple):
    """A draw for the bound: which tokens are masked, their weights, the rate of every block."""

    mask_BL: Tensor
    weight_BL: Tensor
    rate_BK: Tensor


class MaskingProcess:
    """Draws times and masks.

    Args:
        schedule: p(t).
        block_size: S.
        seed: first part of every key.
        resample: condition every block's mask on a rate inside the interval.
        antithetic: spread the times of a batch evenly.
        interval: (low, high) of the times; a search may set another one (`callbacks.clip_search`).

    Raises:
        ValueError: `resample` with an interval that holds no rate of a block of this size.
    """

    def __init__(
        self,
        schedule: Schedule,
        block_size: int,
        seed: int,
        resample: bool = False,
        antithetic: bool = True,
        interval: tuple[float, float] = FULL_INTERVAL,
    ) -> None:
        self.schedule, self.block_size, self.seed = schedule, block_size, seed
        self.resample, self.antithetic = resample, antithetic
        self.interval = interval
        self.count_bounds(interval)  # says now what is wrong with them

    def count_bounds(self, interval: tuple[float, float]) -> tuple[int, int] | None:
        """Least and most masked tokens of a block, or None where every number will do.

        As published, the ends of the full interval do not bound the realised rate.
        """
        if not self.resample or interval == FULL_INTERVAL:
            return None
        low = 0.0 if interval[0] == FULL_INTERVAL[0] else interval[0]
        return rate_bounds(self.block_size, low, interval[1])

    def times(
        self,
        position_B: Int[Tensor, " B"],
        num_blocks: int,
        counter: tuple[int, ...],
        interval: tuple[float, float],
    ) -> Float[Tensor, "B K"]:
        """Times of all blocks, evenly spread over the global batch unless switched off."""
        key, (low, high) = (self.seed, TIME, *counter), interval
        if self.antithetic:
            return spread_times(position_B, num_blocks, keyed_phase(key), low, high)
        return low + (high - low) * keyed_uniform(key, position_B, num_blocks)

    def draw(
        self,
        maskable_BL: Bool[Tensor, "B L"],
        position_B: Int[Tensor, " B"],
        counter: tuple[int, ...],
        odds_BL: Float[Tensor, "B L"] | None = None,
        interval: tuple[float, float] | None = None,
    ) -> Corruption:
        """Times, masks and weights of a batch.

        Args:
            maskable_BL: tokens that may be hidden.
            position_B: number of every row in its global batch.
            counter: what sets this draw apart from others, e.g. (optimiser step,).
            odds_BL: factor of every token's odds of being masked; None is 1 everywhere.
            interval: instead of the process's own.
        """
        interval = self.interval if interval is None else interval
        bounds, size = self.count_bounds(interval), self.block_size
        length = maskable_BL.shape[1]
        # 1. a time for every block, and what it makes of its tokens
        time_BK = self.times(position_B, length // size, counter, interval)
        probability_BK = self.schedule.probability(time_BK)
        weight_BL = self.schedule.weight(time_BK).repeat_interleave(size, dim=1)
        probability_BL = probability_BK.repeat_interleave(size, dim=1)
        if odds_BL is not None:
            probability_BL, factor_BL = tilted_schedule(probability_BL, odds_BL)
            weight_BL = weight_BL * factor_BL
        # 2. the masks
        uniform_BL = keyed_uniform((self.seed, MASK, *counter), position_B, length)
        if bounds is None:
            mask_BL = bernoulli_mask(uniform_BL, probability_BL) & maskable_BL
        elif odds_BL is not None:
            mask_BL = conditioned_bernoulli_mask(
                uniform_BL, probability_BL, maskable_BL, size, *bounds
            )
        else:
            uniform_BK = keyed_uniform((self.seed, COUNT, *counter), position_B, time_BK.shape[1])
            count_BK = truncated_binomial(
                uniform_BK, maskable_per_block(maskable_BL, size), probability_BK, *bounds
            )
            mask_BL = count_mask(uniform_BL, maskable_BL, count_BK, size)
        return Corruption(time_BK, probability_BK, probability_BL, mask_BL, weight_BL)

    def count_probabilities(
        self, maskable_BL: Bool[Tensor, "B L"], noise: Corruption
    ) -> Float[Tensor, "N C"] | None:
        """P(c tokens of a block are masked | t) of N = B K blocks; None without `resample`."""
        if not self.resample:
            return None
        shape = *noise.time_BK.shape, self.block_size
        tables = count_distribution(noise.probability_BL.view(shape), maskable_BL.view(shape))
        pmf_BKC = deque(tables, maxlen=1).pop()  # of the whole block; the others are let go
        return pmf_BKC.flatten(0, 1)

    def draw_for_bound(
        self, maskable_BL: Bool[Tensor, "B L"], index_B: Int[Tensor, " B"], draw: int
    ) -> BoundDraw:
        """Mask n of each block's m places, n uniform on 1..m, with weight m/n.

        The unweighted bound of continuous time, with the masking probability integrated out
        (`objectives.masking.exact_count`). Keyed by row and draw alone.
        """
        maskable_BK, key = maskable_per_block(maskable_BL, self.block_size), (self.seed, draw)
        uniform_BK = keyed_uniform((*key, EVAL_COUNT), index_B, maskable_BK.shape[1])
        uniform_BL = keyed_uniform((*key, EVAL_MASK), index_B, maskable_BL.shape[1])
        count_BK = exact_count(uniform_BK, maskable_BK)
        mask_BL = count_mask(uniform_BL, maskable_BL, count_BK, self.block_size)
        weight_BK = maskable_BK / count_BK.clamp(min=1)
        weight_BL = weight_BK.repeat_interleave(self.block_size, dim=1)
        return BoundDraw(mask_BL, weight_BL, count_BK / maskable_BK.clamp(min=1))
