"""The diffusion transformer of MDLM and BD3-LM: rotary attention with adaptive layer norm.

Parameters carry the names and shapes of the public bd3lms checkpoints, so those can be loaded by
name. What differs is how much is computed: logits only for the rows that are asked for, and the
last layer's output projection and MLP for those rows only.

Source: arXiv 2212.09748 (adaLN-zero), 2104.09864 (rotary), 2406.07524, 2503.09573.
Legend: B batch, S sequence, N heads, K head dimension, D features, M selected rows, V vocabulary.
"""

import copy
import math
from collections.abc import Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from models.attention import Attend, KeyValueCache
from models.dropout import keep_mask
from models.packed import PackedLinear, can_pack

Modulation = tuple[Tensor, ...]
Keep = tuple[Tensor, Tensor] | None


class AttentionPattern(Protocol):
    """What the network needs to know about attention; see models/attention.py."""

    positions: Tensor
    num_outputs: int

    def at(self, layer: int) -> Attend:
        """The attention function of one layer."""
        ...


class VocabularyEmbedding(nn.Module):
    """Token ids to features."""

    def __init__(self, vocab_size: int, hidden_size: int) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.empty(vocab_size, hidden_size))
        nn.init.kaiming_uniform_(self.embedding, a=math.sqrt(5))

    def forward(self, ids_BS: Int[Tensor, "B S"]) -> Float[Tensor, "B S D"]:
        """Look up every id."""
        return F.embedding(ids_BS, self.embedding)


class TimestepEmbedder(nn.Module):
    """Noise level sigma to the conditioning vector: sinusoids of 128 frequencies, then an MLP."""

    num_frequencies = 128

    def __init__(self, cond_dim: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(2 * self.num_frequencies, cond_dim), nn.SiLU(), nn.Linear(cond_dim, cond_dim)
        )

    def forward(self, sigma: Tensor) -> Tensor:
        """[...] -> [..., cond_dim]."""
        index = torch.arange(self.num_frequencies, device=sigma.device)
        frequency = torch.exp(-math.log(10_000.0) * index / self.num_frequencies)
        angle = sigma.float()[..., None] * frequency
        return self.mlp(torch.cat([angle.cos(), angle.sin()], dim=-1))


class RotaryEmbedding(nn.Module):
    """Rotates each head's pairs (i, i + K/2) by position * 10000^(-2i/K)."""

    inv_freq: Tensor

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        exponent = torch.arange(0, head_dim, 2).float() / head_dim
        self.register_buffer("inv_freq", 10_000.0**-exponent)

    def forward(self, positions: Int[Tensor, " S"]) -> tuple[Tensor, Tensor]:
        """Cosines and sines [S, K], in fp32: bf16 cannot count past 256."""
        angle_SK = torch.outer(positions.float(), self.inv_freq.float()).repeat(1, 2)
        return angle_SK.cos(), angle_SK.sin()


