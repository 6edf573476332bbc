"""A new objective in one module: masked diffusion whose loss weights are tempered.

Legend: M masked rows.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from diffusion import MDLM
from runtime.errors import ConfigError


def tempered(weight_M: Float[Tensor, " M"], power: float) -> Float[Tensor, " M"]:
    """w^power: 1 is the likelihood bound, 0 the loss of a masked language model."""
    return weight_M.pow(power)


class TemperedMDLM(MDLM):
    """MDLM trained with w^power in place of w = p'(t)/p(t); validation stays the bound."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        self.power = self.config["algo"]["power"]
        if not 0.0 <= self.power <= 1.0:
            raise ConfigError(f"algo.power={self.power}: allowed 0 <= power <= 1")

    def corrupt(self, batch: dict[str, Tensor], step: int) -> dict[str, Tensor]:
        """What MDLM draws, with the weights tempered and the loss divided by their sum."""
        inputs = super().corrupt(batch, step)
        inputs["weights"] = tempered(inputs["weights"], self.power)
        if self.power < 1.0:
            inputs["scored"] = inputs["weights"].sum().clamp(min=torch.finfo(torch.float32).tiny)
        return inputs
