"""Shapes and conventions of a DFlash draft (arXiv 2602.06036), and how they follow from a target.

Slots: a block has `block_size` slots at the positions anchor, anchor + 1, ... Slot 0 holds the
anchor, the last known token, the others hold the mask token. Slot k predicts the token at position
anchor + k, without a shift, so slot 0 predicts nothing. With `sample_from_anchor` slot k predicts
the token behind it, at anchor + k + 1, slot 0 included. Either way the j-th predicting slot (j from
0) is about the token at anchor + 1 + j.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

# Those whose frequencies do not change with the length of the text in hand.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
_POSITIVE = (
    "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings", "vocab_size", "num_target_layers",
)  # fmt: skip


def target_layer_rule(num_target_layers: int, num_taps: int) -> tuple[int, ...]:
    """Evenly spread layers from 1 to L - 3, the published rule: [1, 9, 17, 25, 33] of 36.

    One tap is the middle layer L // 2; of a target with two layers it is the first, because the
    last layer cannot be tapped by other programs (`models/taps.py`).

    Raises:
        ValueError: the target has too few layers.
    """
    allowed = max(num_target_layers - 3, 1)
    if not 1 <= num_taps <= allowed:
        raise ValueError(
            f"num_taps={num_taps}: allowed 1 to {allowed} for a target of {num_target_layers}"
            " layers (or name target_layer_ids)"
        )
    if num_taps == 1:
        return (max(0, min(num_target_layers // 2, num_target_layers - 2)),)
    span = num_target_layers - 4
    return tuple(round(1 + place * span / (num_taps - 1)) for place in range(num_taps))


@dataclass(frozen=True)
class DFlashConfig:
    """What the network is made of; the names are those of a config.json of transformers.

    Attributes:
        rope_scaling: None, or `rope_type` and its numbers as transformers names them.
        block_size: slots of a block, the anchor included.
        mask_token_id: a token of the target's embedding that no text contains.
        target_layer_ids: decoder blocks of the target whose outputs the draft reads.
        num_target_layers: how many blocks the target has.
        sample_from_anchor: whether slot 0 predicts, too (see the top of this file).

    Raises:
        ValueError: a value that no network can have.
    """

    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    rope_scaling: Mapping[str, Any] | None = field(default=None, hash=False)
    max_position_embeddings: int = 40_960
    sample_from_anchor: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "target_layer_ids", tuple(self.target_layer_ids))
        for name in _POSITIVE:
            _require(self, name, getattr(self, name) >= 1, "at least 1")
        least = 1 if self.sample_from_anchor else 2
        _require(self, "block_size", self.block_size >= least, f"at least {least}")
        grouped = self.num_attention_heads % self.num_key_value_heads == 0
        _require(self, "num_key_value_heads", grouped, f"a divisor of {self.num_attention_heads}")
        _require(self, "head_dim", self.head_dim % 2 == 0, "an even number")
        known = 0 <= self.mask_token_id < self.vocab_size
        _require(self, "mask_token_id", known, f"0 to {self.vocab_size - 1} (vocab_size - 1)")
        for name in ("rms_norm_eps", "rope_theta"):
            number = getattr(self, name)
            _require(self, name, math.isfinite(number) and number > 0, "a positive number")
        ids, last = self.target_layer_ids, self.num_target_layers - 1
        fits = bool(ids) and len(set(ids)) == len(ids) and all(0 <= i <= last for i in ids)
        if not fits:
            raise ValueError(
                f"target_layer_ids={list(ids)}: allowed are distinct layers 0 to {last}"
            )
        rotary_frequencies(self)

    @property
    def first_predicting_slot(self) -> int:
        """1, or 0 with `sample_from_anchor`."""
        return 0 if self.sample_from_anchor else 1

    @property
    def num_drafts(self) -> int:
        """K, the tokens that one block proposes."""
        return self.block_size - self.first_predicting_slot

    @property
    def taps_size(self) -> int:
        """E, the width of the tapped layers side by side."""
        return len(self.target_layer_ids) * self.hidden_size

    @classmethod
    def from_target(
        cls,
        target: Any,
        *,
        block_size: int,
        num_hidden_layers: int,
        mask_token_id: int,
        num_taps: int | None = None,
        target_layer_ids: Sequence[int] | None = None,
        sample_from_anchor: bool = False,
    ) -> "DFlashConfig":
        """A draft with the widths, heads and rotary frequencies of its target.

        Args:
            target: the transformers configuration of a causal model.
            block_size, num_hidden_layers, mask_token_id, sample_from_anchor: of the draft.
            num_taps: layers to tap by `target_layer_rule`; or
            target_layer_ids: the layers themselves.

        Raises:
            ValueError: the target's rotary embedding or layers cannot be shared.
        """
        if (num_taps is None) == (target_layer_ids is None):
            raise ValueError("target_layer_ids: give either these or num_taps")
        num_layers = target.num_hidden_layers
        rope_theta, rope_scaling = rope_of(target.rope_parameters or {})
        heads = target.num_attention_heads
        end = target.eos_token_id
        return cls(
            hidden_size=target.hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(target, "num_key_value_heads", None) or heads,
            head_dim=getattr(target, "head_dim", None) or target.hidden_size // heads,
            intermediate_size=target.intermediate_size,
            vocab_size=target.vocab_size,
            block_size=block_size,
            mask_token_id=mask_token_id,
            target_layer_ids=tuple(
                target_layer_rule(num_layers, num_taps or 0)
                if target_layer_ids is None
                else target_layer_ids
            ),
            num_target_layers=num_layers,
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=target.max_position_embeddings,
            sample_from_anchor=sample_from_anchor,
            bos_token_id=target.bos_token_id,
            eos_token_id=tuple(end) if isinstance(end, list | tuple) else end,
        )


def _require(config: DFlashConfig, name: str, holds: bool, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)}: allowed {allowed}")


def rope_of(parameters: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta`, and `rope_scaling` or None, out of transformers' `rope_parameters`.

    Raises:
        ValueError: no theta, other frequencies in some layers, or only a part of a head rotated.
    """
    theta = parameters.get("rope_theta")
    if isinstance(theta, bool) or not isinstance(theta, int | float):
        raise ValueError("rope_parameters.rope_theta: needed, one number for all layers")
    part = parameters.get("partial_rotary_factor", 1.0)
    if part != 1.0:
        raise ValueError(f"rope_parameters.partial_rotary_factor={part}: allowed 1.0")
    dropped = ("rope_theta", "partial_rotary_factor")
    scaling = {key: value for key, value in parameters.items() if key not in dropped}
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    return float(theta), None if kind == "default" else scaling


