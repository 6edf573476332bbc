"""Masking schedules: how likely a token is masked at time t, and what that makes its loss weigh.

A token is masked at time t with probability p(t), p(0) = 0, p(1) = 1, p increasing. In continuous
time the negative evidence lower bound of absorbing-state diffusion is (arXiv 2406.07524, eq. 10,
with alpha_t = 1 - p(t)):

    -log p(x) <= E_{t ~ U[0,1]} [ p'(t)/p(t) * sum_{l masked} -log p_theta(x_l | x_t) ].

Substituting p for t shows that the bound is the same for every schedule; only the variance of its
Monte-Carlo estimate differs. `weight` is p'(t)/p(t).

All methods take and return float tensors of any shape, with t in (0, 1].
"""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Schedule(ABC):
    """A masking schedule p(t) with its loss weight p'(t)/p(t)."""

    @abstractmethod
    def probability(self, t: Tensor) -> Tensor:
        """p(t): the chance that a token is masked at time t."""

    @abstractmethod
    def weight(self, t: Tensor) -> Tensor:
        """p'(t)/p(t): the weight of a masked token's cross-entropy in the bound."""


class LogLinear(Schedule):
    """p(t) = (1 - eps) t, weight 1/t; the name is that of -log(1 - p), linear in log time.

    Args:
        eps: 0 for block diffusion (arXiv 2503.09573); 1e-3 for the checkpoints of
            arXiv 2406.07524, which never mask a whole sequence with certainty.
    """

    def __init__(self, eps: float = 0.0) -> None:
        if not 0.0 <= eps < 1.0:
            raise ValueError(f"noise.eps={eps}: allowed 0 <= eps < 1")
        self.eps = eps

    def probability(self, t: Tensor) -> Tensor:
        """(1 - eps) t."""
        return (1.0 - self.eps) * t

    def weight(self, t: Tensor) -> Tensor:
        """1 / t."""
        return t.reciprocal()


class Power(Schedule):
    """p(t) = t^k, weight k/t: `square` (k = 2) and `square_root` (k = 1/2) of arXiv 2503.09573."""

    def __init__(self, exponent: float) -> None:
        if not exponent > 0.0:
            raise ValueError(f"noise.exponent={exponent}: allowed exponent > 0")
        self.exponent = exponent

    def probability(self, t: Tensor) -> Tensor:
        """t^k."""
        return t.pow(self.exponent)

    def weight(self, t: Tensor) -> Tensor:
        """k / t."""
        return self.exponent * t.reciprocal()


class Cosine(Schedule):
    """p(t) = 1 - cos(pi t / 2), weight (pi/2) cot(pi t / 4)."""

    def probability(self, t: Tensor) -> Tensor:
        """1 - cos(pi t / 2), written as 2 sin^2(pi t / 4) to keep its digits near 0."""
        return 2.0 * torch.sin(t * (math.pi / 4)).square()

    def weight(self, t: Tensor) -> Tensor:
        """(pi/2) sin(pi t / 2) / (1 - cos(pi t / 2)) = (pi/2) / tan(pi t / 4)."""
        return (math.pi / 2) / torch.tan(t * (math.pi / 4))


class Logarithmic(Schedule):
    """p(t) = log2(1 + t), weight 1 / ((1 + t) log(1 + t))."""

    def probability(self, t: Tensor) -> Tensor:
        """log(1 + t) / log 2."""
        return torch.log1p(t) / math.log(2.0)

    def weight(self, t: Tensor) -> Tensor:
        """1 / ((1 + t) log(1 + t))."""
        return ((1.0 + t) * torch.log1p(t)).reciprocal()
