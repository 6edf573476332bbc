"""Keys and values of prompts that several rows go on from, held and read once.

Samples of one prompt would each hold a copy of its keys and values, and read it in every pass. Here
a row holds only its own tokens. Attention over the prompt is one product for the queries of all its
rows, and the two halves of a row are put together by their normalisers (arXiv 2402.05099):

    o = o_own + sigmoid(l_prompt - l_own) (o_prompt - o_own),     l = log sum exp(q k)

Legend: B rows in use, N rows of one prompt, H heads, G key heads, Q new tokens, M = H / G * Q
queries of a key head, X = N * M, P tokens of the prompt, S tokens of their own, K head dimension.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from models.row_cache import RowCache


@dataclass(eq=False)
class _Prompt:
    """Its length, and keys and values [G, P, K] of every layer."""

    length: int
    layers: list[tuple[Tensor, Tensor]]


class Shared(NamedTuple):
    """Which rows go on from a prompt."""

    row_N: Tensor
    prompt: _Prompt


class PrefixCache(RowCache):
    """A `RowCache` whose rows share the prompts that `admit` enters.

    `lengths` counts only what came behind the prompt, `positions` the prompt too. A pass has to be
    given `attention_options`, and needs the attention of `models.grouped_attention`.
    """

    def __init__(self, num_layers: int, num_rows: int) -> None:
        super().__init__(num_layers, num_rows)
        self._prompts: list[_Prompt] = []

    def admit(self, entering: Cache, lengths: Sequence[int], copies: int = 1) -> None:
        """Append `copies` rows without tokens of their own behind every prompt."""
        kept: list[list[tuple[Tensor, Tensor]]] = [[] for _ in lengths]
        for source in entering.layers:
            assert isinstance(source, CacheLayerMixin), "a layer of attention"
            assert source.keys is not None and source.values is not None, "the pass was made"
            assert source.keys.shape[2] >= max(lengths), "a layer that forgets nothing"
            for place, length in enumerate(lengths):
                both = (source.keys[place, :, :length], source.values[place, :, :length])
                # Copies, so that the padding of the others goes.
                kept[place].append((both[0].contiguous(), both[1].contiguous()))
            device = source.keys.device
        self.begin(copies * len(lengths), device)
        self._prompts += [
            prompt
            for prompt in map(_Prompt, lengths, kept)
            for _ in range(copies)
        ]  # fmt: skip

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all rows but these, and prompts that have no row left."""
        super().keep(rows)
        self._prompts = [self._prompts[row] for row in rows]

    def positions(self, queries: int) -> Tensor:
        """[B, Q] places of the next `queries` tokens of every row, its prompt included."""
        own_BQ = super().positions(queries)
        length_B = torch.tensor([prompt.length for prompt in self._prompts], device=own_BQ.device)
        return own_BQ + length_B[:, None]

    def attention_options(self) -> dict[str, Any]:
        """What attention has to know of the prompts."""
        rows_of: dict[_Prompt, list[int]] = {}
        for row, prompt in enumerate(self._prompts):
            rows_of.setdefault(prompt, []).append(row)
        device = self._rows.lengths_B.device
        return {
            "shared": [
                Shared(torch.tensor(rows, device=device), prompt)
                for prompt, rows in rows_of.items()
            ]
        }


def attend_behind(
    query_BHQK: Tensor, key_BGSK: Tensor, value_BGSK: Tensor, mask_B1QS: Tensor | None,
    scale: float, shared: Sequence[Shared], layer: int,
) -> Tensor:  # fmt: skip
    """Attention over own tokens and prompts, [B, H, Q, K].

    Args:
        query_BHQK: of the new tokens.
        key_BGSK, value_BGSK: own ones.
        mask_B1QS: 0 and -inf; None where a query sees all of them.
        scale: of the scores.
        shared: the prompts of all rows.
        layer: which of the prompts' layers.
    """
    _, heads, queries, _ = query_BHQK.shape
    ratio = heads // key_BGSK.shape[1]
    query_BGMK = (query_BHQK * scale).unflatten(1, (-1, ratio)).flatten(2, 3)
    mask_B1MS = None if mask_B1QS is None else mask_B1QS.repeat(1, 1, ratio, 1)
    out_BGMK, total_BGM1 = _attend(query_BGMK, key_BGSK, value_BGSK, mask_B1MS)
    for row_N, prompt in shared:
        key_GPK, value_GPK = prompt.layers[layer]
        query_GXK = query_BGMK[row_N].transpose(0, 1).flatten(1, 2)
        halves = _attend(query_GXK, key_GPK, value_GPK, None)
        before_NGMK, total_NGM1 = (
            half.unflatten(1, (len(row_N), -1)).transpose(0, 1) for half in halves
        )
        own_NGMK = out_BGMK[row_N]
        share_NGM1 = (total_NGM1 - total_BGM1[row_N]).sigmoid().to(own_NGMK.dtype)
        out_BGMK[row_N] = own_NGMK.lerp(before_NGMK, share_NGM1)
    return out_BGMK.unflatten(2, (ratio, queries)).flatten(1, 2)


def _attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Attention of [..., M, K] over [..., S, K], and log sum exp of the scores in fp32."""
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores += mask
    scores = scores.float()
    most = scores.amax(-1, keepdim=True)
    weights = scores.sub_(most).exp_()
    total = weights.sum(-1, keepdim=True)
    return (weights.to(value.dtype) @ value) / total.to(value.dtype), most + total.log()
