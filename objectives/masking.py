"""Which tokens are masked: times, Bernoulli masks, masks of a bounded rate or an exact count.

Every function takes its random numbers as an argument, so a caller decides where they come from
(`objectives.keyed`), and a test can pass all of them.

Legend: B sequences, L tokens, K blocks, S block size (L = K S).
"""

import math
from collections.abc import Iterator

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

GOLDEN = (math.sqrt(5.0) - 1.0) / 2.0


def spread_times(
    position_B: Int[Tensor, " B"], num_blocks: int, phase: float, low: float, high: float
) -> Float[Tensor, "B K"]:
    """Evenly spread times for all blocks of a global batch.

    t = low + (high - low) frac(phase + j g), where j = position * K + block counts the blocks of
    the global batch and g is the golden ratio. With a uniform phase each time is uniform on
    [low, high), and any run of consecutive blocks (one sequence, one micro-batch, the whole batch)
    covers the interval almost as evenly as stratification would (Kronecker sequence). Because j is
    a global index, the times do not depend on how the batch is cut over ranks or accumulation
    steps. Stratifying in raster order, as is usual, would give all blocks of a sequence nearly the
    same time, and the first sequence always the cleanest.
    """
    index_BK = position_B[:, None] * num_blocks + torch.arange(num_blocks, device=position_B.device)
    fraction_BK = torch.remainder(index_BK.double() * GOLDEN + phase, 1.0)
    return (low + (high - low) * fraction_BK).float()


