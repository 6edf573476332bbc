"""config.json of a draft folder, as z-lab's tools, SGLang and vLLM read it, and our configuration.

What loaders look up in different places is written in all of them: `block_size` at the top and in
`dflash_config`; the rotary embedding as `rope_theta` and `rope_scaling`, and as transformers 5 says
it, as `rope_parameters`. `auto_map` is left out: it names a Python file beside the weights, and
nobody should have to run one.

A file is untrusted: every value is checked, and no larger than a draft could need.
"""

from collections.abc import Callable, Mapping
from typing import Any

from models.dflash_config import ROPE_TYPES, DFlashConfig, rope_of
from runtime.excerpt import shown
from runtime.key_kinds import is_integer, is_number

ARCHITECTURE = "DFlashDraftModel"
# Loaders that do not know this layout would read its slots wrongly; so it has a name of its own.
FROM_ANCHOR_ARCHITECTURE = "DFlashFromAnchorDraftModel"
ARCHITECTURES = (ARCHITECTURE, FROM_ANCHOR_ARCHITECTURE)

Check = Callable[[str, Any], Any]
# The largest numbers that may come in; beyond them lies no draft, but a lot of memory.
_SIZES = {
    "hidden_size": 2**16, "num_hidden_layers": 2**8, "num_attention_heads": 2**10,
    "num_key_value_heads": 2**10, "head_dim": 2**12, "intermediate_size": 2**20,
    "vocab_size": 2**24, "max_position_embeddings": 2**31, "num_target_layers": 2**12,
}  # fmt: skip
_DFLASH_KEYS = (
    "block_size", "mask_token", "mask_token_id", "sample_from_anchor", "target_layer_ids",
)  # fmt: skip
_ROPE_NUMBERS = (
    "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale",
    "mscale_all_dim",
)  # fmt: skip
# What the network here does, for keys that could say otherwise.
_FIXED = {
    "model_type": "qwen3", "hidden_act": "silu", "attention_bias": False,
    "use_sliding_window": False, "partial_rotary_factor": 1.0,
}  # fmt: skip


def config_json(config: DFlashConfig, dtype: str) -> dict[str, Any]:
    """What config.json says of a draft whose weights are stored in `dtype`."""
    from_anchor, end = config.sample_from_anchor, config.eos_token_id
    theta = int(config.rope_theta) if config.rope_theta.is_integer() else config.rope_theta
    scaling = dict(config.rope_scaling) if config.rope_scaling else None
    dflash = {
        "block_size": config.block_size,
        "mask_token_id": config.mask_token_id,
        "target_layer_ids": list(config.target_layer_ids),
    }
    return {
        "architectures": [FROM_ANCHOR_ARCHITECTURE if from_anchor else ARCHITECTURE],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "block_size": config.block_size,
        "bos_token_id": config.bos_token_id,
        "dflash_config": dflash | ({"sample_from_anchor": True} if from_anchor else {}),
        "dtype": dtype,
        "eos_token_id": list(end) if isinstance(end, tuple) else end,
        "hidden_act": "silu",
        **{name: getattr(config, name) for name in _SIZES},
        "initializer_range": 0.02,
        "layer_types": ["full_attention"] * config.num_hidden_layers,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "qwen3",
        "rms_norm_eps": config.rms_norm_eps,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta},
        "rope_scaling": scaling,
        "rope_theta": theta,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
    }


def architecture(content: Mapping[str, Any]) -> Any:
    """The first name in `architectures`, by which loaders choose a class."""
    names = content.get("architectures")
    return names[0] if isinstance(names, list) and names else names


def parse_config(content: Mapping[str, Any]) -> DFlashConfig:
    """Our configuration; keys that change nothing are passed over.

    Raises:
        ValueError: a value is missing, of a wrong type or size, said twice and differently, or
            asks for something that this network does not do.
    """
    name = architecture(content)
    _require(name in ARCHITECTURES, "architectures", name, ", ".join(ARCHITECTURES))
    for key, only in _FIXED.items():
        _same(key, content.get(key), (only, None))
    dflash = content.get("dflash_config") or {}
    _require(isinstance(dflash, dict), "dflash_config", dflash, "an object with keys")
    for key, value in dflash.items():
        # Null and false switch things off, as with `causal`; others may change what is computed.
        harmless = value is None or value is False or key in _DFLASH_KEYS
        _require(harmless, f"dflash_config.{shown(key)}", value, ", ".join(_DFLASH_KEYS))
    sizes = {key: _integer(1, most)(key, content.get(key)) for key, most in _SIZES.items()}
    _check_layer_types(content.get("layer_types"), sizes["num_hidden_layers"])
    from_anchor = name == FROM_ANCHOR_ARCHITECTURE
    _same(
        "dflash_config.sample_from_anchor",
        dflash.get("sample_from_anchor"),
        (True,) if from_anchor else (False, None),
    )
    theta, scaling = _rope(content)
    token = _integer(0, sizes["vocab_size"])
    return DFlashConfig(
        **sizes,
        block_size=_said_once(content, dflash, "block_size", _integer(1, 2**12)),
        mask_token_id=_said_once(content, dflash, "mask_token_id", token),
        target_layer_ids=_said_once(content, dflash, "target_layer_ids", _layer_ids),
        sample_from_anchor=from_anchor,
        rms_norm_eps=_number("rms_norm_eps", content.get("rms_norm_eps")),
        rope_theta=theta,
        rope_scaling=scaling,
        bos_token_id=_optional(content, "bos_token_id", token),
        eos_token_id=_optional(content, "eos_token_id", _one_or_several(token)),
    )


