"""Keys and values of the accepted text, for drafting; every sequence has its own length.

Legend: L layers, B sequences, T capacity, C new tokens, G key heads, K head dimension.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class DraftCache:
    """Context keys and values of all layers, valid up to `length_B` tokens in every row.

    Attributes:
        length_B: tokens of every row.
        longest: the largest of them, known to the host.

    Args:
        shape: (L, B, T, G, K).
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self._keys = torch.zeros(shape, dtype=dtype, device=device)
        self._values = torch.zeros(shape, dtype=dtype, device=device)
        self.length_B = torch.zeros(shape[1], dtype=torch.long, device=device)
        self.longest = 0

    @property
    def capacity(self) -> int:
        """Tokens that fit before the cache grows."""
        return self._keys.shape[2]

    def reserve(self, count: int, valid_BC: Bool[Tensor, "B C"] | None) -> Int[Tensor, "B C"]:
        """Count `count` new tokens in, and say where each of them goes.

        Tokens that are not valid go behind the new end of their row, where nobody looks and the
        next ones overwrite them.
        """
        self._grow(self.longest + count)
        if valid_BC is None:
            place_BC = self.length_B[:, None] + torch.arange(count, device=self.length_B.device)
            self.length_B = self.length_B + count
            self.longest += count
            return place_BC
        kept_BC = valid_BC.long().cumsum(1)
        dropped_BC = (~valid_BC).long().cumsum(1)
        offset_BC = torch.where(valid_BC, kept_BC, kept_BC[:, -1:] + dropped_BC) - 1
        place_BC = self.length_B[:, None] + offset_BC
        self.length_B = self.length_B + kept_BC[:, -1]
        self.longest = int(self.length_B.max())
        return place_BC

    def write(
        self,
        layer: int,
        key_values: tuple[Float[Tensor, "B C G K"], Float[Tensor, "B C G K"]],
        place_BC: Int[Tensor, "B C"],
    ) -> None:
        """Store one layer's keys and values of new tokens."""
        row_B1 = torch.arange(place_BC.shape[0], device=place_BC.device)[:, None]
        for store, new in zip((self._keys, self._values), key_values, strict=True):
            store[layer][row_B1, place_BC] = new.to(store.dtype)

    def read(self, layer: int) -> tuple[Float[Tensor, "B T G K"], Float[Tensor, "B T G K"]]:
        """One layer's keys and values up to the longest row."""
        return self._keys[layer, :, : self.longest], self._values[layer, :, : self.longest]

    def select(self, rows_A: Int[Tensor, " A"]) -> "DraftCache":
        """A cache of some rows, in that order: the others are finished."""
        L, _, T, G, K = self._keys.shape
        some = DraftCache((L, 0, T, G, K), self._keys.dtype, self._keys.device)
        some._keys, some._values = self._keys[:, rows_A], self._values[:, rows_A]
        some.length_B, some.longest = self.length_B[rows_A], self.longest
        return some

    def _grow(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        L, B, old, G, K = self._keys.shape
        for name in ("_keys", "_values"):
            store = getattr(self, name)
            larger = store.new_zeros(L, B, max(needed, 2 * old), G, K)
            larger[:, :, :old] = store
            setattr(self, name, larger)
