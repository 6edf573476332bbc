"""When each place of a generation was filled.

Legend: B sequences, L length.
"""

import torch
from jaxtyping import Int
from torch import Tensor


class RevealTrace:
    """A hook for `on_step` of `decoding.denoise.generate`: in which pass a place got its token.

    It compares on the device and never waits for it.

    Args:
        start_BL: the sequences before the first pass, masked where they are to be generated, on
            the device of the generation (`decoding.denoise.with_prompts`).
        mask_id: the mask token.

    Attributes:
        step_BL: number of the pass from 0; -1 where a token was given, or never came.
        passes: how many there were.
    """

    def __init__(self, start_BL: Int[Tensor, "B L"], mask_id: int) -> None:
        self._mask_id = mask_id
        self._hidden_BL = start_BL == mask_id
        self.step_BL = torch.full_like(start_BL, -1)
        self.passes = 0

    def __call__(self, x_BL: Int[Tensor, "B L"]) -> None:
        """Note what is new after a pass."""
        new_BL = self._hidden_BL & (x_BL != self._mask_id)
        self.step_BL = torch.where(new_BL, self.passes, self.step_BL)
        self._hidden_BL = self._hidden_BL & ~new_BL
        self.passes += 1
