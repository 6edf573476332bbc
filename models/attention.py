"""Who may look at whom, and how that is computed.

An attention pattern is an object: `positions` of its sequence, `num_outputs` (how many leading
positions the last layer must produce) and `at(layer)`, a function (q, k, v) -> output. The network
is the same for all of them.

    FullAttention            MDLM (bidirectional) and AR (causal)
    BlockDiffusionAttention  BD3-LM training: [x_t ; x_0 but for its last block] in one pass
    CachedAttention          decoding: the current block against a cache of finished ones

Legend: B batch, H heads, Q queries, T keys, D head dimension, L length, C chunk, S block size.
"""

import copy
import importlib.util
from collections.abc import Callable
from functools import cache, lru_cache

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

BACKENDS = ("auto", "sdpa", "flex", "math")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def resolve_backend(backend: str, device: torch.device) -> str:
    """The kernel that `auto` means on this device.

    CPU: explicit products and softmax ("math"), measured faster there than the fused kernel. CUDA:
    flex_attention, which skips the tiles that the mask leaves empty.
    """
    if backend not in BACKENDS:
        raise ValueError(f"model.attn_backend={backend}: allowed {', '.join(BACKENDS)}")
    if backend != "auto":
        return backend
    has_flex = importlib.util.find_spec("torch.nn.attention.flex_attention") is not None
    return ("flex" if has_flex else "sdpa") if device.type == "cuda" else "math"


def attend(
    q: Float[Tensor, "B H Q D"],
    k: Float[Tensor, "B H T D"],
    v: Float[Tensor, "B H T D"],
    mask: Bool[Tensor, "Q T"] | None,
    backend: str,
) -> Float[Tensor, "B H Q D"]:
    """softmax(q k' / sqrt(D)) v over the allowed keys; softmax in fp32. mask None allows all."""
    if backend == "math":
        return _attend_math(q, k, v, mask)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _attend_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    score_BHQT = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if mask is not None:  # added, because the gradient of a sum costs nothing
        bias_QT = torch.zeros(mask.shape, dtype=q.dtype, device=q.device)
        score_BHQT = score_BHQT + bias_QT.masked_fill_(~mask, -torch.inf)
    return score_BHQT.softmax(-1, dtype=torch.float32).to(v.dtype) @ v


def block_causal_mask(
    length: int, block_size: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "L L"]:
    """Query sees key iff the key's block is not later: what a clean sequence may look at."""
    block_L = torch.arange(length, device=device) // block_size
    return block_L[:, None] >= block_L[None, :]


def block_diffusion_mask(
    length: int, block_size: int, device: torch.device | str = "cpu"
) -> Bool[Tensor, "2L 2L"]:
    """The dense mask of [x_t ; x_0] (arXiv 2503.09573, sec. 3.1): the reference for every kernel.

    Noisy queries see their own noisy block and the clean blocks before it; clean queries see the
    clean blocks up to their own. A share (1 + 1/K)/4 of it is true: kernels skip the rest.
    """
    block_L = torch.arange(length, device=device) // block_size
    query, key = block_L[:, None], block_L[None, :]
    noisy = torch.cat([query == key, query > key], dim=1)
    clean = torch.cat([torch.zeros_like(query == key), query >= key], dim=1)
    return torch.cat([noisy, clean], dim=0)


class FullAttention:
    """Every position sees every other one, or with `causal` itself and the past."""

    def __init__(self, length: int, causal: bool, backend: str, device: torch.device) -> None:
        self.positions = torch.arange(length, device=device)
        self.num_outputs = length
        self._causal = causal
        self._backend = resolve_backend(backend, device)
        self._mask = block_causal_mask(length, 1, device) if causal else None

    def at(self, layer: int) -> Attend:
        """The same function for every layer."""
        return self._attend

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self._backend == "math":
            return _attend_math(q, k, v, self._mask)
        return F.scaled_dot_product_attention(q, k, v, is_causal=self._causal)


