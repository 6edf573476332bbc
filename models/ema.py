"""Exponential moving average of the weights."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn


class ExponentialMovingAverage:
    """shadow <- d shadow + (1 - d) weight with d = min(decay, (1 + n) / (10 + n)) at update n.

    The warm-up of d lets the average forget the initial weights quickly. `state_dict` has the form
    of the bd3lms checkpoints: decay, num_updates and the shadows in the order of the parameters.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], decay: float) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"training.ema={decay}: allowed 0 <= ema < 1")
        self.decay, self.num_updates = decay, 0
        self.shadow = [p.detach().clone() for p in parameters if p.requires_grad]

    @torch.no_grad()
    def update(self, parameters: Iterable[nn.Parameter]) -> None:
        """Move the shadows towards the weights, all tensors in one multi-tensor call."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        weights = [p.detach() for p in parameters if p.requires_grad]
        torch._foreach_lerp_(self.shadow, weights, 1.0 - decay)

    @torch.no_grad()
    def swap(self, parameters: Iterable[nn.Parameter]) -> None:
        """Exchange weights and shadows; a second call undoes the first."""
        for shadow, weight in zip(
            self.shadow, (p for p in parameters if p.requires_grad), strict=True
        ):
            kept = weight.detach().clone()
            weight.copy_(shadow)
            shadow.copy_(kept)

    def state_dict(self) -> dict[str, float | int | list[Tensor]]:
        """{decay, num_updates, shadow_params}."""
        return {
            "decay": self.decay,
            "num_updates": self.num_updates,
            "shadow_params": [shadow.clone() for shadow in self.shadow],
        }

    def load_state_dict(self, state: dict) -> None:
        """Take over decay, counter and shadows; their number and shapes must match."""
        stored = state["shadow_params"]
        if [s.shape for s in stored] != [s.shape for s in self.shadow]:
            raise ValueError(
                f"ema.shadow_params: {len(stored)} tensors do not match the"
                f" {len(self.shadow)} parameters of this model"
            )
        if not 0.0 <= state["decay"] < 1.0:
            raise ValueError(f"ema.decay={state['decay']}: allowed 0 <= decay < 1")
        self.decay, self.num_updates = float(state["decay"]), int(state["num_updates"])
        for shadow, value in zip(self.shadow, stored, strict=True):
            shadow.copy_(value)

    def to(self, device: torch.device) -> None:
        """Move the shadows to where the weights are."""
        self.shadow = [shadow.to(device) for shadow in self.shadow]