def bernoulli_mask(
    uniform_BL: Float[Tensor, "B L"], probability_BL: Float[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Mask every token independently with its probability: u < p."""
    return uniform_BL < probability_BL


def rank_in_block(
    uniform_BL: Float[Tensor, "B L"], maskable_BL: Bool[Tensor, "B L"], block_size: int
) -> Int[Tensor, "B L"]:
    """Place of every token in the random order of its block; tokens that may not be masked last."""
    batch, length = uniform_BL.shape
    score_BL = torch.where(maskable_BL, uniform_BL, 2.0)
    score_BKS = score_BL.view(batch, length // block_size, block_size)
    return score_BKS.argsort(-1).argsort(-1).view(batch, length)


def count_mask(
    uniform_BL: Float[Tensor, "B L"],
    maskable_BL: Bool[Tensor, "B L"],
    count_BK: Int[Tensor, "B K"],
    block_size: int,
) -> Bool[Tensor, "B L"]:
    """Mask exactly `count` tokens of every block, chosen uniformly among the maskable ones."""
    rank_BL = rank_in_block(uniform_BL, maskable_BL, block_size)
    return (rank_BL < count_BK.repeat_interleave(block_size, dim=1)) & maskable_BL


def maskable_per_block(maskable_BL: Bool[Tensor, "B L"], block_size: int) -> Int[Tensor, "B K"]:
    """How many tokens of each block may be masked."""
    batch, length = maskable_BL.shape
    return maskable_BL.view(batch, length // block_size, block_size).sum(-1)


def rate_bounds(block_size: int, low: float, high: float) -> tuple[int, int]:
    """Smallest and largest count of masked tokens whose rate lies in [low, high].

    Raises:
        ValueError: no count of a block of this size has a rate in the interval.
    """
    tolerance = 1e-6  # rates arrive through float32 configurations: 0.3 * 10 must count as 3
    least, most = math.ceil(low * block_size - tolerance), math.floor(high * block_size + tolerance)
    if least > most:
        raise ValueError(
            f"training.sampling_eps_min={low}, training.sampling_eps_max={high}: no number of"
            f" masked tokens out of block_size={block_size} has a rate in this interval;"
            " widen it or set training.resample=false"
        )
    return least, most


def truncated_binomial(
    uniform_BK: Float[Tensor, "B K"],
    trials_BK: Int[Tensor, "B K"],
    probability_BK: Float[Tensor, "B K"],
    least: int,
    most: int,
) -> Int[Tensor, "B K"]:
    """Binomial(trials, probability) given least <= count <= most, by inversion.

    Redrawing a block's mask until its rate lies in the interval (arXiv 2503.09573, sec. 5) draws
    from exactly this law for the count, with the masked places uniform given the count. Inversion
    needs no loop. Where `trials < least` the count is `trials`: all that can be masked.
    """
    support = torch.arange(int(trials_BK.max()) + 1, device=trials_BK.device)
    trials = trials_BK[..., None].double()
    p = probability_BK[..., None].double().clamp(1e-12, 1 - 1e-12)
    log_pmf = (
        torch.lgamma(trials + 1)
        - torch.lgamma(support.double() + 1.0)
        - torch.lgamma((trials - support).clamp(min=0) + 1)
        + support * p.log()
        + (trials - support) * torch.log1p(-p)
    )
    allowed = (support <= trials) & (support <= most)
    allowed &= support >= torch.minimum(trials, torch.full_like(trials, least))
    pmf = log_pmf.masked_fill(~allowed, -torch.inf).softmax(-1)
    below = pmf.cumsum(-1) <= uniform_BK[..., None].double()
    # Rounding may leave the last partial sum at 1 - 1e-16 <= u: never step over the support's end.
    last_BK = torch.where(allowed, support, -1).amax(-1)
    first_BK = torch.where(allowed, support, support.numel()).amin(-1)
    return below.sum(-1).clamp(min=first_BK, max=last_BK)


def count_distribution(
    probability_BKS: Float[Tensor, "B K S"], maskable_BKS: Bool[Tensor, "B K S"]
) -> Iterator[Float[Tensor, "B K C"]]:
    """P(c of the tokens from place s on are masked), float64; C = S + 1 counts, last place first.

    Tokens are masked independently, each with its own probability (Poisson-binomial), by adding one
    token after the other from the end: P_s(c) = (1 - p_s) P_{s+1}(c) + p_s P_{s+1}(c - 1). The last
    of the S tables is the distribution of the whole block's count.
    """
    p_BKS = torch.where(maskable_BKS, probability_BKS, 0.0).double()
    size = p_BKS.shape[-1]
    tail_BKC = torch.zeros(*p_BKS.shape[:-1], size + 1, dtype=torch.float64, device=p_BKS.device)
    tail_BKC[..., 0] = 1.0
    for place in range(size - 1, -1, -1):
        p = p_BKS[..., place, None]
        one_more = torch.cat([torch.zeros_like(p), tail_BKC[..., :-1]], dim=-1)
        tail_BKC = (1.0 - p) * tail_BKC + p * one_more
        yield tail_BKC


def conditioned_bernoulli_mask(
    uniform_BL: Float[Tensor, "B L"],
    probability_BL: Float[Tensor, "B L"],
    maskable_BL: Bool[Tensor, "B L"],
    block_size: int,
    least: int,
    most: int,
) -> Bool[Tensor, "B L"]:
    """Independent masks of unequal probability, given least <= count <= most in every block.

    What redrawing a block until its count fits would give, without the loop: token after token,
    with the probability that it is masked and the rest can still fit, by Bayes' rule from
    `count_distribution`. Where fewer than `least` tokens can be masked, all of them are. Memory is
    B L (S + 1) double numbers: meant for blocks, not for whole rows of a thousand tokens.
    """
    shape = uniform_BL.shape[0], -1, block_size
    maskable_BKS = maskable_BL.view(shape)
    p_BKS = torch.where(maskable_BKS, probability_BL.view(shape), 0.0).double()
    # A probability that rounded to 0 or 1 may leave no mask that fits.
    p_BKS = torch.where(maskable_BKS, p_BKS.clamp(1e-12, 1 - 1e-12), p_BKS)
    tails = list(count_distribution(p_BKS, maskable_BKS))[::-1]
    tails.append(torch.zeros_like(tails[0]))  # behind the last token: nothing, for certain
    tails[-1][..., 0] = 1.0
    least_BK = maskable_BKS.sum(-1).clamp(max=least)
    counts_C = torch.arange(block_size + 1, device=uniform_BL.device)
    done_BK = torch.zeros_like(least_BK)
    masks = []
    for place in range(block_size):
        total_BKC = done_BK[..., None] + counts_C
        fits_BKC = [(least_BK[..., None] <= n) & (n <= most) for n in (total_BKC, total_BKC + 1)]
        without_BK, with_BK = ((tails[place + 1] * fits).sum(-1) for fits in fits_BKC)
        p_BK = p_BKS[..., place]
        masked_BK, open_BK = p_BK * with_BK, (1.0 - p_BK) * without_BK
        uniform_BK = uniform_BL.view(shape)[..., place].double()
        possible_BK = masked_BK + open_BK
        mask_BK = uniform_BK * possible_BK < masked_BK
        # Chances may be too small for a number: then tokens are masked as soon as all are needed.
        needed_BK = least_BK - done_BK > maskable_BKS[..., place + 1 :].sum(-1)
        mask_BK = torch.where(possible_BK > 0, mask_BK, needed_BK & maskable_BKS[..., place])
        masks.append(mask_BK)
        done_BK = done_BK + mask_BK
    return torch.stack(masks, dim=-1).view(uniform_BL.shape)


def exact_count(
    uniform_BK: Float[Tensor, "B K"], maskable_BK: Int[Tensor, "B K"]
) -> Int[Tensor, "B K"]:
    """Count n uniform on {1, ..., m} for a block with m maskable tokens, 0 where m = 0.

    Integrating the masking probability out of the continuous-time bound leaves a uniform count
    and the weight m/n for each masked token (arXiv 2502.09992, eq. 14), for every schedule: the
    same expectation as drawing t, with less variance and no cut at small t. For m = 1 it is the
    exact autoregressive likelihood.
    """
    count = (uniform_BK * maskable_BK).floor().long() + 1
    return torch.minimum(count, maskable_BK)


def enumerate_masks(
    maskable_L: Bool[Tensor, " L"],
) -> Bool[Tensor, "N L"]:
    """All subsets of the maskable places, as rows of a boolean tensor: 2^m rows."""
    places = maskable_L.nonzero()[:, 0]
    codes_N = torch.arange(2 ** len(places), device=maskable_L.device)
    masks_NL = torch.zeros(len(codes_N), len(maskable_L), dtype=torch.bool)
    masks_NL[:, places] = (codes_N[:, None] >> torch.arange(len(places))) % 2 == 1
    return masks_NL
