"""Token weights from dependency depth: which words of a sentence the training dwells on.

The public checkpoints with `masking.mix_alpha` and `masking.depth_mode` come without a formula; the
one below is this project's own. Weights are made per unit, the block that is denoised together (for
MDLM the whole row), and average 1 over the words of every unit:

    d^ = d / max d of the sentence (normalize_depth) or d
    u  = n softmax(+- d^ / depth_temp) over the n words of the unit        (- if reverse)
    w  = (1 - mix_alpha) + mix_alpha u

A token without a word (special tokens, padding, text that was not parsed) weighs 1. A weight
depends on its own unit alone, not on the rest of the batch.

Two uses. `target=loss` multiplies the cross-entropy of a masked token: a surrogate, no bound.
`target=schedule` multiplies the odds of being masked: heavy tokens are hidden more often, and

    p_i = w_i p / (1 + (w_i - 1) p),        p_i' / p_i = (p' / p) / (1 + (w_i - 1) p)

is the token's own schedule with its exact weight (`tilted_schedule`). With schedules that differ
between tokens the expected loss is again a bound on -log p, as in GenMD4 (arXiv 2406.04329, sec. 6;
its p^w_i would lose p(t_min)^w_i of a light token's loss to the cut at t_min, the odds lose
w_i p(t_min)). But that holds for weights given from outside. Here they come from the parse of the
text itself, so what is bounded is the likelihood given the depths of the words, not that of the
text alone; validation therefore always reports the bound of the unweighted schedule. Times clipped
to an interval and masks resampled inside it make any training loss a surrogate, weighted or not.

Legend: B sequences, L tokens, K blocks, S block size (L = K S).
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

DEPTH_MODES = ("dependency", "none", "random", "position")
TARGETS = ("loss", "schedule")
MIN_ODDS = 1e-3


def tilted_schedule(
    probability: Float[Tensor, "*shape"], odds: Float[Tensor, "*shape"]
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    """p_i = w p / (1 + (w - 1) p), and the factor 1 / (1 + (w - 1) p) of its weight p_i' / p_i.

    Odds below `MIN_ODDS` count as that: such a token would be masked at p = 1 alone, which single
    precision cannot tell from just below.
    """
    odds = odds.clamp(min=MIN_ODDS)
    factor = (1.0 + (odds - 1.0) * probability).reciprocal()
    return odds * probability * factor, factor


def softmax_weights(
    score_BKS: Float[Tensor, "B K S"], is_word_BKS: Bool[Tensor, "B K S"]
) -> Float[Tensor, "B K S"]:
    """n softmax(score) over the n words of every unit, mean 1; 1 for tokens without a word."""
    words_BK1 = is_word_BKS.sum(-1, keepdim=True)
    # A unit without words has nothing to normalise: its scores are set to 0, and not used.
    hidden_BKS = ~is_word_BKS & (words_BK1 > 0)
    u_BKS = score_BKS.masked_fill(hidden_BKS, -torch.inf).softmax(-1) * words_BK1
    return torch.where(is_word_BKS, u_BKS, 1.0)


def shuffle_words(
    values_BKS: Int[Tensor, "B K S"],
    is_word_BKS: Bool[Tensor, "B K S"],
    uniform_BKS: Float[Tensor, "B K S"],
) -> Int[Tensor, "B K S"]:
    """The values of the words of every unit, dealt out among them in the order of `uniform`."""
    # Words first: in the order of their places, and in a random order.
    place_BKS = torch.where(is_word_BKS, 0, 1).argsort(dim=-1, stable=True)
    order_BKS = torch.where(is_word_BKS, uniform_BKS, 2.0).argsort(dim=-1, stable=True)
    return torch.zeros_like(values_BKS).scatter(-1, place_BKS, values_BKS.gather(-1, order_BKS))


class DepthReweighting:
    """Weights of the tokens of a batch (`masking=dependency`).

    Args:
        mix_alpha: share of the depth's weights, in [0, 1]; 0 is no reweighting at all.
        depth_mode: what stands for the depth: `dependency`, the depth itself; `random`, the depths
            of the unit's tokens dealt out anew (a control with the same weights on other tokens,
            pieces of words included); `position`, the place in the unit; `none`, nothing.
        depth_temp: temperature of the softmax, above 0.
        normalize_depth: divide a depth by the greatest one of its sentence (a place by S - 1).
        reverse: false gives deep words the weight, true gives it to the root.
        target: `loss` or `schedule`.

    Raises:
        ValueError: an option out of range.
    """

    features = ("depth", "height")

    def __init__(
        self,
        mix_alpha: float | int = 0.0,
        depth_mode: str = "dependency",
        depth_temp: float | int = 1.0,
        normalize_depth: bool = True,
        reverse: bool = False,
        target: str = "loss",
    ) -> None:
        if not 0.0 <= mix_alpha <= 1.0:
            raise ValueError(f"masking.mix_alpha={mix_alpha}: allowed a number in [0, 1]")
        if not depth_temp > 0.0:
            raise ValueError(f"masking.depth_temp={depth_temp}: allowed a number above 0")
        for key, value, choices in (
            ("depth_mode", depth_mode, DEPTH_MODES),
            ("target", target, TARGETS),
        ):
            if value not in choices:
                raise ValueError(f"masking.{key}={value}: allowed {', '.join(choices)}")
        self.mix_alpha, self.depth_mode, self.depth_temp = mix_alpha, depth_mode, depth_temp
        self.normalize_depth, self.reverse, self.target = normalize_depth, reverse, target

    @property
    def active(self) -> bool:
        """Whether any weight differs from 1; if not, nothing is computed, to the bit."""
        return self.mix_alpha > 0.0 and self.depth_mode != "none"

    def weights(
        self,
        depth_BL: Int[Tensor, "B L"],
        height_BL: Int[Tensor, "B L"],
        uniform_BL: Float[Tensor, "B L"],
        block_size: int,
    ) -> Float[Tensor, "B L"]:
        """w of every token.

        Args:
            depth_BL: arcs up to the root, -1 for a token without a word.
            height_BL: greatest depth of the token's sentence.
            uniform_BL: random numbers of `depth_mode=random`, the same whenever a row returns.
            block_size: tokens of a unit.
        """
        batch, length = depth_BL.shape
        shape = batch, length // block_size, block_size
        depth_BKS, height_BKS = depth_BL.view(shape), height_BL.view(shape)
        is_word_BKS = depth_BKS >= 0
        if self.depth_mode == "position":
            depth_BKS = torch.arange(block_size, device=depth_BL.device).expand(shape)
            height_BKS = torch.full_like(height_BKS, block_size - 1)
        elif self.depth_mode == "random":
            uniform_BKS = uniform_BL.view(shape)
            depth_BKS = shuffle_words(depth_BKS, is_word_BKS, uniform_BKS)
            height_BKS = shuffle_words(height_BKS, is_word_BKS, uniform_BKS)
        score_BKS = depth_BKS.float()
        if self.normalize_depth:
            score_BKS = score_BKS / height_BKS.clamp(min=1)
        sign = -1.0 if self.reverse else 1.0
        u_BKS = softmax_weights(sign * score_BKS / self.depth_temp, is_word_BKS)
        return ((1.0 - self.mix_alpha) + self.mix_alpha * u_BKS).view(batch, length)
