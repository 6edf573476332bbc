"""Keys and values of sequences that each have a length of their own, kept without holes.

A row's tokens always lie at 0 .. length - 1. A pass writes Q new tokens at each row's own end;
`commit` then says how many of them every row keeps, one in plain decoding, the accepted prefix in
verification. What was not kept is written over by the next pass: nothing is cropped or moved. Rows
enter when they begin and leave when they end, and the rows in use are always the first ones.

(`DynamicCache` of transformers joins old and new keys in every pass, which copies the whole
context, and its `crop` cuts all rows alike; in 5.23 it takes the number of tokens to drop, as a
negative one, not the number to keep.)

Legend: B rows in use, P rows that enter, H key heads, Q new tokens, S tokens a pass sees, C
capacity, K head dimension.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

# Capacity grows by half, rounded up to this many tokens; growing copies what is there.
STEP = 64


class RowCache(Cache):
    """A cache of at most `num_rows` rows for a causal model with full attention.

    A pass is the model on [B, Q] tokens with this cache, its `positions(Q)` and its `mask(Q)`;
    then `commit`.

    Args:
        num_layers: of the model.
        num_rows: most rows at a time.
    """

    def __init__(self, num_layers: int, num_rows: int) -> None:
        self.num_rows = num_rows
        self._rows = _Rows()
        self._stores = [_RowLayer(self._rows, num_rows) for _ in range(num_layers)]
        super().__init__(layers=[*self._stores])

    @property
    def lengths(self) -> list[int]:
        """Tokens of every row in use."""
        return self._rows.lengths

    def admit(self, entering: Cache, lengths: Sequence[int], copies: int = 1) -> None:
        """Append rows.

        Args:
            entering: their keys and values, of a pass over prompts padded on the right.
            lengths: tokens of every row without the padding.
            copies: how often each of them enters, side by side: answers that share a prompt.
        """
        first = len(self.lengths)
        assert first + copies * len(lengths) <= self.num_rows, "no room for these rows"
        for store, source in zip(self._stores, entering.layers, strict=True):
            assert isinstance(source, CacheLayerMixin), "a layer of attention"
            assert source.keys is not None and source.values is not None, "the pass was made"
            assert source.keys.shape[2] >= max(lengths), "a layer that forgets nothing"
            store.enter(first, source.keys, source.values, copies)
            self._rows.lengths_B = self._rows.lengths_B.to(source.keys.device)
        self._rows.set([*self.lengths, *(length for length in lengths for _ in range(copies))])

    def begin(self, rows: int, device: torch.device) -> None:
        """Append rows without tokens."""
        assert len(self.lengths) + rows <= self.num_rows, "no room for these rows"
        self._rows.lengths_B = self._rows.lengths_B.to(device)
        self._rows.set([*self.lengths, *[0] * rows])

    def commit(self, counts: Sequence[int]) -> None:
        """Keep the first `counts[b]` of the tokens that the last pass wrote behind row b."""
        self._rows.set([length + count for length, count in zip(self.lengths, counts, strict=True)])

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, which stay in this order."""
        moved = [(place, row) for place, row in enumerate(rows) if place != row]
        if moved:
            places, sources = map(list, zip(*moved, strict=True))
            longest = max(self.lengths[row] for row in sources)
            for store in self._stores:
                store.move(sources, places, longest)
        self._rows.set([self.lengths[row] for row in rows])

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its number."""
        *others, last = range(len(self.lengths))
        self.keep([last if other == row else other for other in others])

    def positions(self, queries: int) -> Tensor:
        """[B, Q] places of the next `queries` tokens of every row."""
        return self._rows.positions(queries)

    def attention_options(self) -> dict[str, Any]:
        """What a pass has to be told beside positions and mask."""
        return {}

    def mask(self, queries: int, dtype: torch.dtype) -> Tensor | None:
        """What the next `queries` tokens of every row may see: its past, and up to themselves.

        Returns:
            0 and -inf, [B, 1, Q, S], as every attention of transformers takes it; None where all
            may see everything.
        """
        if queries == 1 and len(set(self.lengths)) == 1:
            return None
        position_BQ = self._rows.positions(queries)
        place_S = torch.arange(self._rows.longest + queries, device=position_BQ.device)
        hidden_BQS = place_S > position_BQ[..., None]
        mask_BQS = torch.zeros(hidden_BQS.shape, dtype=dtype, device=hidden_BQS.device)
        return mask_BQS.masked_fill_(hidden_BQS, float("-inf"))[:, None]


class _Rows:
    """How long the rows in use are. Of its own, because layers that knew their cache would keep it
    alive with all its memory until the garbage collector comes by."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        self.lengths_B = torch.zeros(0, dtype=torch.long)

    def set(self, lengths: list[int]) -> None:
        """These rows are in use."""
        self.lengths = lengths
        self.lengths_B = torch.tensor(lengths, dtype=torch.long, device=self.lengths_B.device)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(self.lengths, default=0)

    def positions(self, queries: int) -> Tensor:
        """[B, Q] places of the next `queries` tokens of every row."""
        return self.lengths_B[:, None] + torch.arange(queries, device=self.lengths_B.device)


