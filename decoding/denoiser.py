"""A network as the sampling loop sees it: logits for chosen rows of the segment being denoised.

    WindowDenoiser   MDLM: the whole sequence at once, and beyond its length a sliding window
    BlockDenoiser    BD3-LM: one block after the other, given the finished ones in a cache

Positions before the segment are finished and never change again.

Legend: B sequences, L length, S positions of the segment, T of the network's input, M rows,
V vocabulary.
"""

from functools import lru_cache
from itertools import pairwise
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.attention import CachedAttention, FullAttention
from models.dit import DiT, Modulation

Segment = tuple[int, int]


@runtime_checkable
class Denoiser(Protocol):
    """What generation needs of a model."""

    device: torch.device

    def begin(self, batch_size: int, length: int) -> list[Segment]:
        """Prepare for new sequences; the (start, end) of the segments to denoise, in order."""
        ...

    def logits(
        self, x_BL: Int[Tensor, "B L"], start: int, end: int, rows_M: Int[Tensor, " M"]
    ) -> Float[Tensor, "M V"]:
        """One pass of the network.

        Args:
            x_BL: tokens, finished before `start`, partly masked in start..end.
            start: first position of the segment.
            end: position behind its last one.
            rows_M: rows of the flattened [B * (end - start)] whose token is wanted.
        """
        ...


class NetworkPass:
    """One forward pass of a DiT for chosen rows, with its conditioning computed beforehand."""

    def __init__(self, backbone: DiT, mask_id: int) -> None:
        self.backbone, self.mask_id = backbone, mask_id
        embedding = backbone.vocab_embed.embedding
        self.dtype, self.device = embedding.dtype, embedding.device
        self._constant = None if backbone.time_conditioning else self._modulations(None)

    def __call__(
        self, ids_BT: Tensor, attention: FullAttention | CachedAttention, rows_M: Tensor, noisy: int
    ) -> Float[Tensor, "M V"]:
        """Logits without the mask token; the last `noisy` positions of the input are noisy."""
        modulations = self._constant
        if modulations is None:
            modulations = self._modulations(self._noise_level(ids_BT, noisy))
        features_MD = self.backbone(ids_BT, attention, rows_M=rows_M, modulations=modulations)
        logits_MV = self.backbone.logits(features_MD).float()
        logits_MV[:, self.mask_id] = -torch.inf
        return logits_MV

    def _modulations(self, sigma_BT: Tensor | None) -> list[Modulation]:
        in_fp32 = self.backbone.modulations(sigma_BT)
        return [tuple(part.to(self.dtype) for part in parts) for parts in in_fp32]

    def _noise_level(self, ids_BT: Tensor, noisy: int) -> Tensor:
        """-log(1 - rate), rate being the masked share of the noisy positions; 0 for clean ones.

        The likelihood bound conditions on the realised rate as well, of the places that may be
        masked; here what is given (BOS, a prompt) counts as revealed.
        """
        sigma_BT = torch.zeros(ids_BT.shape, device=ids_BT.device)
        if noisy:
            rate_B1 = (ids_BT[:, -noisy:] == self.mask_id).float().mean(-1, keepdim=True)
            sigma_BT[:, -noisy:] = -torch.log1p(-rate_B1 * (1.0 - 1e-3))
        return sigma_BT


