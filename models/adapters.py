"""Low-rank adapters (arXiv 2106.09685) in the linear layers of a frozen network, by way of peft.

y = W x + (alpha / r) B A x,    W frozen, A and B trained
"""

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

_BASE = ".base_layer."  # what peft calls the frozen layer inside of an adapted one


def add_adapters(model: nn.Module, options: Mapping[str, Any]) -> None:
    """Freeze the model and put adapters into its linear layers; they alone are trained.

    Args:
        model: the network.
        options: of `peft.LoraConfig`.

    Raises:
        ValueError: the package is not installed, or options that it refuses.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError as error:
        raise ValueError(
            "algo.lora: needs the package peft; allowed: null, or pip install -r"
            " requirements-extra.txt"
        ) from error
    for name in ("bias", "modules_to_save", "trainable_token_indices"):
        if options.get(name) not in (None, "none"):
            raise ValueError(
                f"algo.lora.{name}={options[name]}: adapters alone are trained; allowed: leave it"
                " out, or algo.lora=null, which trains all weights"
            )
    model.requires_grad_(False)
    try:
        inject_adapter_in_model(LoraConfig(**options), cast(Any, model))
    except (TypeError, ValueError) as error:
        raise ValueError(f"algo.lora: {' '.join(str(error).split())[:200]}") from error
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)


@torch.no_grad()
def merged_state(
    model: nn.Module,
    options: Mapping[str, Any],
    state: Mapping[str, Tensor],
    adapters: Sequence[Tensor] | None = None,
) -> dict[str, Tensor]:
    """The weights W + (alpha / r) B A of the network without adapters.

    Args:
        model: the bare network; what it holds is overwritten.
        options: of the adapters.
        state: of the network with its adapters.
        adapters: trained weights to take instead of those in `state`, in the model's order: their
            moving averages.

    Raises:
        ValueError: options that peft refuses, or a state that is not of this network.
    """
    add_adapters(model, options)
    try:
        model.load_state_dict(state)
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        for weight, value in zip(trained, adapters or trained, strict=True):
            weight.copy_(value)
    except (RuntimeError, ValueError) as error:
        raise ValueError(
            f"its adapters do not fit: {' '.join(str(error).split())[:200]}"
        ) from error
    for name, module in list(model.named_modules()):
        if hasattr(module, "get_base_layer"):
            module.merge()
            parent, _, own = name.rpartition(".")
            setattr(model.get_submodule(parent), own, module.get_base_layer())
    return dict(model.state_dict())


def under_adapters(bare: Mapping[str, Tensor], adapted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a network with adapters whose frozen weights are those of a bare one.

    Args:
        bare: weights of the network without adapters; what it lacks is left out.
        adapted: state of the network with adapters, whose own values these keep.
    """
    found = {}
    for name, value in adapted.items():
        if "lora_" in name:
            found[name] = value
        elif name.replace(_BASE, ".") in bare:
            found[name] = bare[name.replace(_BASE, ".")]
    return found