class BlockDiffusionAttention:
    """[x_t ; x_0 without its last block], each half counted from position 0, where the mask is.

    Nobody looks at the last clean block but itself, and nothing is predicted from it, so it is left
    out: 2L - S positions in place of 2L, and no clean half at all for one block (MDLM).

    `math` and `sdpa` walk over chunks of whole blocks: the noisy and clean queries of a chunk
    against the clean keys up to the chunk's end and the chunk's own noisy keys. `flex` gives the
    mask to the kernel. In the last layer the clean half is needed for its keys and values alone,
    so queries may be the noisy half only.

    Attributes:
        num_clean: leading tokens of x_0 that belong to the input.
    """

    def __init__(
        self,
        length: int,
        block_size: int,
        backend: str,
        device: torch.device,
        chunk: int | None = None,
    ) -> None:
        if length % block_size:
            raise ValueError(f"block_size={block_size}: does not divide model.length={length}")
        self.num_outputs, self.num_clean = length, length - block_size
        index = torch.arange(length, device=device)
        self.positions = torch.cat([index, index[: self.num_clean]])
        self._length, self._block_size = length, block_size
        self._backend = resolve_backend(backend, device)
        self._chunk = chunk or _default_chunk(length, block_size, device)
        mask = block_diffusion_mask(length, block_size, device)
        self._chunks = [] if self._backend == "flex" else list(self._split(mask))

    def _split(self, mask: Tensor):
        """For every chunk: its noisy places, its clean places, its clean keys, and their mask."""
        L = self._length
        for start in range(0, L, self._chunk):
            end = min(start + self._chunk, L)
            clean_end = L + min(end, self.num_clean)
            own, clean, keys = slice(start, end), slice(L + start, clean_end), slice(L, clean_end)
            rows = torch.cat([mask[own], mask[clean]])
            yield own, clean, keys, torch.cat([rows[:, keys], rows[:, own]], dim=1)

    def at(self, layer: int) -> Attend:
        """The same function for every layer."""
        return self._attend_flex if self._backend == "flex" else self._attend_chunks

    def _attend_chunks(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        has_clean = q.shape[2] > self._length
        noisy_parts, clean_parts = [], []
        for own, clean, keys, mask in self._chunks:
            q_chunk = q[:, :, own]
            if has_clean:
                q_chunk = torch.cat([q_chunk, q[:, :, clean]], dim=2)
            k_chunk = torch.cat([k[:, :, keys], k[:, :, own]], dim=2)
            v_chunk = torch.cat([v[:, :, keys], v[:, :, own]], dim=2)
            out = attend(q_chunk, k_chunk, v_chunk, mask[: q_chunk.shape[2]], self._backend)
            rows = own.stop - own.start
            noisy_parts.append(out[:, :, :rows])
            clean_parts.append(out[:, :, rows:])
        return torch.cat(noisy_parts + clean_parts if has_clean else noisy_parts, dim=2)

    def _attend_flex(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        device = str(q.device)
        mask = _flex_mask(self._length, self._block_size, q.shape[2], k.shape[2], device)
        return compiled_flex()(q, k, v, block_mask=mask)


def _default_chunk(length: int, block_size: int, device: torch.device) -> int:
    """Chunks trade skipped work against smaller products; on a CPU, small ones pay early."""
    target = length if device.type == "cuda" else (64 if length <= 256 else 256)
    return min(length, max(block_size, target // block_size * block_size))


@cache
def compiled_flex() -> Callable[..., Tensor]:
    """flex_attention, compiled once for every shape."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


@lru_cache(maxsize=16)
def _flex_mask(length: int, block_size: int, num_queries: int, num_keys: int, device: str):
    from torch.nn.attention.flex_attention import create_block_mask

    def allowed(b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """One entry of `block_diffusion_mask`."""
        query_clean, key_clean = query >= length, key >= length
        query_block, key_block = (query % length) // block_size, (key % length) // block_size
        own_noisy = ~query_clean & ~key_clean & (query_block == key_block)
        past_clean = ~query_clean & key_clean & (query_block > key_block)
        return own_noisy | past_clean | (query_clean & key_clean & (query_block >= key_block))

    return create_block_mask(allowed, None, None, num_queries, num_keys, device=device)


class KeyValueCache:
    """Rotated keys, and values, of the finished (clean) tokens of every layer.

    Args:
        shape: (layers, batch, heads, capacity, head dimension).
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device
    ) -> None:
        self.keys = torch.zeros(shape, dtype=dtype, device=device)
        self.values = torch.zeros(shape, dtype=dtype, device=device)
        self.length = 0

    @property
    def capacity(self) -> int:
        """How many tokens fit."""
        return self.keys.shape[3]

    def drop_oldest(self, count: int) -> None:
        """Forget the first `count` tokens; rotary keys keep the absolute positions they had."""
        kept = self.length - count
        for store in (self.keys, self.values):
            store[:, :, :, :kept] = store[:, :, :, count : self.length].clone()
        self.length = kept


class CachedAttention:
    """New tokens against the cache and each other; the first `num_clean` of them stay in the cache.

    The new tokens are whole finished blocks followed by at most one noisy block. Block-causal
    attention over absolute positions is then exactly what training showed: a clean block sees the
    clean blocks up to itself, the noisy one sees them all and itself. So a block can be committed
    in the same pass in which the next one takes its first step.

    Args:
        start: absolute position of the first new token.
    """

    def __init__(
        self,
        cache: KeyValueCache,
        start: int,
        num_clean: int,
        num_noisy: int,
        block_size: int,
        backend: str,
    ) -> None:
        device = cache.keys.device
        total = num_clean + num_noisy
        if cache.length + total > cache.capacity:
            raise ValueError(
                f"cache holds {cache.length} of {cache.capacity} tokens: no room for {total} more"
            )
        self.positions = start + torch.arange(total, device=device)
        self.num_outputs = total
        self._cache, self._total = cache, total
        self._sequences: Tensor | None = None
        self._backend = "math" if device.type == "cpu" else "sdpa"
        if backend == "sdpa":
            self._backend = backend
        self._mask = None
        if total > block_size or (num_clean and num_noisy):
            new_block = self.positions // block_size
            new_mask = new_block[:, None] >= new_block[None, :]
            seen = torch.ones(total, cache.length, dtype=torch.bool, device=device)
            self._mask = torch.cat([seen, new_mask], dim=1)

    def of(self, sequences: Int[Tensor, " A"]) -> "CachedAttention":
        """The same for some sequences of the batch, leaving the cache as it is."""
        some = copy.copy(self)
        some._sequences = sequences
        return some

    def at(self, layer: int) -> Attend:
        """Writes this layer's new keys and values behind the cached ones, then attends to all."""

        def attend_cached(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            """Append to the cache of this layer, then attend."""
            cache = self._cache
            if self._sequences is not None:
                old_k, old_v = (
                    store[layer, self._sequences, :, : cache.length]
                    for store in (cache.keys, cache.values)
                )
                keys, values = torch.cat([old_k, k], dim=2), torch.cat([old_v, v], dim=2)
                return attend(q, keys, values, self._mask, self._backend)
            end = cache.length + self._total
            cache.keys[layer, :, :, cache.length : end] = k
            cache.values[layer, :, :, cache.length : end] = v
            keys, values = cache.keys[layer, :, :, :end], cache.values[layer, :, :, :end]
            return attend(q, keys, values, self._mask, self._backend)

        return attend_cached
