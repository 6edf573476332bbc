"""The weights that a policy is compared with: those it started from, or others that follow it.

    frozen     the start
    periodic   the policy's own, taken over every n steps
    ema        shadow <- d shadow + (1 - d) weight after every step

Only what is trained differs from the policy, so only that is kept, a second time.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KINDS = ("frozen", "periodic", "ema")
OPTIONS = ("kind", "every", "decay")


class ReferenceWeights:
    """A second set of the trained weights, exchanged with the policy's where it is asked for.

    Args:
        parameters: that are trained.
        kind: frozen, periodic or ema.
        every: steps between two that are taken over (periodic).
        decay: d (ema).

    Raises:
        ValueError: a kind or a number that is not allowed.
    """

    def __init__(
        self, parameters: Sequence[nn.Parameter], kind: str, every: int = 1, decay: float = 0.999
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"algo.reference.kind={kind}: allowed {', '.join(KINDS)}")
        if every < 1 or not 0.0 <= decay < 1.0:
            raise ValueError(
                f"algo.reference: every={every}, decay={decay}; allowed every >= 1 and decay in"
                " [0, 1)"
            )
        self.kind, self.every, self.decay, self.steps = kind, every, decay, 0
        self.weights = [parameter.detach().clone() for parameter in parameters]

    @torch.no_grad()
    def follow(self, parameters: Sequence[nn.Parameter]) -> None:
        """The policy has taken a step."""
        self.steps += 1
        live = [parameter.detach() for parameter in parameters]
        if self.kind == "ema":
            torch._foreach_lerp_(self.weights, live, 1.0 - self.decay)
        elif self.kind == "periodic" and self.steps % self.every == 0:
            torch._foreach_copy_(self.weights, live)

    @contextmanager
    def in_place(self, parameters: Sequence[nn.Parameter]) -> Iterator[None]:
        """Inside, the policy's parameters hold these weights; no number is copied."""
        live = [parameter.data for parameter in parameters]
        try:
            _hold(parameters, self.weights)
            yield
        finally:
            _hold(parameters, live)

    def to(self, device: torch.device) -> None:
        """Move to where the policy is."""
        self.weights = [weight.to(device) for weight in self.weights]

    def state_dict(self) -> dict[str, int | list[Tensor]]:
        """{steps, weights}."""
        return {"steps": self.steps, "weights": [weight.clone() for weight in self.weights]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over counter and weights.

        Raises:
            ValueError: their number or shapes are others.
        """
        shapes = [weight.shape for weight in self.weights]
        if [weight.shape for weight in state["weights"]] != shapes:
            raise ValueError("reference.weights: not of the shapes of the trained weights")
        self.steps = int(state["steps"])
        for weight, stored in zip(self.weights, state["weights"], strict=True):
            weight.copy_(stored)


def _hold(parameters: Sequence[nn.Parameter], weights: Sequence[Tensor]) -> None:
    for parameter, weight in zip(parameters, weights, strict=True):
        parameter.data = weight
    # Autocast knows its rounded copies by the parameter, and would go on with the other weights'.
    torch.clear_autocast_cache()