def rotate(x_BNSK: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """x cos + rotate_half(x) sin, in fp32, returned in the dtype of x."""
    cos_SK, sin_SK = rotary
    first, second = x_BNSK.chunk(2, dim=-1)
    rotated = x_BNSK * cos_SK + torch.cat([-second, first], dim=-1) * sin_SK
    return rotated.to(x_BNSK.dtype)


class ScaleNorm(nn.Module):
    """Parameters of a layer norm without bias; `modulated_norm` applies it."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))


def modulated_norm(x: Tensor, norm: ScaleNorm, shift: Tensor, scale: Tensor) -> Tensor:
    """layer_norm(x) * weight * (1 + scale) + shift.

    A modulation that is the same for every token (no time conditioning) is the affine map of the
    layer norm itself, so it costs nothing.
    """
    size = norm.weight.shape
    if shift.dim() == 1:
        return F.layer_norm(x, size, norm.weight * (1.0 + scale), shift)
    return F.layer_norm(x, size, norm.weight) * (1.0 + scale) + shift


def select_rows(x_BSD: Tensor, rows_M: Tensor | None) -> Tensor:
    """Rows of the flattened [B * S, D], or everything where `rows` is None."""
    return x_BSD if rows_M is None else x_BSD.flatten(0, 1).index_select(0, rows_M)


def modulate(linear: nn.Linear, cond: Tensor, parts: int) -> Modulation:
    """Shifts, scales and gates from the condition, always in fp32: they multiply everything."""
    with torch.autocast(cond.device.type, enabled=False):
        return linear(cond).chunk(parts, dim=-1)


def select_modulation(
    modulation: Modulation, num_outputs: int, rows_M: Tensor | None
) -> Modulation:
    """The modulation of selected rows; one that is the same for all tokens stays as it is."""
    return tuple(
        part if part.dim() == 1 else select_rows(part[:, :num_outputs], rows_M)
        for part in modulation
    )


class Block(nn.Module):
    """Attention and MLP, each normalised, modulated, gated and added to the residual stream."""

    def __init__(self, hidden_size: int, n_heads: int, cond_dim: int, dropout: float) -> None:
        super().__init__()
        self.n_heads, self.dropout = n_heads, dropout
        self.norm1 = ScaleNorm(hidden_size)
        self.attn_qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.attn_out = nn.Linear(hidden_size, hidden_size, bias=False)
        self.norm2 = ScaleNorm(hidden_size)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * hidden_size, hidden_size),
        )
        self.adaLN_modulation = nn.Linear(cond_dim, 6 * hidden_size)
        nn.init.zeros_(self.adaLN_modulation.weight)
        nn.init.zeros_(self.adaLN_modulation.bias)

    def forward(
        self,
        x_BSD: Tensor,
        modulation: Modulation,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        keep: Keep,
    ) -> Tensor:
        """All positions in, all positions out."""
        mixed = self._mix(x_BSD, modulation, rotary, attend, x_BSD.shape[1])
        return self._project(x_BSD, mixed, modulation, keep)

    def forward_rows(
        self,
        x_BSD: Tensor,
        modulation: Modulation,
        rotary: tuple[Tensor, Tensor],
        attend: Attend,
        num_outputs: int,
        rows_M: Tensor | None,
    ) -> Tensor:
        """Output of some of the first `num_outputs` positions; the others give keys and values."""
        mixed = self._mix(x_BSD, modulation, rotary, attend, num_outputs)
        residual = select_rows(x_BSD[:, :num_outputs], rows_M)
        per_row = select_modulation(modulation, num_outputs, rows_M)
        keep = self.draw_keep(residual)
        return self._project(residual, select_rows(mixed, rows_M), per_row, keep)

    def pack(self) -> None:
        """Replace the linear layers by packed ones, for inference only."""
        self.attn_qkv, self.attn_out = PackedLinear(self.attn_qkv), PackedLinear(self.attn_out)
        first, second = self.mlp[0], self.mlp[2]
        assert isinstance(first, nn.Linear) and isinstance(second, nn.Linear)
        self.mlp = nn.Sequential(PackedLinear(first, gelu=True), PackedLinear(second))

    def draw_keep(self, x: Tensor) -> Keep:
        """Dropout masks of the attention and the MLP output, shaped like `x`; None without dropout.

        They are drawn outside of `forward` so that compiled code holds no random numbers.
        """
        if not (self.training and self.dropout > 0.0):
            return None
        first, second = (keep_mask(tuple(x.shape), self.dropout, x.device) for _ in range(2))
        return first, second

    def _mix(self, x_BSD, modulation, rotary, attend: Attend, num_queries: int) -> Tensor:
        shift, scale = modulation[0], modulation[1]
        h_BSD = modulated_norm(x_BSD, self.norm1, shift, scale)
        cos, sin = rotary
        if num_queries == h_BSD.shape[1]:
            q, k, v = (self._heads(part) for part in self.attn_qkv(h_BSD).chunk(3, dim=-1))
        else:
            size = h_BSD.shape[-1]
            weight = self.attn_qkv.weight
            q = self._heads(F.linear(h_BSD[:, :num_queries], weight[:size]))
            k, v = (self._heads(p) for p in F.linear(h_BSD, weight[size:]).chunk(2, dim=-1))
        q, k = rotate(q, (cos[:num_queries], sin[:num_queries])), rotate(k, rotary)
        return attend(q, k, v).transpose(1, 2).flatten(2)

    def _heads(self, x_BSD: Tensor) -> Tensor:
        return x_BSD.unflatten(-1, (self.n_heads, -1)).transpose(1, 2)

    def _project(self, residual: Tensor, mixed: Tensor, modulation, keep: Keep) -> Tensor:
        _, _, gate_attention, shift, scale, gate_mlp = modulation
        if keep is not None:
            gate_attention, gate_mlp = (
                g / (1.0 - self.dropout) for g in (gate_attention, gate_mlp)
            )
        out = self.attn_out(mixed)
        x = torch.addcmul(residual, gate_attention, out if keep is None else out * keep[0])
        out = self.mlp(modulated_norm(x, self.norm2, shift, scale))
        return torch.addcmul(x, gate_mlp, out if keep is None else out * keep[1])


class OutputLayer(nn.Module):
    """Final modulated norm and the untied, zero-initialised projection to the vocabulary."""

    def __init__(self, hidden_size: int, vocab_size: int, cond_dim: int) -> None:
        super().__init__()
        self.norm_final = ScaleNorm(hidden_size)
        self.linear = nn.Linear(hidden_size, vocab_size)
        self.adaLN_modulation = nn.Linear(cond_dim, 2 * hidden_size)
        for linear in (self.linear, self.adaLN_modulation):
            nn.init.zeros_(linear.weight)
            nn.init.zeros_(linear.bias)

    def pack(self) -> None:
        """Replace the projection by a packed one, for inference only."""
        self.linear = PackedLinear(self.linear)


class DiT(nn.Module):
    """Diffusion transformer: token ids and an attention pattern to features, and to logits.

    Args:
        vocab_size: V, the mask token included.
        length: L, tokens per sequence (of one half of [x_t ; x_0]).
        attn_backend: auto | sdpa | flex | math, see `models.attention`.
        compile: compile the transformer blocks with Inductor.
        time_conditioning: whether `sigma` conditions the network; otherwise it is taken as 0.
    """

    blocks: Sequence[Block]  # what a ModuleList holds, which torch does not say

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        n_blocks: int,
        n_heads: int,
        length: int,
        cond_dim: int = 128,
        dropout: float = 0.1,
        attn_backend: str = "auto",
        compile: bool = False,
        time_conditioning: bool = False,
    ) -> None:
        super().__init__()
        if hidden_size % (2 * n_heads):
            raise ValueError(
                f"model.hidden_size={hidden_size}: allowed multiples of 2 n_heads = {2 * n_heads}"
            )
        self.vocab_size, self.length, self.n_heads = vocab_size, length, n_heads
        self.hidden_size, self.attn_backend = hidden_size, attn_backend
        self.time_conditioning = time_conditioning
        self.vocab_embed = VocabularyEmbedding(vocab_size, hidden_size)
        self.sigma_map = TimestepEmbedder(cond_dim)
        self.rotary_emb = RotaryEmbedding(hidden_size // n_heads)
        blocks = (Block(hidden_size, n_heads, cond_dim, dropout) for _ in range(n_blocks))
        self.blocks = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.output_layer = OutputLayer(hidden_size, vocab_size, cond_dim)
        self._run_block = torch.compile(Block.forward, dynamic=False) if compile else Block.forward

    def forward(
        self,
        ids_BS: Int[Tensor, "B S"],
        attention: AttentionPattern,
        *,
        rows_M: Int[Tensor, " M"] | None = None,
        sigma_BS: Float[Tensor, "B S"] | None = None,
        modulations: list[Modulation] | None = None,
    ) -> Tensor:
        """Features before the vocabulary projection.

        Args:
            ids_BS: tokens, in the order of `attention.positions`.
            attention: who sees whom.
            rows_M: rows of the flattened [B * num_outputs] to return; None returns all.
            sigma_BS: noise level of every token, used with time conditioning only.
            modulations: what `self.modulations(sigma_BS)` gave, for who calls many times.

        Returns:
            [M, D], or [B, num_outputs, D] without `rows_M`.
        """
        if modulations is None:
            modulations = self.modulations(sigma_BS)
        rotary = self.rotary_emb(attention.positions)
        x = self.vocab_embed(ids_BS)
        for layer, block in enumerate(self.blocks[:-1]):
            attend, keep = attention.at(layer), block.draw_keep(x)
            x = self._run_block(block, x, modulations[layer], rotary, attend, keep)
        last, num_outputs = self.blocks[-1], attention.num_outputs
        attend = attention.at(len(self.blocks) - 1)
        x = last.forward_rows(x, modulations[-2], rotary, attend, num_outputs, rows_M)
        shift, scale = select_modulation(modulations[-1], num_outputs, rows_M)
        return modulated_norm(x, self.output_layer.norm_final, shift, scale)

    def modulations(self, sigma_BS: Float[Tensor, "B S"] | None = None) -> list[Modulation]:
        """Shifts, scales and gates of every block, then shift and scale of the output layer.

        Without time conditioning they depend on the weights alone.
        """
        cond = self._condition(sigma_BS)
        of_blocks = [modulate(block.adaLN_modulation, cond, 6) for block in self.blocks]
        return [*of_blocks, modulate(self.output_layer.adaLN_modulation, cond, 2)]

    def logits(self, features: Float[Tensor, "*rows D"]) -> Float[Tensor, "*rows V"]:
        """Scores of every token of the vocabulary."""
        return self.output_layer.linear(features)

    def new_cache(self, batch_size: int, capacity: int, dtype: torch.dtype) -> KeyValueCache:
        """An empty cache for `capacity` finished tokens per sequence."""
        head_dim = self.hidden_size // self.n_heads
        shape = (len(self.blocks), batch_size, self.n_heads, capacity, head_dim)
        return KeyValueCache(shape, dtype, self.vocab_embed.embedding.device)

    def for_inference(self, dtype: torch.dtype) -> "DiT":
        """An eager copy in eval mode, its weights cast outright or, of `dtype` already, shared.

        The conditioning and the rotary frequencies stay as they are: they are small, and everything
        is multiplied by them. On a CPU the weights are packed as well (`models.packed`).
        """
        memo = {}
        for name, weight in self.named_parameters():
            is_conditioning = name.startswith("sigma_map") or "adaLN_modulation" in name
            value = weight.detach() if is_conditioning else weight.detach().to(dtype)
            memo[id(weight)] = nn.Parameter(value, requires_grad=False)
        frozen = copy.deepcopy(self, memo)
        frozen._run_block = Block.forward
        if can_pack(self.vocab_embed.embedding.device, dtype):
            for block in frozen.blocks:
                block.pack()
            frozen.output_layer.pack()
        return frozen.eval()

    def _condition(self, sigma_BS: Tensor | None) -> Tensor:
        device = self.vocab_embed.embedding.device
        if not self.time_conditioning:
            sigma_BS = torch.zeros((), device=device)
        if sigma_BS is None:
            raise ValueError(
                "algo.time_conditioning=true: the noise level of every token is needed"
            )
        with torch.autocast(device.type, enabled=False):
            return F.silu(self.sigma_map(sigma_BS))