class _RowLayer(CacheLayerMixin):
    """One layer's keys and values, [num_rows, H, C, K]; `rows` says where new ones go."""

    is_sliding = False

    def __init__(self, rows: _Rows, num_rows: int) -> None:
        super().__init__()
        self._rows, self._num_rows = rows, num_rows

    def enter(self, first: int, keys_PHSK: Tensor, values_PHSK: Tensor, copies: int) -> None:
        """Write rows that were read elsewhere, from row `first` on, each of them `copies` times."""
        rows, _, width, _ = keys_PHSK.shape
        self._reserve(width, keys_PHSK, values_PHSK)
        assert self.keys is not None and self.values is not None
        for store, entering in ((self.keys, keys_PHSK), (self.values, values_PHSK)):
            places = store[first : first + rows * copies, :, :width]
            places.unflatten(0, (rows, copies)).copy_(entering[:, None])

    def move(self, sources: list[int], places: list[int], length: int) -> None:
        """Copy the first `length` tokens of some rows to other places, all at once."""
        if length == 0:
            return
        assert self.keys is not None and self.values is not None
        self.keys[places, :, :length] = self.keys[sources, :, :length]
        self.values[places, :, :length] = self.values[sources, :, :length]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, K] behind every row; back comes all up to the longest row's end."""
        rows, end = len(self._rows.lengths), self._rows.longest + key_states.shape[-2]
        self._reserve(end, key_states, value_states)
        assert self.keys is not None and self.values is not None
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def _write(self, store: Tensor, new_BHQK: Tensor) -> None:
        rows, _, queries, _ = new_BHQK.shape
        lengths = self._rows.lengths
        if len(set(lengths)) == 1:
            store[:rows, :, lengths[0] : lengths[0] + queries] = new_BHQK
            return
        row_B1 = torch.arange(rows, device=new_BHQK.device)[:, None]
        # Two indices side by side in a transposed view: indexed apart, PyTorch reorders the axes.
        store.transpose(1, 2)[row_B1, self._rows.positions(queries)] = new_BHQK.transpose(1, 2)

    def _reserve(self, width: int, keys_like: Tensor, values_like: Tensor) -> None:
        """Have room for `width` tokens. What lies beyond a row's length is zero or old, never nan:
        attention multiplies it by zero."""
        held = 0 if self.keys is None else self.keys.shape[2]
        if width > held:
            capacity = max(width, held + held // 2)
            capacity += -capacity % STEP
            self.keys = _wider(self.keys, keys_like, self._num_rows, capacity)
            self.values = _wider(self.values, values_like, self._num_rows, capacity)
            self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `_reserve` makes the room."""

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Tokens that a pass sees, and the first of them."""
        return self._rows.longest + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens of the longest row."""
        return self._rows.longest

    def get_max_length(self) -> int:
        """No maximum."""
        return -1


def _wider(old: Tensor | None, like: Tensor, num_rows: int, capacity: int) -> Tensor:
    new = like.new_zeros(num_rows, like.shape[1], capacity, like.shape[3])
    if old is not None:
        new[:, :, : old.shape[2]] = old
    return new


def prefill(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], cache: RowCache, copies: int = 1
) -> Tensor:
    """Read prompts, whose rows enter the cache; what the head reads behind each of them, [P, D].

    Padding stands on the right, where no token of a prompt looks.
    """
    lengths = [len(prompt) for prompt in prompts]
    ids_PS = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
    for place, prompt in enumerate(prompts):
        ids_PS[place, : lengths[place]] = torch.tensor(prompt)
    fresh = DynamicCache(config=model.config)
    hidden_PSD = model.base_model(
        input_ids=ids_PS.to(model.device), past_key_values=fresh, use_cache=True
    ).last_hidden_state
    cache.admit(fresh, lengths, copies)
    row_P = torch.arange(len(prompts), device=model.device)
    return hidden_PSD[row_P, torch.tensor(lengths, device=model.device) - 1]
