"""Drawing tokens from logits: temperature, nucleus, and one random number per token.

The tokens come from the inverse of the cumulative distribution, not from Gumbel noise. That takes
one random number per token instead of one per entry of the vocabulary, and it is exact where the
usual float32 Gumbel noise is not: its largest values are cut off, which lowers the temperature
(arXiv 2409.02908).

Legend: B sequences, N columns, M rows, V vocabulary.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from objectives.keyed import keyed_bits

# On a CPU a full sort of the vocabulary costs twenty times as much as finding this many.
_HEAD = 256
# Shift and width of the digits of a positive float32, whose sign bit is 0.
_DIGITS = ((20, 11), (8, 12), (0, 8))


def keyed_uniform64(
    key: Sequence[int], rows_B: Int[Tensor, " B"], columns: int
) -> Float[Tensor, "B N"]:
    """Uniform float64 in [0, 1) on a grid of 2^-53, one for every (row, column)."""
    bits = keyed_bits(key, rows_B, columns) >> 11
    return (bits & ((1 << 53) - 1)).double() * 2.0**-53


def nucleus(p_MV: Float[Tensor, "M V"], mass: float) -> Float[Tensor, "M V"]:
    """Zero all but the fewest most probable tokens whose probabilities sum to at least `mass`.

    The token that crosses `mass` is kept (arXiv 1904.09751), and so are tokens as probable
    as it in float32. Rows must sum to one; what is returned does not.
    """
    if mass >= 1.0:
        return p_MV
    if p_MV.device.type == "cpu" and p_MV.shape[-1] > 2 * _HEAD:
        last_M1 = _last_kept_on_cpu(p_MV, mass)
    else:
        last_M1 = _last_kept(p_MV.sort(dim=-1, descending=True).values, mass)
    return p_MV.where(p_MV.float() >= last_M1.float(), 0.0)


def _last_kept(top_MN: Tensor, mass: float) -> Tensor:
    """The entry of each descending row with which its sum reaches `mass`."""
    before_MN = top_MN.cumsum(-1) - top_MN
    return top_MN.gather(-1, (before_MN < mass).sum(-1, keepdim=True) - 1)


def _last_kept_on_cpu(p_MV: Tensor, mass: float) -> Tensor:
    """The same without sorting the vocabulary: from its head, or if that is too flat by radix."""
    head_MN = p_MV.topk(_HEAD, dim=-1).values
    last_M1 = _last_kept(head_MN, mass)
    flat_F = (head_MN.sum(-1) < mass).nonzero()[:, 0]
    for row in flat_F.tolist():
        last_M1[row] = _select_by_radix(p_MV[row], mass)
    return last_M1


def _select_by_radix(p_V: Tensor, mass: float) -> Tensor:
    """Largest float32 x for which the entries >= x sum to at least `mass`.

    Positive floats are ordered like the integers of the same bits. So the bits of x are found from
    the top, a digit at a time: of all digits that may follow, the largest that leaves enough mass
    at it and above. Three passes instead of a sort.
    """
    bits_V, left_V = p_V.float().view(torch.int32), p_V.double()
    above, found = torch.zeros((), dtype=torch.float64), 0
    for shift, width in _DIGITS:
        digit_V = (bits_V >> shift & (1 << width) - 1).long()
        mass_D = torch.zeros(1 << width, dtype=torch.float64).scatter_add_(0, digit_V, left_V)
        reached_D = above + mass_D.flip(0).cumsum_(0)
        place = min(int((reached_D < mass).sum()), len(reached_D) - 1)
        above = reached_D[place - 1] if place else above
        digit = len(reached_D) - 1 - place
        found |= digit << shift
        left_V = left_V * (digit_V == digit)
    return torch.tensor(found, dtype=torch.int32).view(torch.float32).to(p_V.dtype)


def invert(p_MV: Float[Tensor, "M V"], uniform_M: Float[Tensor, " M"]) -> Int[Tensor, " M"]:
    """First token whose cumulative probability exceeds uniform * sum: never one of probability 0.

    Rows need not be normalised.
    """
    cumulative_MV = p_MV.cumsum(-1)
    total_M1 = cumulative_MV[:, -1:]
    # A uniform number just below one may be rounded up to it; the total itself exceeds nothing.
    below_M1 = torch.nextafter(total_M1, torch.zeros_like(total_M1))
    wanted_M1 = torch.minimum(uniform_M[:, None].to(p_MV.dtype) * total_M1, below_M1)
    return torch.searchsorted(cumulative_MV, wanted_M1, right=True)[:, 0]


def draw(
    logits_MV: Float[Tensor, "M V"],
    uniform_M: Float[Tensor, " M"],
    *,
    temperature: float = 1.0,
    nucleus_p: float = 1.0,
    float64: bool = False,
) -> Int[Tensor, " M"]:
    """One token per row from softmax(logits / temperature), cut to its nucleus.

    Args:
        logits_MV: scores; -inf excludes a token.
        uniform_M: one uniform number per row, in [0, 1).
        temperature: 0 takes the most probable token.
        nucleus_p: mass of the nucleus of the tempered distribution; 1 keeps everything.
        float64: softmax and cumulative sum in double precision instead of single.
    """
    if temperature == 0.0:
        return logits_MV.argmax(-1)
    logits_MV = logits_MV.to(torch.float64 if float64 else torch.float32)
    return invert(nucleus((logits_MV / temperature).softmax(-1), nucleus_p), uniform_M)
