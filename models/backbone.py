"""A causal language model whose layers attend as we say: clean text block by block, and blocks.

The network is the one of transformers, weights and all; only its attention function is ours. A
pass is given a pattern, which every layer asks for its attention:

    CleanPass     text, every token sees the blocks up to its own; keeps keys and values
    BlockPass     blocks (BLANKs, drafts, candidates), each of which sees the kept keys and values
                  of its document before it, and itself both ways
    BranchPass    continuations, several of one context that was read once

so that the [x_t ; x_0] of block diffusion is two passes over L and M * S tokens with dense work
only where its mask is, and the clean half is read once for any number of passes over blocks.
Without a pattern the model is the causal one that it was, with masks as transformers makes them.

Legend: B rows, L tokens, N blocks of a row, M blocks that are read, S block size, H heads, G heads
of keys, K head dimension, D features, V vocabulary; of branches: P prefixes of L tokens, N
branches of Q tokens.
"""

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from models.decodable import BLOCK_PATTERN, check_decodable, check_head
from models.dflash_attention import BlockAttention
from models.grouped_attention import grouped_sdpa
from models.identity import config_identity


class Pattern(Protocol):
    """Attention of a pass."""

    def attend(
        self, layer: int, q_BQHK: Tensor, k_BQGK: Tensor, v_BQGK: Tensor
    ) -> Float[Tensor, "B Q H K"]:
        """What layer number `layer` makes of its queries, keys and values."""
        ...


class _EnoughRead(Exception):
    """The last layer's keys and values are there, which was all that was wanted."""


class CleanPass:
    """Text whose tokens see their document up to the end of their own block.

    Args:
        attention: of all N blocks of the rows.
        only_keys_until: number of the last layer, if nothing but keys and values is wanted.
    """

    def __init__(self, attention: BlockAttention, only_keys_until: int | None = None) -> None:
        self.attention, self.only_keys_until = attention, only_keys_until
        self.context: dict[int, tuple[Tensor, Tensor]] = {}

    def attend(
        self, layer: int, q_BQHK: Tensor, k_BQGK: Tensor, v_BQGK: Tensor
    ) -> Float[Tensor, "B Q H K"]:
        """Keep keys and values; every block sees what is before it and itself."""
        # Recomputed by gradient checkpointing they are the same, but of another graph.
        self.context.setdefault(layer, (k_BQGK, v_BQGK))
        if layer == self.only_keys_until:
            raise _EnoughRead
        blocks = -1, self.attention.block_size
        own = k_BQGK.unflatten(1, blocks), v_BQGK.unflatten(1, blocks)
        out = self.attention(q_BQHK.unflatten(1, blocks), (k_BQGK, v_BQGK), own)
        return out.flatten(1, 2)


class BlockPass:
    """Blocks that see the context of a clean pass before them, and themselves."""

    def __init__(
        self, attention: BlockAttention, context: dict[int, tuple[Tensor, Tensor]]
    ) -> None:
        self.attention, self.context = attention, context

    def attend(
        self, layer: int, q_BQHK: Tensor, k_BQGK: Tensor, v_BQGK: Tensor
    ) -> Float[Tensor, "B Q H K"]:
        """Blocks do not see each other."""
        blocks = -1, self.attention.block_size
        own = k_BQGK.unflatten(1, blocks), v_BQGK.unflatten(1, blocks)
        out = self.attention(q_BQHK.unflatten(1, blocks), self.context[layer], own)
        return out.flatten(1, 2)


class BranchPass:
    """Continuations: a token sees the context of its branch, and its branch up to itself.

    Args:
        context: keys and values of a clean pass over the contexts, by layer.
        owner_N: the context of every branch.
        visible_NQS: what every token of a branch sees, of its context and then of its branch.
    """

    def __init__(
        self, context: dict[int, tuple[Tensor, Tensor]], owner_N: Tensor, visible_NQS: Tensor
    ) -> None:
        self.context, self.owner_N = context, owner_N
        self.visible_N1QS = visible_NQS[:, None]

    def attend(
        self, layer: int, q_BQHK: Tensor, k_BQGK: Tensor, v_BQGK: Tensor
    ) -> Float[Tensor, "B Q H K"]:
        """Keys and values of a context are read by all of its branches."""
        keys, values = (
            torch.cat([there[self.owner_N], own], dim=1).transpose(1, 2)
            for there, own in zip(self.context[layer], (k_BQGK, v_BQGK), strict=True)
        )
        groups = q_BQHK.shape[2] // k_BQGK.shape[2]
        grouped = q_BQHK.device.type == "cpu"
        if not grouped:
            # With a mask and groups together a GPU would take its slow kernel.
            keys, values = (part.repeat_interleave(groups, dim=1) for part in (keys, values))
        out = F.scaled_dot_product_attention(
            q_BQHK.transpose(1, 2), keys, values, attn_mask=self.visible_N1QS, enable_gqa=grouped
        )
        return out.transpose(1, 2)


