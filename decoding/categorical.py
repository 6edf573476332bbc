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


def keyed_uniform64(
    key: Sequence[int], rows_B: Int[Tensor, " B"], columns: int
) -> Float[Tensor, "B N"]:
    """Uniform float64 in [0, 1) on a grid of 2^-53, one for every (row, column)."""
    bits = keyed_bits(key, rows_B, columns) >> 11
    return (bits & ((1 << 53) - 1)).double() * 2.0**-53


def nucleus(p_MV: Float[Tensor, "M V"], mass: float) -> Float[Tensor, "M V"]:
    """Zero all but the fewest most probable tokens whose probabilities sum to at least `mass`.

    The token that crosses `mass` is kept (arXiv 1904.09751), and so are tokens exactly as
    probable as it. Rows must sum to one; what is returned does not.
    """
    if mass >= 1.0:
        return p_MV
    top_MN = _most_probable(p_MV, mass)
    before_MN = top_MN.cumsum(-1) - top_MN
    last_M1 = (before_MN < mass).sum(-1, keepdim=True) - 1
    return p_MV.where(p_MV >= top_MN.gather(-1, last_M1), 0.0)


def _most_probable(p_MV: Tensor, mass: float) -> Tensor:
    """Descending probabilities, at least as many as sum to `mass` in every row."""
    if p_MV.device.type == "cpu" and p_MV.shape[-1] > 2 * _HEAD:
        head_MN = p_MV.topk(_HEAD, dim=-1).values
        if bool((head_MN.sum(-1) >= mass).all()):
            return head_MN
    return p_MV.sort(dim=-1, descending=True).values


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