def _require(holds: bool, key: str, value: Any, allowed: str) -> None:
    if not holds:
        raise ValueError(f"{key}={shown(value)}: allowed {allowed}")


def _same(key: str, value: Any, allowed: tuple[Any, ...]) -> None:
    # Equal and of one type: 1 is not true.
    is_one = any(value == only and type(value) is type(only) for only in allowed)
    _require(is_one, key, value, " or ".join(str(only) for only in allowed))


def _integer(low: int, high: int) -> Check:
    def check(key: str, value: Any) -> int:
        """A whole number of this range."""
        fits = is_integer(value) and low <= value <= high
        _require(fits, key, value, f"a whole number from {low} to {high}")
        return value

    return check


def _number(key: str, value: Any) -> float:
    # 1e-6 may be written by another program as 0, and no rounding is worth an overflow.
    _require(is_number(value) and 0 < value < 1e30, key, value, "a positive number")
    return float(value)


def _layer_ids(key: str, value: Any) -> tuple[int, ...]:
    fits = isinstance(value, list) and 0 < len(value) <= _SIZES["num_target_layers"]
    _require(fits, key, value, "a list of layers")
    check = _integer(0, _SIZES["num_target_layers"])
    return tuple(check(f"{key}[{place}]", item) for place, item in enumerate(value))


def _one_or_several(token: Check) -> Check:
    def check(key: str, value: Any) -> int | tuple[int, ...]:
        """A token, or a short list of them."""
        if not isinstance(value, list):
            return token(key, value)
        _require(0 < len(value) <= 100, key, f"{len(value)} tokens", "1 to 100 tokens")
        return tuple(token(f"{key}[{place}]", item) for place, item in enumerate(value))

    return check


def _optional(content: Mapping[str, Any], key: str, check: Check) -> Any:
    value = content.get(key)
    return None if value is None else check(key, value)


def _said_once(
    content: Mapping[str, Any], dflash: Mapping[str, Any], key: str, check: Check
) -> Any:
    """A value at the top, in `dflash_config`, or the same one in both."""
    places = {key: content.get(key), f"dflash_config.{key}": dflash.get(key)}
    values = {place: check(place, value) for place, value in places.items() if value is not None}
    _require(bool(values), key, None, f"a value here or in dflash_config.{key}")
    first, *others = values.values()
    for other in others:
        both = " and ".join(f"{place}={shown(str(value))}" for place, value in values.items())
        if other != first:
            raise ValueError(f"{both}: allowed one value, or the same one twice")
    return first


def _check_layer_types(value: Any, num_layers: int) -> None:
    allowed = f"full_attention, once for each of the {num_layers} layers"
    _require(value is None or isinstance(value, list), "layer_types", value, allowed)
    if value is not None:
        _require(len(value) == num_layers, "layer_types", f"{len(value)} entries", allowed)
        for place, item in enumerate(value):
            _require(item == "full_attention", f"layer_types[{place}]", item, allowed)


def _rope(content: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """Theta and scaling from either spelling; if both are there, they must agree."""
    theta = {"rope_theta": content.get("rope_theta")}
    spellings = []
    if content.get("rope_parameters") is not None:
        spellings.append(_rope_of("rope_parameters", content["rope_parameters"], theta))
    if content.get("rope_theta") is not None:
        spellings.append(_rope_of("rope_scaling", content.get("rope_scaling") or {}, theta))
    _require(bool(spellings), "rope_theta", None, "a value here or in rope_parameters")
    if spellings[0] != spellings[-1]:
        raise ValueError(
            f"rope_parameters={shown(str(spellings[0]))} and"
            f" rope_theta, rope_scaling={shown(str(spellings[-1]))}: allowed the same in both"
        )
    return spellings[0]


def _rope_of(key: str, value: Any, theta: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """One spelling; a theta inside goes before the one at the top, as in transformers."""
    _require(isinstance(value, dict), key, value, "an object with keys")
    kind = value.get("rope_type", value.get("type", "default"))
    _require(kind in ROPE_TYPES, f"{key}.rope_type", kind, ", ".join(ROPE_TYPES))
    names = {**theta, **value}
    numbers = {k: v for k, v in names.items() if v is not None and k not in ("rope_type", "type")}
    for name, number in numbers.items():
        if name == "truncate":
            _same(f"{key}.{name}", number, (True, False))
            continue
        _require(name in _ROPE_NUMBERS, f"{key}.{shown(name)}", number, ", ".join(_ROPE_NUMBERS))
        _number(f"{key}.{name}", number)
    return rope_of({"rope_type": kind, **numbers})
