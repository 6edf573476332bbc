"""Which places of a block a pass makes final: rules that `refine/commit` chooses.

A rule looks at what the pass predicts and at what is committed so far; places that are given (of a
prompt) are always committed. With `prefix_threshold` the commitment is made anew in every pass, so
that tokens stay revisable until the whole block is sure; with the others what is committed stays.

Legend: X blocks, S places of a block.
"""

import math
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from objectives.refinement import Prediction


@runtime_checkable
class CommitRule(Protocol):
    """Decides what is committed after a pass."""

    @property
    def keeps(self) -> bool:
        """Whether a committed token keeps its place, whatever later passes say."""
        ...

    def __call__(
        self, prediction: Prediction, committed_XS: Bool[Tensor, "X S"], iterations: int
    ) -> Bool[Tensor, "X S"]:
        """What is committed after this pass, of at most `iterations` passes."""
        ...


def _check_probability(key: str, value: float | int) -> None:
    if not 0.0 <= value <= 1.0:
        raise ValueError(f"refine.commit.{key}={value}: allowed [0, 1]")


@dataclass(frozen=True)
class PrefixThreshold:
    """From the left up to the first place less sure than `threshold` (arXiv 2606.08357, Alg. 2).

    Raises:
        ValueError: a threshold outside [0, 1].
    """

    threshold: float | int = 0.9
    keeps = False

    def __post_init__(self) -> None:
        _check_probability("threshold", self.threshold)

    def __call__(
        self, prediction: Prediction, committed_XS: Bool[Tensor, "X S"], iterations: int
    ) -> Bool[Tensor, "X S"]:
        """A prefix, in which given places are sure; those behind it stay given."""
        sure_XS = prediction.confidence_P >= self.threshold
        return committed_XS | (sure_XS | committed_XS).int().cumprod(-1).bool()


@dataclass(frozen=True)
class Threshold:
    """Every place at least so sure, and always the surest one (arXiv 2505.22618).

    Raises:
        ValueError: a threshold outside [0, 1].
    """

    threshold: float | int = 0.9
    keeps = True

    def __post_init__(self) -> None:
        _check_probability("threshold", self.threshold)

    def __call__(
        self, prediction: Prediction, committed_XS: Bool[Tensor, "X S"], iterations: int
    ) -> Bool[Tensor, "X S"]:
        """One place more at the least."""
        sure_XS = prediction.confidence_P >= self.threshold
        return committed_XS | sure_XS | _surest(prediction.confidence_P, committed_XS, 1)


@dataclass(frozen=True)
class TopK:
    """The surest ceil(S / iterations) places of every pass, so that the last one ends the block."""

    keeps = True

    def __call__(
        self, prediction: Prediction, committed_XS: Bool[Tensor, "X S"], iterations: int
    ) -> Bool[Tensor, "X S"]:
        """The same number in every pass."""
        count = math.ceil(committed_XS.shape[-1] / iterations)
        return committed_XS | _surest(prediction.confidence_P, committed_XS, count)


@dataclass(frozen=True)
class EntropyBound:
    """The places of least entropy whose entropies, the largest left out, sum to at most `bound`
    nats: their joint law is that close to the product (arXiv 2505.24857).

    Raises:
        ValueError: a negative bound.
    """

    bound: float | int = 0.1
    keeps = True

    def __post_init__(self) -> None:
        if not self.bound >= 0.0:
            raise ValueError(f"refine.commit.bound={self.bound}: allowed [0, inf)")

    def __call__(
        self, prediction: Prediction, committed_XS: Bool[Tensor, "X S"], iterations: int
    ) -> Bool[Tensor, "X S"]:
        """One place more at the least."""
        entropy_XS = prediction.entropy_P.masked_fill(committed_XS, torch.inf)
        sorted_XS, order_XS = entropy_XS.sort(dim=-1, stable=True)
        finite_XS = sorted_XS.masked_fill(sorted_XS.isinf(), 0.0)
        before_XS = finite_XS.cumsum(-1) - finite_XS
        taken_XS = (before_XS <= self.bound) & ~sorted_XS.isinf()
        return committed_XS | torch.zeros_like(committed_XS).scatter(-1, order_XS, taken_XS)


@dataclass(frozen=True)
class Sequential:
    """The leftmost place that is not committed, one a pass: S passes a block, the chain rule."""

    keeps = True

    def __call__(
        self, prediction: Prediction, committed_XS: Bool[Tensor, "X S"], iterations: int
    ) -> Bool[Tensor, "X S"]:
        """One place more."""
        open_XS = ~committed_XS
        return committed_XS | (open_XS & (open_XS.int().cumsum(-1) == 1))


def _surest(confidence_XS: Tensor, committed_XS: Tensor, count: int) -> Tensor:
    """The `count` most probable open places of every block."""
    open_XS = confidence_XS.masked_fill(committed_XS, -1.0)
    best_XK = open_XS.topk(min(count, open_XS.shape[-1]), dim=-1).indices
    chosen_XS = torch.zeros_like(committed_XS).scatter(-1, best_XK, True)
    return chosen_XS & ~committed_XS
