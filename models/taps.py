"""Hidden states of chosen layers of a frozen causal language model, kept while it runs.

Layer i means the output of decoder block i: what transformers calls `hidden_states[i + 1]`, except
for the last block, where that list has the output of the final norm instead. Forward hooks keep the
chosen ones only; `output_hidden_states` would keep them all.

Legend: B batch, S tokens, D hidden size, T taps, E = T * D.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


@dataclass(frozen=True)
class TargetOutput:
    """What one pass of the target gave.

    Attributes:
        taps_BSE: the chosen layers' outputs side by side, in the order of `layer_ids`.
        last_hidden_BSD: output of the final norm, what the head reads; None if it was not asked
            for.
        past: transformers' cache, or None.
    """

    taps_BSE: Tensor
    last_hidden_BSD: Tensor | None
    past: Any


class Recording:
    """The outputs of the tapped layers in the latest pass through the model."""

    def __init__(self, layer_ids: Sequence[int]) -> None:
        self._layer_ids = tuple(layer_ids)
        self._outputs: dict[int, Tensor] = {}

    def keep(self, layer_id: int, output: Any) -> None:
        """Take one layer's output; some models return it in a tuple."""
        self._outputs[layer_id] = output[0] if isinstance(output, tuple) else output

    @property
    def taps_BSE(self) -> Float[Tensor, "B S E"]:
        """The outputs side by side; only after a pass."""
        assert self._outputs, "the model did not run inside taps.recording()"
        return torch.cat([self._outputs[layer_id] for layer_id in self._layer_ids], dim=-1)


class TargetTaps:
    """Runs a target and keeps what a draft conditions on.

    Args:
        model: a causal language model of transformers whose decoder has a list `layers` (Llama,
            Qwen2, Qwen3, Mistral and their kin).
        layer_ids: distinct decoder blocks, counted from 0.

    Raises:
        ValueError: the model has no such list, or no such layer.
    """

    def __init__(self, model: nn.Module, layer_ids: Sequence[int]) -> None:
        decoder: Any = getattr(model, "base_model", None)
        layers = getattr(decoder, "layers", None)
        if not isinstance(layers, nn.ModuleList):
            raise ValueError(
                f"target {type(model).__name__}: has no list of decoder layers;"
                " allowed: causal models in the style of Llama and Qwen"
            )
        if not layer_ids or len(set(layer_ids)) < len(layer_ids) or not all(
            0 <= layer_id < len(layers) for layer_id in layer_ids
        ):  # fmt: skip
            raise ValueError(
                f"target_layer_ids={list(layer_ids)}: allowed are distinct layers"
                f" 0 to {len(layers) - 1} of the target"
            )
        self.layer_ids = tuple(layer_ids)
        self._layers = layers
        self._decoder = decoder
        self._up_to_last_tap = _with_layers(decoder, list(layers)[: max(layer_ids) + 1])

    def run(
        self,
        input_ids_BS: Int[Tensor, "B S"],
        *,
        attention_mask: Bool[Tensor, "B S"] | Int[Tensor, "B S"] | None = None,
        position_ids: Int[Tensor, "B S"] | None = None,
        past: Any = None,
        use_cache: bool = False,
        last_hidden: bool = True,
    ) -> TargetOutput:
        """One pass without gradient and without logits.

        Documents packed into one row are kept apart by transformers itself where `position_ids`
        begin again at 0 and there is neither an `attention_mask` nor a `past`.

        Args:
            input_ids_BS: tokens.
            attention_mask, position_ids, use_cache: as for the model.
            past: a cache of earlier tokens, which is extended.
            last_hidden: whether the final norm's output is needed. If not, the layers behind the
                last tap do not run, so a cache then has no entries for them.

        Raises:
            ValueError: an attention that ignores where documents begin.
        """
        if position_ids is not None and "flash" in str(self._decoder.config._attn_implementation):
            raise ValueError(
                f"model.attn_implementation={self._decoder.config._attn_implementation}: does not"
                " keep documents of a row apart; allowed: sdpa, eager"
            )
        decoder = self._decoder if last_hidden else self._up_to_last_tap
        with self.recording() as recording, torch.no_grad():
            output = decoder(
                input_ids=input_ids_BS,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past,
                use_cache=use_cache or past is not None,
            )
        return TargetOutput(
            recording.taps_BSE,
            output.last_hidden_state if last_hidden else None,
            output.past_key_values,
        )

    @contextmanager
    def recording(self) -> Iterator[Recording]:
        """Inside, every pass through the model leaves its taps in the yielded recording.

        For passes that need logits too: `with taps.recording() as recording: model(...)`.
        """
        recording = Recording(self.layer_ids)
        handles = []
        try:
            for layer_id in self.layer_ids:
                hook = _keeper(recording, layer_id)
                handles.append(self._layers[layer_id].register_forward_hook(hook))
            yield recording
        finally:
            for handle in handles:
                handle.remove()


def _keeper(recording: Recording, layer_id: int) -> Any:
    def keep(module: nn.Module, arguments: Any, output: Any) -> None:
        """A forward hook that changes nothing."""
        recording.keep(layer_id, output)

    return keep


def _with_layers(decoder: nn.Module, layers: Sequence[nn.Module]) -> nn.Module:
    """The same decoder, weights shared, with these layers only."""
    some = copy.copy(decoder)
    some._modules = {**decoder._modules, "layers": nn.ModuleList(layers)}
    # A decoder compiled in place carries its compiled call with it: that of all layers.
    some._compiled_call_impl = None
    return some
