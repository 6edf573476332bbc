"""Keys and values of sequences of different lengths, written in place.

The cache that `transformers` brings copies itself at every token and wants all sequences equally
long. Here every row has a length of its own: rows enter when they begin and leave when they end,
and the rows in use are always the first ones.

Legend: B rows in use, P rows that enter, H heads of keys, S tokens, W columns in use, D head size.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

# Columns are added in steps of at least this many.
_STEP = 64


class RaggedCache(Cache):
    """A cache of at most `num_rows` rows for decoding one token per row and forward pass.

    A pass is `begin_step()`, the model with this cache, and `end_step()`.

    Args:
        num_layers: of the model.
        num_rows: most rows at a time.
    """

    def __init__(self, num_layers: int, num_rows: int) -> None:
        self.num_rows = num_rows
        self.lengths: list[int] = []
        self.ragged_layers = [_RaggedLayer(num_rows) for _ in range(num_layers)]
        super().__init__(layers=list(self.ragged_layers))

    def admit(self, entering: Cache, lengths: list[int]) -> None:
        """Append rows.

        Args:
            entering: their keys and values, of a pass over prompts padded on the right.
            lengths: tokens of every row without the padding.
        """
        first = len(self.lengths)
        assert first + len(lengths) <= self.num_rows, "no room for these rows"
        for layer, source in zip(self.ragged_layers, entering.layers, strict=True):
            assert isinstance(source, CacheLayerMixin), "a layer of attention"
            assert source.keys is not None and source.values is not None, "the pass was made"
            layer.write_rows(first, source.keys, source.values)
        self.lengths += lengths

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its number."""
        last = len(self.lengths) - 1
        if row != last:
            for layer in self.ragged_layers:
                layer.move_row(last, row, self.lengths[last])
            self.lengths[row] = self.lengths[last]
        self.lengths.pop()

    def begin_step(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Prepare a pass over one more token of every row.

        Returns:
            its positions [B, 1] and the additive mask of attention [B, 1, 1, W].
        """
        length_B = torch.tensor(self.lengths, device=device)
        width = max(self.lengths) + 1
        for layer in self.ragged_layers:
            layer.begin_step(length_B, width)
        hidden_BW = torch.arange(width, device=device) > length_B[:, None]
        mask_BW = torch.zeros_like(hidden_BW, dtype=dtype).masked_fill_(
            hidden_BW, torch.finfo(dtype).min
        )
        return length_B[:, None], mask_BW[:, None, None]

    def end_step(self) -> None:
        """Count the token that the pass has written."""
        self.lengths = [length + 1 for length in self.lengths]


class _RaggedLayer(CacheLayerMixin):
    is_sliding = False

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows
        self.length_B = torch.zeros(0, dtype=torch.long)
        self.row_B = self.length_B
        self.width = 0

    def write_rows(self, first: int, keys_PHSD: Tensor, values_PHSD: Tensor) -> None:
        rows, _, width, _ = keys_PHSD.shape
        self._reserve(width, keys_PHSD, values_PHSD)
        assert self.keys is not None and self.values is not None
        self.keys[first : first + rows, :, :width] = keys_PHSD
        self.values[first : first + rows, :, :width] = values_PHSD

    def move_row(self, source: int, target: int, length: int) -> None:
        assert self.keys is not None and self.values is not None
        self.keys[target, :, :length] = self.keys[source, :, :length]
        self.values[target, :, :length] = self.values[source, :, :length]

    def begin_step(self, length_B: Tensor, width: int) -> None:
        assert self.keys is not None and self.values is not None
        self.length_B, self.width = length_B, width
        self.row_B = torch.arange(len(length_B), device=length_B.device)
        self._reserve(width, self.keys, self.values)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write one token per row at its own place; the keys and values of all rows in use."""
        assert self.keys is not None and self.values is not None
        self.keys[self.row_B, :, self.length_B] = key_states[:, :, 0]
        self.values[self.row_B, :, self.length_B] = value_states[:, :, 0]
        rows = len(self.row_B)
        return self.keys[:rows, :, : self.width], self.values[:rows, :, : self.width]

    def _reserve(self, width: int, keys_like: Tensor, values_like: Tensor) -> None:
        """Have at least `width` columns. Those beyond a row's length are zero or old, never nan:
        attention multiplies them by zero."""
        held = 0 if self.keys is None else self.keys.shape[2]
        if width <= held:
            return
        columns = max(width, held + held // 2)
        columns += -columns % _STEP
        self.keys = _wider(self.keys, keys_like, self.num_rows, columns)
        self.values = _wider(self.values, values_like, self.num_rows, columns)
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: rows enter by `write_rows`."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns of the pass and where they begin."""
        return self.width, 0

    def get_seq_length(self) -> int:
        """Columns before the pass."""
        return max(self.width - 1, 0)

    def get_max_length(self) -> int:
        """No limit."""
        return -1


def _wider(old: Tensor | None, like: Tensor, num_rows: int, columns: int) -> Tensor:
    new = like.new_zeros(num_rows, like.shape[1], columns, like.shape[3])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new
