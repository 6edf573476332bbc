"""The tensors of a bd3lms checkpoint under our names and in our order.

Names and shapes are the same, apart from what `torch.compile` put in front of them. The moving
average is a list without names, in the order in which the network registers its parameters.

An autoregressive network of bd3lms has no conditioning on the noise level. Here it has one, which
for it is constant: with these weights zero, scales and shifts are 0, and gates are 1 by their bias.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from runtime.excerpt import shown

if TYPE_CHECKING:
    from torch import Tensor

PREFIX = "_orig_mod."
BACKBONE = "backbone."
EMBEDDING = "backbone.vocab_embed.embedding"
INV_FREQ = "backbone.rotary_emb.inv_freq"
INTERVAL = ("sampling_eps_min", "sampling_eps_max")
_CONDITIONER = (
    "sigma_map.mlp.0.weight", "sigma_map.mlp.0.bias", "sigma_map.mlp.2.weight",
    "sigma_map.mlp.2.bias",
)  # fmt: skip
_MODULATION = ("adaLN_modulation.weight", "adaLN_modulation.bias")
_BLOCK = (
    "norm1.weight", "attn_qkv.weight", "attn_out.weight", "norm2.weight",
    "mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias",
)  # fmt: skip
_MAX_CONDITION = 1024  # where no weight says how wide the conditioning is
_OUTPUT = ("norm_final.weight", "linear.weight", "linear.bias")


def parameter_order(n_blocks: int, conditioned: bool = True) -> list[str]:
    """Names of all parameters in the order of bd3lms's moving average, which is also ours.

    Its list chains the parameters of the backbone and those of the noise schedule, which has none.

    Args:
        n_blocks: transformer blocks.
        conditioned: whether the network has a noise level (all but the autoregressive one).
    """
    modulation = _MODULATION if conditioned else ()
    names = ["vocab_embed.embedding", *(_CONDITIONER if conditioned else ())]
    for block in range(n_blocks):
        names += [f"blocks.{block}.{name}" for name in (*_BLOCK, *modulation)]
    names += [f"output_layer.{name}" for name in (*_OUTPUT, *modulation)]
    return [BACKBONE + name for name in names]


def without_prefix(state: Mapping[str, Any]) -> dict[str, "Tensor"]:
    """The tensors under the names that they have without `torch.compile`.

    Raises:
        ValueError: something is no tensor, or two have the same name.
    """
    from torch import Tensor

    found = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f"state_dict.{shown(key)}: no tensor")
        name = key.replace(PREFIX, "")
        if name in found:
            raise ValueError(f"state_dict.{shown(key)}: there is {shown(name)} as well")
        found[name] = value
    return found


def sampling_interval(
    content: Mapping[str, Any], state: Mapping[str, "Tensor"]
) -> list[float] | None:
    """The interval of masking rates that the search found, or None; single precision is undone."""
    found = [content.get(name, state.get(name)) for name in INTERVAL]
    if any(value is None for value in found):
        return None
    low, high = (round(float(value), 6) for value in found)
    if not 0.0 <= low <= high <= 1.0:
        raise ValueError(f"{INTERVAL[0]}={low}, {INTERVAL[1]}={high}: allowed 0 <= min <= max <= 1")
    return [low, high]


def check_shapes(state: Mapping[str, "Tensor"], model: Mapping[str, Any]) -> None:
    """Raise ValueError unless these are the weights of a network of the sizes in `model`.

    Called before anything of these sizes is made: numbers in a small file may be of any size.
    """
    if EMBEDDING not in state or state[EMBEDDING].dim() != 2:
        raise ValueError(f"state_dict has no {EMBEDDING} of two dimensions")
    vocab_size, width = state[EMBEDDING].shape
    conditioner = state.get(BACKBONE + _CONDITIONER[3])
    blocks = {name.split(".")[2] for name in state if name.startswith(f"{BACKBONE}blocks.")}
    for key, found in (("hidden_size", width), ("n_blocks", len(blocks))):
        if model[key] != found:
            raise ValueError(f"config.model.{key}={shown(model[key])}: the weights have {found}")
    cond = model["cond_dim"]
    if conditioner is not None and tuple(conditioner.shape) != (cond,):
        shape = tuple(conditioner.shape)
        raise ValueError(f"config.model.cond_dim={shown(cond)}: the weights have {shape}")
    if conditioner is None and cond > _MAX_CONDITION:
        raise ValueError(f"config.model.cond_dim={shown(cond)}: allowed up to {_MAX_CONDITION}")
    shapes = _shapes(vocab_size, width, cond, len(blocks), conditioner is not None)
    for name, shape in shapes.items():
        if name not in state:
            raise ValueError(f"state_dict has no {name}")
        if tuple(state[name].shape) != shape:
            raise ValueError(
                f"state_dict.{name}: shape {tuple(state[name].shape)}, allowed {shape}"
            )


def _shapes(
    vocab_size: int, width: int, cond: int, n_blocks: int, conditioned: bool
) -> dict[str, tuple[int, ...]]:
    """Shapes of all parameters."""
    of_block = ((width,), (3 * width, width), (width, width), (width,), (4 * width, width),
                (4 * width,), (width, 4 * width), (width,))  # fmt: skip
    of_output = ((width,), (vocab_size, width), (vocab_size,))
    found: dict[str, tuple[int, ...]] = {"vocab_embed.embedding": (vocab_size, width)}
    for block in range(n_blocks):
        found |= {f"blocks.{block}.{n}": s for n, s in zip(_BLOCK, of_block, strict=True)}
    found |= {f"output_layer.{n}": s for n, s in zip(_OUTPUT, of_output, strict=True)}
    if conditioned:
        found |= _conditioning_shapes(width, cond, n_blocks)
    return {BACKBONE + name: shape for name, shape in found.items()}


def _conditioning_shapes(width: int, cond: int, n_blocks: int) -> dict[str, tuple[int, ...]]:
    of_conditioner = (cond, 256), (cond,), (cond, cond), (cond,)
    found: dict[str, tuple[int, ...]] = dict(zip(_CONDITIONER, of_conditioner, strict=True))
    parts = {**{f"blocks.{block}": 6 for block in range(n_blocks)}, "output_layer": 2}
    for place, number in parts.items():
        found[f"{place}.{_MODULATION[0]}"] = (number * width, cond)
        found[f"{place}.{_MODULATION[1]}"] = (number * width,)
    return found


def network_state(
    state: Mapping[str, "Tensor"], model: Mapping[str, Any]
) -> tuple[dict[str, "Tensor"], bool]:
    """The state of our network, and whether theirs had a conditioning on the noise level.

    The rotary frequencies are a function of the head size and are computed anew, after a look at
    those in the file; the two ends of the sampling interval are no part of the network.

    Raises:
        ValueError: the rotary frequencies are others.
    """
    ours = {name: value for name, value in state.items() if name not in INTERVAL}
    head_dim = model["hidden_size"] // model["n_heads"]
    frequencies = rotary_frequencies(head_dim)
    theirs = ours.get(INV_FREQ)
    if theirs is not None and not _close(theirs, frequencies):
        raise ValueError(f"{INV_FREQ}: other frequencies than 10000^(-2i/{head_dim})")
    ours[INV_FREQ] = frequencies
    conditioned = BACKBONE + _CONDITIONER[0] in ours
    if not conditioned:
        ours |= constant_conditioning(model)
    return ours, conditioned


def rotary_frequencies(head_dim: int) -> "Tensor":
    """10000^(-2i/K), i < K/2."""
    import torch

    return 10_000.0 ** -(torch.arange(0, head_dim, 2).float() / head_dim)


def _close(theirs: "Tensor", ours: "Tensor") -> bool:
    import torch

    # As precise as bf16, in which a checkpoint may have been saved.
    return theirs.shape == ours.shape and torch.allclose(theirs.float().cpu(), ours, rtol=1e-2)


def constant_conditioning(model: Mapping[str, Any]) -> dict[str, "Tensor"]:
    """Weights of a conditioning that does nothing: scales and shifts 0, gates 1."""
    import torch

    width, cond = model["hidden_size"], model["cond_dim"]
    shapes = _conditioning_shapes(width, cond, model["n_blocks"])
    found = {BACKBONE + name: torch.zeros(shape) for name, shape in shapes.items()}
    # Shift, scale and gate of attention, then of the MLP.
    gates = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0, 1.0]).repeat_interleave(width)
    for block in range(model["n_blocks"]):
        found[f"{BACKBONE}blocks.{block}.{_MODULATION[1]}"] = gates.clone()
    return found


def ordered_average(
    shadows: Any, state: Mapping[str, "Tensor"], n_blocks: int, conditioned: bool
) -> list["Tensor"]:
    """The moving average in our order, each tensor checked against the weight it belongs to.

    Args:
        shadows: the list of the file.
        state: our network's state; what theirs lacks is taken from it.
        n_blocks: transformer blocks.
        conditioned: whether their network had a conditioning.

    Raises:
        ValueError: the list does not fit; the message names place and shapes.
    """
    names = parameter_order(n_blocks, conditioned)
    if not isinstance(shadows, Sequence) or len(shadows) != len(names):
        count = len(shadows) if isinstance(shadows, Sequence) else "no"
        raise ValueError(f"ema.shadow_params: {count} tensors for {len(names)} parameters")
    found: dict[str, Tensor] = {}
    for index, (name, shadow) in enumerate(zip(names, shadows, strict=True)):
        if name not in state:
            raise ValueError(f"ema.shadow_params[{index}]: state_dict has no {name}")
        theirs, ours = tuple(getattr(shadow, "shape", ())), tuple(state[name].shape)
        if not hasattr(shadow, "shape") or theirs != ours:
            raise ValueError(f"ema.shadow_params[{index}]: shape {theirs}, {name} has {ours}")
        found[name] = shadow
    return [found.get(name, state[name]) for name in parameter_order(n_blocks)]
