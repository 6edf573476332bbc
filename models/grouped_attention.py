"""Attention of grouped heads without copies of keys and values, for decoding on a CPU.

Where heads outnumber keys (GQA), a pass over several tokens has a mask, and transformers repeats
keys and values for every head before it calls PyTorch: a copy of the whole context in every layer.
The kernel for CPUs takes the groups as they are. (On a GPU a mask and groups together would end in
the slow kernel, which is why transformers repeats.)
"""

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask

from models.shared_prefix import Shared, attend_behind

NAME = "grouped_sdpa"


def grouped_sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    shared: Sequence[Shared] | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """[B, Q, H, D] of queries [B, H, Q, D] and keys and values [B, G, S, D], G a divisor of H.

    With `shared` these are what came behind prompts that several rows share
    (`models.shared_prefix`).

    Raises:
        ValueError: a model that asks for more than PyTorch's attention gives.
    """
    for name in ("softcap", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name}; allowed: models with plain attention")
    if shared is not None:
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        layer: Any = module.layer_idx
        behind = attend_behind(query, key, value, attention_mask, scale, shared, layer)
        return behind.transpose(1, 2).contiguous(), None
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    output = F.scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=dropout,
        scale=scaling,
        is_causal=causal and attention_mask is None and query.shape[2] > 1,
        enable_gqa=True,
    )
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, grouped_sdpa)
AttentionMaskInterface.register(NAME, sdpa_mask)


def attend_in_groups(model: PreTrainedModel) -> None:
    """Have a model on a CPU attend so, if it used `sdpa`; others stay as they are."""
    if model.config._attn_implementation == "sdpa" and model.device.type == "cpu":
        model.set_attn_implementation(NAME)
