"""The DFlash draft: a small stack that fills a whole block in one pass, on the target's features.

The target's tapped layers, side by side, go through `fc` and a norm to one context c that all draft
layers share. In every layer the block's queries attend to keys and values of c (the target's text
before the anchor) and of the block itself, in both directions. Embedding and head belong to the
target and are not here; names and shapes of the parameters are those of the public checkpoints.

Source: arXiv 2602.06036, section 3.
Legend: B batch, S or C context tokens, N blocks, Q slots, D hidden size, E = taps * D, H heads,
G key heads, K head dimension, T cached tokens.
"""

from collections.abc import Callable, Iterator
from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from models.dflash_attention import BlockAttention, TrainingLayout
from models.dflash_cache import DraftCache
from models.dflash_config import DFlashConfig, rotary_frequencies, target_layer_rule
from models.dit import rotate

__all__ = ["DFlashConfig", "DFlashNetwork", "TrainingLayout", "target_layer_rule"]

KeyValues = tuple[Tensor, Tensor]
Attend = Callable[[Tensor, KeyValues, KeyValues], Tensor]
_INIT_STD = 0.02  # of the target family's own initialisation


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 at least, returned in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Over the last dimension."""
        exact = torch.promote_types(x.dtype, torch.float32)
        weight = self.weight.to(exact)
        return F.rms_norm(x.to(exact), weight.shape, weight, self.eps).to(x.dtype)


class Rotary(nn.Module):
    """Cosines and sines of absolute positions, in fp32 whatever the network's dtype is."""

    frequency: Tensor

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        self._exact, self.factor = rotary_frequencies(config)
        self.register_buffer("frequency", self._exact.clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Rotary":
        # bf16 has 8 bits for a frequency that is multiplied with positions in the thousands.
        super()._apply(fn, recurse)
        if self.frequency.device.type != "meta":
            self.frequency = self._exact.to(self.frequency.device)
        return self

    def forward(self, position: Int[Tensor, "*P"]) -> tuple[Tensor, Tensor]:
        """[..., 1, K] each; the 1 stands for all heads."""
        angle = position[..., None].float() * self.frequency
        angle = torch.cat([angle, angle], dim=-1)[..., None, :]
        return angle.cos() * self.factor, angle.sin() * self.factor


class DraftAttention(nn.Module):
    """Attention with grouped heads and normed queries and keys."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        queries, keys = (
            heads * config.head_dim
            for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        self.q_proj = nn.Linear(size, queries, bias=False)
        self.k_proj = nn.Linear(size, keys, bias=False)
        self.v_proj = nn.Linear(size, keys, bias=False)
        self.o_proj = nn.Linear(queries, size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def key_values(self, x: Float[Tensor, "*P D"], rotary: tuple[Tensor, Tensor]) -> KeyValues:
        """Rotated keys, and values, [..., G, K]: of the context c, or of the block's own slots."""
        keys = self.k_norm(self.k_proj(x).unflatten(-1, (-1, self.head_dim)))
        values = self.v_proj(x).unflatten(-1, (-1, self.head_dim))
        return rotate(keys, rotary), values

    def forward(
        self,
        x_BNQD: Tensor,
        rotary: tuple[Tensor, Tensor],
        context: KeyValues,
        attend: Attend,
    ) -> Tensor:
        """The slots over the context and their block."""
        q = self.q_norm(self.q_proj(x_BNQD).unflatten(-1, (-1, self.head_dim)))
        out_BNQHK = attend(rotate(q, rotary), context, self.key_values(x_BNQD, rotary))
        return self.o_proj(out_BNQHK.flatten(-2))


class GatedMLP(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, size: int, inner: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(size, inner, bias=False)
        self.up_proj = nn.Linear(size, inner, bias=False)
        self.down_proj = nn.Linear(inner, size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Position by position."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DraftLayer(nn.Module):
    """Norm, attention, norm, MLP, each with a residual around it."""

    def __init__(self, config: DFlashConfig) -> None:
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = DraftAttention(config)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, config.intermediate_size)

    def forward(
        self,
        x_BNQD: Tensor,
        rotary: tuple[Tensor, Tensor],
        c_BSD: Tensor,
        context_rotary: tuple[Tensor, Tensor],
        attend: Attend,
    ) -> Tensor:
        """Training: keys and values of c are made here, once for all blocks of a row."""
        context = self.self_attn.key_values(c_BSD, context_rotary)
        return self.with_context(x_BNQD, rotary, context, attend)

    def with_context(
        self, x_BNQD: Tensor, rotary: tuple[Tensor, Tensor], context: KeyValues, attend: Attend
    ) -> Tensor:
        """The same where keys and values of the context are at hand."""
        x_BNQD = x_BNQD + self.self_attn(self.input_layernorm(x_BNQD), rotary, context, attend)
        return x_BNQD + self.mlp(self.post_attention_layernorm(x_BNQD))


class DFlashNetwork(nn.Module):
    """Features of the target and embedded blocks in, hidden states for the target's head out.

    Args:
        config: shapes.
        attn_backend: auto, math, sdpa or flex; for `layout` and for drafting.
    """

    def __init__(self, config: DFlashConfig, attn_backend: str = "auto") -> None:
        super().__init__()
        self.config, self.attn_backend = config, attn_backend
        size, eps = config.hidden_size, config.rms_norm_eps
        self.fc = nn.Linear(config.taps_size, size, bias=False)
        self.hidden_norm = RMSNorm(size, eps)
        self.layers = nn.ModuleList(DraftLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(size, eps)
        self.rotary = Rotary(config)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Normal matrices of standard deviation 0.02, norms of weight 1."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_INIT_STD)
            elif isinstance(module, RMSNorm):
                nn.init.ones_(module.weight)

    def layout(
        self,
        anchors_BN: Int[Tensor, "B N"],
        valid_BN: Bool[Tensor, "B N"],
        segment_BS: Int[Tensor, "B S"],
        position_BS: Int[Tensor, "B S"],
    ) -> TrainingLayout:
        """`TrainingLayout.build` with this network's block size and backend."""
        return TrainingLayout.build(
            anchors_BN, valid_BN, segment_BS, position_BS,
            block_size=self.config.block_size, backend=self.attn_backend,
        )  # fmt: skip

    def _layers(self) -> Iterator[DraftLayer]:
        for layer in self.layers:
            yield cast(DraftLayer, layer)

    def project(self, taps_BSE: Float[Tensor, "B S E"]) -> Float[Tensor, "B S D"]:
        """c = hidden_norm(fc(taps)); no layer norms it again."""
        return self.hidden_norm(self.fc(taps_BSE))

    def forward(
        self,
        taps_BSE: Float[Tensor, "B S E"],
        embeds_BNQD: Float[Tensor, "B N Q D"],
        layout: TrainingLayout,
    ) -> Float[Tensor, "B N Q D"]:
        """Training: many anchors of every row at once.

        Args:
            taps_BSE: the target's tapped layers at every token of the row.
            embeds_BNQD: the target's embedding of [anchor, mask, mask, ...] of every block.
            layout: from the same anchors.

        Returns:
            hidden states after the final norm; the target's head makes logits of them.
        """
        c_BSD = self.project(taps_BSE)
        context_rotary = self.rotary(layout.context_position_BS)
        rotary, x_BNQD = self.rotary(layout.position_BNQ), embeds_BNQD
        for layer in self.layers:
            x_BNQD = layer(x_BNQD, rotary, c_BSD, context_rotary, layout.attention)
        return self.norm(x_BNQD)

    def new_cache(self, batch: int, capacity: int = 0) -> DraftCache:
        """An empty cache for so many sequences, with room for `capacity` tokens before it grows."""
        config, weight = self.config, self.fc.weight
        shape = (config.num_hidden_layers, batch, capacity, config.num_key_value_heads)
        return DraftCache((*shape, config.head_dim), weight.dtype, weight.device)

    @torch.no_grad()
    def extend(
        self,
        cache: DraftCache,
        taps_BCE: Float[Tensor, "B C E"],
        position_BC: Int[Tensor, "B C"],
        valid_BC: Bool[Tensor, "B C"] | None = None,
    ) -> None:
        """Append newly accepted tokens of the target to the context; inference only.

        Args:
            cache: what was accepted before.
            taps_BCE: the target's tapped layers at the new tokens, but not at the next anchor.
            position_BC: their places in the sequence.
            valid_BC: which of them count, if rows accepted different numbers; None means all.
        """
        c_BCD, rotary = self.project(taps_BCE), self.rotary(position_BC)
        place = cache.reserve(c_BCD.shape[1], valid_BC)
        for index, layer in enumerate(self._layers()):
            cache.write(index, layer.self_attn.key_values(c_BCD, rotary), place)

    @torch.no_grad()
    def draft(
        self,
        cache: DraftCache,
        embeds_BQD: Float[Tensor, "B Q D"],
        position_BQ: Int[Tensor, "B Q"],
    ) -> Float[Tensor, "B Q D"]:
        """One block per row behind its cached context, which stays as it is; inference only.

        Args:
            cache: the context before the anchor.
            embeds_BQD: the target's embedding of [anchor, mask, mask, ...].
            position_BQ: the anchor's place in the sequence and those that follow.
        """
        attend = BlockAttention.single(
            cache.length_B, cache.longest, embeds_BQD.shape[1], self.attn_backend
        )
        rotary, x_BNQD = self.rotary(position_BQ[:, None]), embeds_BQD[:, None]
        for index, layer in enumerate(self._layers()):
            x_BNQD = layer.with_context(x_BNQD, rotary, cache.read(index), attend)
        return self.norm(x_BNQD)[:, 0]
