"""Which interval of masking rates to train on: the one whose loss varies least.

Training with times t ~ U[low, high] inside [0, 1] gives another estimator of another weighting of
the same terms, with less variance where very low and very high rates only add noise
(arXiv 2503.09573, sec. 5). The search compares Var of the loss of a block, the mean over its S
places, between candidate intervals.

`batch_variance` is the published statistic: for every interval a forward pass of its own.
`interval_variances` reads all of them off one set of draws over the full interval: given t the loss
does not know the interval it was drawn for, so the draws with t inside an interval are draws for
it. With resampling they are weighted by 1 / P(mask accepted | t), which turns masks that happen to
fit into masks redrawn until they fit.

Legend: N blocks, I intervals, C = S + 1 counts of masked tokens.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from objectives.corruption import FULL_INTERVAL
from objectives.masking import rate_bounds

Interval = tuple[float, float]


def candidate_intervals(
    widths: Sequence[float], delta: float, block_size: int, resample: bool
) -> list[Interval]:
    """The full interval, then for every width those that begin at multiples of `delta`.

    As published: 36 for widths 0.5, ..., 0.9 and delta 0.05; for blocks of one token the full
    interval and (1, 1), whose loss is the autoregressive likelihood. No interval begins below 1e-3
    or ends above 1 (a `delta` that does not divide 1 - width leaves a rest).

    Raises:
        ValueError: with `resample`, an interval that holds no rate of a block of this size.
    """
    if block_size == 1:
        return [FULL_INTERVAL, (1.0, 1.0)]
    found = [FULL_INTERVAL]
    for width in widths:
        offsets = math.floor((1.0 - width) / delta + 1e-6) + 1
        for step in range(offsets):
            low = round(step * delta, 6)
            found.append((max(low, FULL_INTERVAL[0]), round(low + width, 6)))
    if resample:
        for low, high in found[1:]:
            rate_bounds(block_size, low, high)
    return found


def batch_variance(loss_N: Float[Tensor, " N"], batch_N: Int[Tensor, " N"]) -> Float[Tensor, ""]:
    """Unbiased variance of the blocks of a batch, averaged over the batches of two or more."""
    variances = [loss_N[batch_N == number].double() for number in batch_N.unique()]
    found = [part.var() for part in variances if len(part) > 1]
    return torch.stack(found).mean() if found else torch.tensor(math.nan, dtype=torch.float64)


def weighted_variance(
    values_N: Float[Tensor, " N"], weights_N: Float[Tensor, " N"]
) -> Float[Tensor, ""]:
    """Variance under normalised weights, times n / (n - 1) with n = (sum w)^2 / sum w^2.

    Equal weights give the unbiased variance; fewer than two effective draws give nan.
    """
    values, weights = values_N.double(), weights_N.double()
    total = weights.sum()
    effective = total**2 / weights.square().sum()
    if not float(effective) > 1.0 + 1e-9:
        return torch.tensor(math.nan, dtype=torch.float64)
    mean = (weights * values).sum() / total
    variance = (weights * (values - mean).square()).sum() / total
    return variance * effective / (effective - 1.0)


def interval_variances(
    time_N: Float[Tensor, " N"],
    loss_N: Float[Tensor, " N"],
    intervals: Sequence[Interval],
    pmf_NC: Float[Tensor, "N C"] | None = None,
    count_N: Int[Tensor, " N"] | None = None,
    maskable_N: Int[Tensor, " N"] | None = None,
) -> Float[Tensor, " I"]:
    """Variance of a block's loss for each interval, from draws of t over the full one.

    Args:
        time_N: t of every block.
        loss_N: its loss.
        intervals: candidates; all lie inside the interval of the draws.
        pmf_NC: P(c tokens masked | t) of every block, if masks are conditioned on their rate.
        count_N: how many were masked.
        maskable_N: how many could be.

    Returns:
        float64; nan for an interval with fewer than two draws.
    """
    found = []
    for low, high in intervals:
        weights_N = ((time_N >= low) & (time_N <= high)).double()
        if pmf_NC is not None and (low, high) != FULL_INTERVAL:
            assert count_N is not None and maskable_N is not None
            weights_N *= _redrawing_weights(pmf_NC, count_N, maskable_N, (low, high))
        found.append(weighted_variance(loss_N, weights_N))
    return torch.stack(found)


def _redrawing_weights(
    pmf_NC: Float[Tensor, "N C"],
    count_N: Int[Tensor, " N"],
    maskable_N: Int[Tensor, " N"],
    interval: Interval,
) -> Float[Tensor, " N"]:
    """1 / P(accepted | t) for masks whose rate lies in the interval, 0 for the others."""
    size = pmf_NC.shape[1] - 1
    low = 0.0 if interval[0] == FULL_INTERVAL[0] else interval[0]
    least, most = rate_bounds(size, low, interval[1])
    least_N = maskable_N.clamp(max=least)
    counts_C = torch.arange(size + 1, device=pmf_NC.device)
    fits_NC = (counts_C >= least_N[:, None]) & (counts_C <= most)
    accepted_N = (count_N >= least_N) & (count_N <= most)
    chance_N = (pmf_NC * fits_NC).sum(-1)
    return torch.where(accepted_N, chance_N.clamp(min=1e-12).reciprocal(), 0.0)


def least_variance(variances_I: Float[Tensor, " I"]) -> int | None:
    """Number of the least finite variance: the first of equals; None if there is none."""
    if not bool(variances_I.isfinite().any()):
        return None
    return int(variances_I.nan_to_num(nan=math.inf).argmin())
