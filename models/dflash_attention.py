"""Attention of draft blocks: the context before each anchor, and the block itself, both ways.

What a block may see of its row is one interval of places: from the first token of the anchor's
document to the last one before the anchor. The anchor's own features are left out, because at
inference they do not exist yet. So two integers per block are the whole mask, for training (many
anchors in a row) and for drafting (one block behind a cache) alike.

Source: arXiv 2602.06036, section 3 and appendix A.1.
Legend: B batch, S context tokens, N blocks, Q slots of a block, G key heads, R query heads per key
head, K head dimension, T = S + N * Q keys, C blocks in a chunk.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from models.attention import compiled_flex, resolve_backend

# Rows of queries that go through the CPU's products at once, measured at 64 anchors of 8 and 16
# slots in 256 and 1024 tokens.
_ROWS = 128
_TILE = 128  # of queries and keys, in flex_attention


@dataclass(frozen=True)
class Chunk:
    """Neighbouring blocks, and a range of context places that has all they may see."""

    blocks: slice
    context: slice


@dataclass(frozen=True)
class BlockAttention:
    """softmax(q k' / sqrt(K)) v for every slot over its interval of the context and its own block.

    Attributes:
        start_BN, stop_BN: context places start <= place < stop are visible to a block.
        block_size: Q.
        backend: math, sdpa or flex.
        chunks: how math and sdpa walk over the blocks.
        tiles, kernel: flex_attention's BlockMask, and itself.
    """

    start_BN: Tensor
    stop_BN: Tensor
    block_size: int
    backend: str
    chunks: tuple[Chunk, ...]
    tiles: Any = None
    kernel: Any = None

    @classmethod
    def build(
        cls,
        start_BN: Int[Tensor, "B N"],
        stop_BN: Int[Tensor, "B N"],
        context_length: int,
        block_size: int,
        backend: str = "auto",
    ) -> "BlockAttention":
        """Everything that all layers share.

        On a CPU the chunks are cropped to what their blocks may see, which halves the work for
        sorted anchors; on a GPU that would wait for the device, and flex skips empty tiles anyway.
        """
        backend = resolve_backend(backend, start_BN.device)
        if backend == "flex":
            tiles = flex_tiles(start_BN, stop_BN, context_length, block_size)
            return cls(start_BN, stop_BN, block_size, backend, (), tiles, compiled_flex())
        crop = start_BN.device.type == "cpu"
        chunks = _chunks(start_BN, stop_BN, context_length, block_size, crop)
        return cls(start_BN, stop_BN, block_size, backend, chunks)

    @classmethod
    def single(
        cls, stop_B: Int[Tensor, " B"], context_length: int, block_size: int, backend: str = "auto"
    ) -> "BlockAttention":
        """One block per row, which sees the first `stop_B` of `context_length` cached tokens."""
        backend = resolve_backend(backend, stop_B.device)
        # Its one tile would be compiled again for every length that a cache grows to.
        backend = "sdpa" if backend == "flex" else backend
        chunk = Chunk(slice(0, 1), slice(0, context_length))
        stop_B1 = stop_B[:, None]
        return cls(torch.zeros_like(stop_B1), stop_B1, block_size, backend, (chunk,))

    def __call__(
        self,
        q_BNQHK: Float[Tensor, "B N Q H K"],
        context: tuple[Float[Tensor, "B S G K"], Float[Tensor, "B S G K"]],
        block: tuple[Float[Tensor, "B N Q G K"], Float[Tensor, "B N Q G K"]],
    ) -> Float[Tensor, "B N Q H K"]:
        """Attend; `context` and `block` are keys and values."""
        if self.backend == "flex":
            return self._flex(q_BNQHK, context, block)
        compute = _math if self.backend == "math" else _sdpa
        outputs = []
        for chunk in self.chunks:
            here, seen = chunk.blocks, chunk.context
            place = torch.arange(seen.start, seen.stop, device=q_BNQHK.device)
            visible_BCS = (place >= self.start_BN[:, here, None]) & (
                place < self.stop_BN[:, here, None]
            )
            k_context, v_context = (x[:, seen] for x in context)
            k_block, v_block = (x[:, here] for x in block)
            outputs.append(
                compute(q_BNQHK[:, here], k_context, v_context, k_block, v_block, visible_BCS)
            )
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _flex(self, q_BNQHK: Tensor, context: Any, block: Any) -> Tensor:
        k, v = (
            torch.cat([seen, own.flatten(1, 2)], dim=1).transpose(1, 2)
            for seen, own in zip(context, block, strict=True)
        )
        q = q_BNQHK.flatten(1, 2).transpose(1, 2)
        out = self.kernel(q, k, v, block_mask=self.tiles, enable_gqa=True)
        return out.transpose(1, 2).unflatten(1, q_BNQHK.shape[1:3])


def _chunks(
    start_BN: Tensor, stop_BN: Tensor, context_length: int, block_size: int, crop: bool
) -> tuple[Chunk, ...]:
    num_blocks = start_BN.shape[1]
    size = max(1, _ROWS // block_size)
    chunks = []
    for first in range(0, num_blocks, size):
        blocks = slice(first, min(first + size, num_blocks))
        lo, hi = 0, context_length
        if crop:
            start, stop = start_BN[:, blocks], stop_BN[:, blocks]
            hi = int(stop.max())
            # A block without context has the interval 0, 0, which must not widen the range.
            lo = min(hi, int(start.masked_fill(start >= stop, context_length).min()))
        chunks.append(Chunk(blocks, slice(lo, hi)))
    return tuple(chunks)


def _math(
    q_BCQHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    k_BCQGK: Tensor,
    v_BCQGK: Tensor,
    visible: Tensor,
) -> Tensor:
    """One softmax over two products, so that no block is multiplied with another block's keys."""
    B, C, Q, H, K = q_BCQHK.shape
    S, G = k_BSGK.shape[1:3]
    q_BGRCQK = (q_BCQHK * K**-0.5).view(B, C, Q, G, H // G, K).permute(0, 3, 4, 1, 2, 5)
    rows = q_BGRCQK.reshape(B, G, -1, K)
    k_BGKS, v_BGSK = k_BSGK.permute(0, 2, 3, 1), v_BSGK.transpose(1, 2)
    k_BGCKQ, v_BGCQK = k_BCQGK.permute(0, 3, 1, 4, 2), v_BCQGK.permute(0, 3, 1, 2, 4)
    bias_BCS = torch.zeros(visible.shape, dtype=rows.dtype, device=rows.device)
    bias_BCS.masked_fill_(~visible, -torch.inf)
    context = (rows @ k_BGKS).view(B, G, H // G, C, Q, S) + bias_BCS[:, None, None, :, None]
    own = q_BGRCQK @ k_BGCKQ[:, :, None]
    weight = torch.cat([context, own], dim=-1).softmax(-1, dtype=torch.float32).to(v_BSGK.dtype)
    seen, block = weight[..., :S].flatten(2, 4), weight[..., S:]
    out = (seen @ v_BGSK).view(q_BGRCQK.shape) + block @ v_BGCQK[:, :, None]
    return out.permute(0, 3, 4, 1, 2, 5).reshape(B, C, Q, H, K)


def _sdpa(
    q_BCQHK: Tensor,
    k_BSGK: Tensor,
    v_BSGK: Tensor,
    k_BCQGK: Tensor,
    v_BCQGK: Tensor,
    visible: Tensor,
) -> Tensor:
    """The fused kernel on [context ; blocks of the chunk] under one mask."""
    B, C, Q, _, _ = q_BCQHK.shape
    own_CT = torch.eye(C, dtype=torch.bool, device=visible.device).repeat_interleave(Q, dim=1)
    mask_BCT = torch.cat([visible, own_CT.expand(B, -1, -1)], dim=-1)
    k = torch.cat([k_BSGK, k_BCQGK.flatten(1, 2)], dim=1).transpose(1, 2)
    v = torch.cat([v_BSGK, v_BCQGK.flatten(1, 2)], dim=1).transpose(1, 2)
    q = q_BCQHK.flatten(1, 2).transpose(1, 2)
    mask = mask_BCT.repeat_interleave(Q, dim=1)[:, None]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=False, enable_gqa=True)
    return out.transpose(1, 2).unflatten(1, (C, Q))


def flex_tiles(
    start_BN: Int[Tensor, "B N"], stop_BN: Int[Tensor, "B N"], context_length: int, block_size: int
) -> Any:
    """The BlockMask of queries [N * Q] against keys [context ; N * Q].

    Intervals overlap tiles by a closed formula, so neither the mask nor a compiled function is
    needed to find the empty and the full tiles, and shapes that stay the same compile once.
    """
    from torch.nn.attention.flex_attention import BlockMask

    N, Q, S = start_BN.shape[1], block_size, context_length
    device = start_BN.device
    num_queries, num_keys = N * Q, S + N * Q
    own_N = S + Q * torch.arange(N, device=device)
    edge_T = _TILE * torch.arange(-(-num_keys // _TILE), device=device)

    def overlap(first: Tensor, last: Tensor) -> Tensor:
        """How many places of [first, last) lie in every tile."""
        low = torch.maximum(first[..., None], edge_T)
        high = torch.minimum(last[..., None], edge_T + _TILE)
        return (high - low).clamp(min=0)

    visible_BNT = overlap(start_BN, stop_BN) + overlap(own_N, own_N + Q)
    visible_BqT = visible_BNT.repeat_interleave(Q, dim=1)
    visible_BqT = F.pad(visible_BqT, (0, 0, 0, -num_queries % _TILE))
    tiles = visible_BqT.unflatten(1, (-1, _TILE))
    full, some = tiles.amin(2) == _TILE, tiles.amax(2) > 0

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """One entry of the mask."""
        block = query // Q
        context = (key >= start_BN[b, block]) & (key < stop_BN[b, block])
        return context | ((key >= S) & ((key - S) // Q == block))

    return BlockMask.from_kv_blocks(
        *_listed(some & ~full), *_listed(full), _TILE, allowed, (num_queries, num_keys)
    )


def _listed(tiles: Bool[Tensor, "B q T"]) -> tuple[Tensor, Tensor]:
    """How many tiles are true in every row, and their indices before those of the others."""
    count = tiles.sum(-1, dtype=torch.int32)
    order = tiles.int().argsort(dim=-1, descending=True, stable=True).int()
    return count[:, None].contiguous(), order[:, None].contiguous()


@dataclass(frozen=True)
class TrainingLayout:
    """Where the blocks of a batch lie and what they see; built once, used by all layers.

    Attributes:
        context_position_BS: place of every context token inside its document.
        position_BNQ: place of every slot inside its document, the anchor's and what follows.
        attention: what the blocks see.
    """

    context_position_BS: Tensor
    position_BNQ: Tensor
    attention: BlockAttention

    @classmethod
    def build(
        cls,
        anchors_BN: Int[Tensor, "B N"],
        valid_BN: Bool[Tensor, "B N"],
        segment_BS: Int[Tensor, "B S"],
        position_BS: Int[Tensor, "B S"],
        *,
        block_size: int,
        backend: str = "auto",
    ) -> "TrainingLayout":
        """From the anchors of a batch.

        Args:
            anchors_BN: places in the row; sorted ones are faster. Those of invalid blocks do not
                matter.
            valid_BN: blocks that are not valid see nothing but themselves.
            segment_BS: number of the document, whose tokens lie side by side; -1 for padding.
            position_BS: place inside the document, from 0.
            block_size: slots of a block, Q.
            backend: auto, math, sdpa or flex.
        """
        anchors_BN = anchors_BN.masked_fill(~valid_BN, 0)
        begins_BS = F.pad(segment_BS[:, 1:] != segment_BS[:, :-1], (1, 0), value=True)
        place_S = torch.arange(segment_BS.shape[1], device=segment_BS.device)
        first_BS = (place_S * begins_BS).cummax(dim=1).values
        start_BN = first_BS.gather(1, anchors_BN).masked_fill(~valid_BN, 0)
        slot_Q = torch.arange(block_size, device=segment_BS.device)
        position_BNQ = position_BS.gather(1, anchors_BN)[..., None] + slot_Q
        attention = BlockAttention.build(
            start_BN, anchors_BN, segment_BS.shape[1], block_size, backend
        )
        return cls(position_BS, position_BNQ, attention)
