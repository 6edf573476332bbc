"""Keys and values of a target whose sequences have lengths of their own, kept without holes.

Verification writes a block behind every sequence and keeps a part of it, another one in every row.
Here a row's tokens always lie at 0 .. length - 1: a block is written at each row's own end, and
what was not accepted is simply written over by the next block. Nothing is cropped or moved, and
memory is that of the longest row and a block, rounded up to `STEP` tokens.

(`DynamicCache` of transformers joins old and new keys in every pass, which copies the whole
context, and its `crop` cuts all rows alike; in 5.23 it takes the number of tokens to drop, as a
negative one, not the number to keep.)

Legend: B sequences, H key heads, Q new tokens, C capacity, K head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from models.decodable import check_decodable

# Tokens by which the memory grows; growing copies it.
STEP = 256


class RowCacheLayer(CacheLayerMixin):
    """One layer's keys and values, [B, H, C, K]; `cache` says where new ones go."""

    def __init__(self, cache: "RowCache") -> None:
        super().__init__()
        self._cache = cache

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make room for the first tokens."""
        self.keys, self.values = (
            new.new_zeros(*new.shape[:2], 0, new.shape[3]) for new in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, K] behind every row; back comes all up to the longest row's end."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        starts, end = self._cache.starts, self._cache.longest + key_states.shape[-2]
        self.keys = _written(self.keys, key_states, starts, self._cache.starts_B, end)
        self.values = _written(self.values, value_states, starts, self._cache.starts_B, end)
        return self.keys[:, :, :end], self.values[:, :, :end]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys that a pass sees, and the first of them."""
        return self._cache.longest + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self._cache.longest

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


class RowCache(Cache):
    """A cache for transformers' causal models with full attention.

    Args:
        model: the target.
        batch: B.

    Attributes:
        starts: length of every row.
        starts_B: the same on the device.

    Raises:
        DataError: a model that cannot decode so (`models.decodable`).
    """

    def __init__(self, model: Any, batch: int) -> None:
        check_decodable(model.config, model.config.model_type)
        self._rows = [RowCacheLayer(self) for _ in range(model.config.num_hidden_layers)]
        super().__init__(layers=[*self._rows])
        self._device = model.device
        self.starts: list[int] = []
        self.starts_B: Int[Tensor, " B"]
        self._set([0] * batch)

    @property
    def longest(self) -> int:
        """Length of the longest row."""
        return max(self.starts)

    def commit(self, counts: Sequence[int]) -> None:
        """Keep the first `counts[b]` of the tokens that the last pass wrote behind row b."""
        self._set([start + count for start, count in zip(self.starts, counts, strict=True)])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other rows; the rest stay in this order."""
        rows_A = torch.tensor(rows, device=self._device)
        longest = max(self.starts[row] for row in rows)
        for layer in self._rows:
            assert layer.keys is not None and layer.values is not None
            layer.keys, layer.values = (x[rows_A, :, :longest] for x in (layer.keys, layer.values))
        self._set([self.starts[row] for row in rows])

    def visible(self, queries: int) -> Bool[Tensor, "B 1 Q S"]:
        """What `queries` new tokens of every row may see: its past, and those up to themselves."""
        place_S = torch.arange(self.longest + queries, device=self._device)
        own_BQ = self.starts_B[:, None] + torch.arange(queries, device=self._device)
        return (place_S <= own_BQ[..., None])[:, None]

    def positions(self, queries: int) -> Int[Tensor, "B Q"]:
        """Places of the next `queries` tokens of every row."""
        return self.starts_B[:, None] + torch.arange(queries, device=self._device)

    def _set(self, starts: list[int]) -> None:
        self.starts = starts
        self.starts_B = torch.tensor(starts, device=self._device)


def additive(visible_B1QS: Bool[Tensor, "B 1 Q S"], dtype: torch.dtype) -> Float[Tensor, "B 1 Q S"]:
    """0 where it may look and -inf elsewhere: what every attention of transformers takes."""
    mask = torch.zeros(visible_B1QS.shape, dtype=dtype, device=visible_B1QS.device)
    return mask.masked_fill_(~visible_B1QS, float("-inf"))


def _written(
    store: Tensor | None, new: Tensor, starts: Sequence[int], starts_B: Tensor, end: int
) -> Tensor:
    """`store` with [B, H, Q, K] written at each row's start, grown if `end` is behind its end."""
    assert store is not None
    capacity, queries = store.shape[2], new.shape[2]
    if end > capacity:
        rounded = -(-end // STEP) * STEP
        larger = store.new_zeros(*store.shape[:2], rounded, store.shape[3])
        larger[:, :, :capacity] = store
        store = larger
    if all(start == starts[0] for start in starts):
        store[:, :, starts[0] : starts[0] + queries] = new
        return store
    row_B1 = torch.arange(len(starts), device=new.device)[:, None]
    place_BQ = starts_B[:, None] + torch.arange(queries, device=new.device)
    store.transpose(1, 2)[row_B1, place_BQ] = new.transpose(1, 2)
    return store
