"""Left-to-right decoding: an autoregressive model as a denoiser of one position at a time.

The prediction for position l is read at position l - 1, so a pass computes the tokens that are not
cached yet, usually one, and nothing for the position itself.
"""

import torch
from torch import Tensor

from decoding.denoiser import CachedContext, NetworkPass, Segment
from models.dit import DiT


class AutoregressiveDenoiser:
    """Ancestral sampling, exact with or without the cache.

    Args:
        kv_cache: keep keys and values of the past instead of computing them again.
    """

    device: torch.device

    def __init__(self, backbone: DiT, mask_id: int, kv_cache: bool = True) -> None:
        self._run = NetworkPass(backbone, mask_id)
        self._context = CachedContext(backbone, self._run.dtype, 1, kv_cache)
        self.device = self._run.device

    def begin(self, batch_size: int, length: int) -> list[Segment]:
        """One segment per position."""
        self._context.begin(batch_size, length)
        return [(place, place + 1) for place in range(length)]

    def logits(self, x_BL: Tensor, start: int, end: int, rows_M: Tensor) -> Tensor:
        """Prediction for position `start` from everything before it."""
        assert start > 0 and end == start + 1, "the first token is given"
        first, attention = self._context.attend(start, start)
        total = start - first
        logits_MV = self._run(x_BL[:, first:start], attention, rows_M * total + total - 1, 0)
        self._context.commit(start)
        return logits_MV