def pattern_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    pattern: Pattern | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """[B, Q, H, K] of queries [B, H, Q, K]: by the pattern of the pass, or as the model itself."""
    if pattern is None:
        ordinary = grouped_sdpa if query.device.type == "cpu" else sdpa_attention_forward
        output, _ = ordinary(module, query, key, value, attention_mask, scaling=scaling, **options)
        return output, None
    layer = cast(int, module.layer_idx)
    parts = (part.transpose(1, 2) for part in (query, key, value))
    return pattern.attend(layer, *parts).contiguous(), None


AttentionInterface.register(BLOCK_PATTERN, pattern_attention)
AttentionMaskInterface.register(BLOCK_PATTERN, sdpa_mask)


class Backbone(nn.Module):
    """A causal model of transformers that reads text and blocks.

    Args:
        model: Llama, Qwen and their kin: full attention, rotary positions, a head without bias.
        blank_id: the token that stands for "not known yet".
        known_ids: how many ids the tokenizer knows; the others are never written.
        attn_backend: auto, math, sdpa or flex.

    Raises:
        ValueError: a model that does not attend so, or a BLANK or tokens that it has no embedding
            for.
    """

    def __init__(
        self, model: PreTrainedModel, blank_id: int, known_ids: int, attn_backend: str = "auto"
    ) -> None:
        super().__init__()
        name = model.config.model_type
        check_decodable(model.config, name)
        check_head(model, name)
        scaling = _head_dim(model.config) ** -0.5
        for module in model.modules():
            found = getattr(module, "scaling", scaling)
            if isinstance(found, float) and abs(found - scaling) > 1e-9:
                raise ValueError(f"model {name}: attention scaled by {found}; allowed: {scaling}")
        model.set_attn_implementation(BLOCK_PATTERN)
        self.model, self.blank_id, self.attn_backend = model, blank_id, attn_backend
        vocab = len(self.table_VD)
        if not 0 <= blank_id < vocab:
            raise ValueError(f"model.mask_token={blank_id}: allowed an id below {vocab}")
        if known_ids > vocab:
            raise ValueError(
                f"model {name}: {vocab} embeddings for a tokenizer of {known_ids} ids; allowed:"
                " its own tokenizer (data.tokenizer_name_or_path=target)"
            )
        self.checkpoints = False
        # What the network writes would not be text.
        forbidden_V = torch.arange(vocab) >= known_ids
        forbidden_V[blank_id] = True
        self.register_buffer("forbidden_V", forbidden_V, persistent=False)
        self.forbidden_V: Tensor

    @property
    def table_VD(self) -> Tensor:
        """The table of input embeddings."""
        return cast(Tensor, self.model.get_input_embeddings().weight)

    @property
    def head_VD(self) -> Tensor:
        """The matrix of the output layer."""
        return cast(Tensor, self.model.get_output_embeddings().weight)

    @property
    def num_layers(self) -> int:
        """Decoder layers."""
        return self.model.config.num_hidden_layers

    def checkpoint_activations(self) -> None:
        """Compute what layers keep for the backward pass a second time instead of keeping it."""
        self.model.activation_checkpointing_enable({"use_reentrant": False})
        self.checkpoints = True

    def embed(self, ids: Int[Tensor, "*P"]) -> Float[Tensor, "*P D"]:
        """Rows of the table."""
        return cast(Tensor, self.model.get_input_embeddings()(ids))

    def logits(self, hidden_PD: Float[Tensor, "*P D"]) -> Float[Tensor, "*P V"]:
        """What the head makes of hidden states."""
        return cast(Tensor, self.model.get_output_embeddings()(hidden_PD))

    def attention(
        self, start_BN: Int[Tensor, "B N"], stop_BN: Int[Tensor, "B N"], length: int, size: int
    ) -> BlockAttention:
        """Of blocks that see places `start` to `stop` of a context of `length` tokens."""
        return BlockAttention.build(start_BN, stop_BN, length, size, self.attn_backend)

    def read(
        self,
        ids_BL: Int[Tensor, "B L"],
        position_BL: Int[Tensor, "B L"],
        attention: BlockAttention,
        only_keys: bool = False,
    ) -> tuple[Float[Tensor, "B L D"] | None, dict[int, tuple[Tensor, Tensor]]]:
        """The clean pass: hidden states behind the final norm, and keys and values of every layer.

        Args:
            ids_BL, position_BL: tokens, and their places inside their documents.
            attention: of all blocks of the rows (`attention`).
            only_keys: leave out what nobody reads of the last layer; the hidden states are None.
        """
        # A layer that is recomputed cannot be broken off.
        skips = only_keys and not (self.training and self.checkpoints)
        pattern = CleanPass(attention, self.num_layers - 1 if skips else None)
        try:
            hidden_BLD = self._run(self.embed(ids_BL), position_BL, pattern)
        except _EnoughRead:
            hidden_BLD = None
        return hidden_BLD, pattern.context

    def read_blocks(
        self,
        inputs_BMSD: Float[Tensor, "B M S D"],
        position_BMS: Int[Tensor, "B M S"],
        attention: BlockAttention,
        context: dict[int, tuple[Tensor, Tensor]],
    ) -> Float[Tensor, "B M S D"]:
        """A pass over blocks behind a clean pass: hidden states behind the final norm."""
        pattern = BlockPass(attention, context)
        hidden_BQD = self._run(inputs_BMSD.flatten(1, 2), position_BMS.flatten(1), pattern)
        return hidden_BQD.unflatten(1, inputs_BMSD.shape[1:3])

    def read_branches(
        self,
        prefix_PL: Int[Tensor, "P L"],
        length_P: Int[Tensor, " P"],
        branch_NQ: Int[Tensor, "N Q"],
        owner_N: Int[Tensor, " N"],
    ) -> Float[Tensor, "N Q D"]:
        """Hidden states behind the final norm of continuations whose prefixes are read once.

        The same as reading every prefix with its continuation, in as many passes fewer over the
        prefix as it has continuations. Padding stands on the right of both.

        Args:
            prefix_PL, length_P: prefixes, and their tokens without the padding.
            branch_NQ: continuations.
            owner_N: the prefix of each.
        """
        prefixes, length = prefix_PL.shape
        place_L = torch.arange(length, device=prefix_PL.device).expand(prefixes, length)
        attention = self.attention(torch.zeros_like(place_L), place_L, length, 1)
        _, context = self.read(prefix_PL, place_L, attention, only_keys=True)
        step_Q = torch.arange(branch_NQ.shape[1], device=branch_NQ.device)
        behind_N1 = length_P[owner_N][:, None]
        seen_NQL = (place_L[owner_N] < behind_N1)[:, None].expand(-1, len(step_Q), -1)
        own_NQQ = (step_Q <= step_Q[:, None]).expand(len(owner_N), -1, -1)
        pattern = BranchPass(context, owner_N, torch.cat([seen_NQL, own_NQQ], dim=-1))
        return self._run(self.embed(branch_NQ), behind_N1 + step_Q, pattern)

    def _run(self, inputs_BQD: Tensor, position_BQ: Tensor, pattern: Pattern) -> Tensor:
        # A mask with four axes is taken as it is; transformers would make one of the positions.
        unused = inputs_BQD.new_zeros(1, 1, 1, 1)
        return self.model.base_model(
            inputs_embeds=inputs_BQD,
            position_ids=position_BQ,
            attention_mask=unused,
            use_cache=False,
            pattern=pattern,
        ).last_hidden_state

    @torch.no_grad()
    def initialise_blank(self, known: Sequence[int] | None = None) -> None:
        """Give BLANK the mean embedding: rows that text never used may hold anything.

        Args:
            known: ids to average over; None takes all that the tokenizer knows but BLANK itself.
        """
        table_VD = self.table_VD
        rows = ~self.forbidden_V if known is None else torch.tensor(list(known))
        table_VD[self.blank_id] = table_VD[rows].float().mean(0).to(table_VD.dtype)


def _head_dim(config: Any) -> int:
    own = getattr(config, "head_dim", None)
    return own or config.hidden_size // config.num_attention_heads


def architecture_of(model: PreTrainedModel) -> dict[str, Any]:
    """What is needed to build the network again without its weights: plain values."""
    described = config_identity(model.config.to_dict())
    return {key: value for key, value in described.items() if key != "auto_map"}


def from_architecture(architecture: dict[str, Any]) -> PreTrainedModel:
    """A network of random weights in fp32; no code but that of transformers is run.

    Raises:
        ValueError: no causal language model is described.
    """
    options = dict(architecture)
    kind = options.pop("model_type", None)
    try:
        config = AutoConfig.for_model(kind, **options)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    except (KeyError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"algo.backbone.model_type={kind}: cannot be built ({reason})") from error