def running(rows_M: Tensor, segment: int, batch: int) -> Tensor | None:
    """The sequences that these rows of [B * S] belong to; None if it is all, or not worth asking.

    Sequences whose segment is finished wait for the others; nothing need be computed for them. On a
    GPU asking means waiting for it, which costs more than their part of a pass.
    """
    if rows_M.is_cuda or batch == 1:
        return None
    sequences = (rows_M // segment).unique()
    return sequences if len(sequences) < batch else None


def rows_among(rows_M: Tensor, segment: int, sequences: Tensor) -> Tensor:
    """Rows of [B * S] as rows of [len(sequences) * S]; `sequences` is sorted."""
    place_M = torch.searchsorted(sequences, rows_M // segment)
    return place_M * segment + rows_M % segment


def rows_of_input(rows_M: Tensor, segment: int, total: int) -> Tensor:
    """Rows of [B * S] as rows of [B * T], the segment being the end of the T input positions."""
    return rows_M // segment * total + total - segment + rows_M % segment


class WindowDenoiser:
    """Bidirectional attention over at most `backbone.length` positions.

    Longer sequences are denoised half a window at a time, given the half before it.
    """

    def __init__(self, backbone: DiT, mask_id: int) -> None:
        self._run = NetworkPass(backbone, mask_id)
        self._length = backbone.length
        self.device = self._run.device
        self._attention = lru_cache(maxsize=2)(self._new_attention)

    def begin(self, batch_size: int, length: int) -> list[Segment]:
        """One segment as long as the model, then strides of half of it."""
        window, stride = self._length, max(1, self._length // 2)
        edges = [0, min(window, length), *range(window + stride, length, stride)]
        if length > window:
            edges.append(length)
        return list(pairwise(edges))

    def logits(self, x_BL: Tensor, start: int, end: int, rows_M: Tensor) -> Tensor:
        """Everything in the window sees everything in it."""
        ids_BT = x_BL[:, max(0, end - self._length) : end]
        width = ids_BT.shape[1]
        sequences = running(rows_M, end - start, len(ids_BT))
        if sequences is not None:
            ids_BT = ids_BT[sequences]
            rows_M = rows_among(rows_M, end - start, sequences)
        rows = rows_of_input(rows_M, end - start, width)
        return self._run(ids_BT, self._attention(width), rows, width)

    def _new_attention(self, width: int) -> FullAttention:
        return FullAttention(width, False, self._run.backbone.attn_backend, self.device)


class CachedContext:
    """Which tokens have to go through the network, and which are in the cache.

    Finished tokens enter the cache in the same pass in which the next block takes its first step.
    With `keep=False` nothing stays in it and every pass computes the whole context again: slower,
    and equal up to `backbone.length` tokens. Of longer sequences the oldest tokens are dropped;
    what they left in the cached values of later layers stays there, a new computation lacks it.
    """

    def __init__(self, backbone: DiT, dtype: torch.dtype, block_size: int, keep: bool) -> None:
        self._backbone, self._dtype = backbone, dtype
        self._block_size, self._keep = block_size, keep

    def begin(self, batch_size: int, length: int) -> None:
        """Start with an empty cache for sequences of `length` tokens."""
        capacity = min(length, self._backbone.length)
        self._cache = self._backbone.new_cache(batch_size, capacity, self._dtype)
        self._committed = 0
        self._attention: CachedAttention | None = None
        self._span: tuple[int, int, int] | None = None

    def attend(self, start: int, end: int) -> tuple[int, CachedAttention]:
        """First position to compute and the attention of positions first..end.

        Positions before `start` are finished, start..end (if any) are noisy.
        """
        capacity = self._cache.capacity
        if not self._keep:
            self._cache.length = self._committed = 0
        first = max(self._committed, end - capacity)
        overflow = self._cache.length + end - first - capacity
        if overflow > 0:
            self._cache.drop_oldest(min(overflow, self._cache.length))
        if self._span != (first, start, end):
            self._span = (first, start, end)
            self._attention = CachedAttention(
                self._cache,
                first,
                start - first,
                end - start,
                self._block_size,
                self._backbone.attn_backend,
            )
        assert self._attention is not None
        return first, self._attention

    def commit(self, start: int) -> None:
        """After a pass: the finished positions before `start` are in the cache now."""
        if self._keep and self._span is not None:
            self._cache.length += start - self._span[0]
            self._committed = start


class BlockDenoiser:
    """Blocks from left to right: a block sees itself and the finished ones.

    Args:
        kv_cache: keep keys and values of finished blocks instead of computing them again.
    """

    def __init__(self, backbone: DiT, mask_id: int, block_size: int, kv_cache: bool = True) -> None:
        self._run = NetworkPass(backbone, mask_id)
        self._block_size = block_size
        self._context = CachedContext(backbone, self._run.dtype, block_size, kv_cache)
        self.device = self._run.device

    def begin(self, batch_size: int, length: int) -> list[Segment]:
        """The blocks.

        Raises:
            ValueError: the length is not a whole number of blocks.
        """
        size = self._block_size
        if length % size:
            raise ValueError(f"sampling.length={length}: allowed multiples of block_size={size}")
        self._context.begin(batch_size, length)
        return [(start, start + size) for start in range(0, length, size)]

    def logits(self, x_BL: Tensor, start: int, end: int, rows_M: Tensor) -> Tensor:
        """The block's rows; finished blocks that are not cached yet go through beside it."""
        first, attention = self._context.attend(start, end)
        ids_BT = x_BL[:, first:end]
        sequences = running(rows_M, end - start, len(ids_BT)) if first == start else None
        if sequences is not None:  # never in a pass that has finished tokens to commit, of all
            ids_BT, attention = ids_BT[sequences], attention.of(sequences)
            rows_M = rows_among(rows_M, end - start, sequences)
        rows = rows_of_input(rows_M, end - start, end - first)
        logits_MV = self._run(ids_BT, attention, rows, end - start)
        self._context.commit(start)
        return logits_MV