def rotary_frequencies(config: DFlashConfig) -> tuple[Tensor, float]:
    """Angular frequencies [head_dim / 2] in radians per position, and a factor on cos and sin.

    theta^(-2i / head_dim) for pair i; changed as `rope_scaling` says by transformers' own function,
    which the target uses, too.

    Raises:
        ValueError: a kind of scaling that is not here, or numbers it cannot use.
    """
    with torch.device("cpu"):  # also while a network is built without storage
        if config.rope_scaling is None:
            exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32) / config.head_dim
            return 1.0 / config.rope_theta**exponent, 1.0
        return _scaled_frequencies(config, config.rope_scaling)


def _scaled_frequencies(config: DFlashConfig, scaling: Mapping[str, Any]) -> tuple[Tensor, float]:
    kind = scaling.get("rope_type", scaling.get("type"))
    if kind not in ROPE_TYPES:
        raise ValueError(f"rope_scaling.rope_type={kind}: allowed {', '.join(ROPE_TYPES)}")
    from transformers import Qwen3Config
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    try:
        shape = Qwen3Config(
            head_dim=config.head_dim,
            max_position_embeddings=config.max_position_embeddings,
            rope_parameters={**scaling, "rope_type": kind, "rope_theta": config.rope_theta},
        )
        frequency, factor = ROPE_INIT_FUNCTIONS[kind](shape, torch.device("cpu"))
    except (ArithmeticError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"rope_scaling: not usable as {kind} ({error})") from error
    if not (frequency.isfinite().all() and math.isfinite(factor)):
        raise ValueError(f"rope_scaling: gives frequencies that are not finite as {kind}")
    return frequency, float(factor)
