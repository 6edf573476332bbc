"""A checkpoint that bd3lms wrote, as the dictionary that ours are."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runtime.bd3lms.config import convert_config
from runtime.bd3lms.records import MENTIONED, STAND_INS, Record
from runtime.bd3lms.tokenizer import tokenizer_state_of
from runtime.bd3lms.tree import plain_tree, resolve
from runtime.bd3lms.weights import (
    EMBEDDING,
    check_shapes,
    network_state,
    ordered_average,
    sampling_interval,
    without_prefix,
)
from runtime.config import one_line
from runtime.errors import CheckpointError
from runtime.excerpt import shown
from runtime.safe_load import Refused, load_data

log = logging.getLogger(__name__)

ORIGIN = "bd3lms"
_reported: set[str] = set()


def may_be_foreign(refusal: Refused) -> bool:
    """Whether what the plain reader refused is a name that a bd3lms checkpoint may mention."""
    return refusal.wanted in MENTIONED


def read_bd3lms(path: Path, map_location: Any = "cpu") -> dict[str, Any] | None:
    """Read a checkpoint of bd3lms; nothing in it is executed.

    Returns:
        A dictionary of our form: state_dict; ema or None; hyper_parameters (our configuration and
        our tokenizer's state); global_step; provenance; and `origin`, `sampling_interval` ([low,
        high] or None). None for a file that holds no configuration and tokenizer of bd3lms.

    Raises:
        Refused: it mentions a name beyond configuration and tokenizer.
        CheckpointError: it does not fit together, or is of a model that is not here.
    """
    try:
        content = load_data(path, map_location, STAND_INS)
    except Refused as refusal:
        text = str(refusal).replace("plain Python values", "plain Python values, and of bd3lms"
                                    " checkpoints the configuration and the tokenizer")  # fmt: skip
        raise Refused(text, refusal.wanted) from refusal
    stored = content.get("hyper_parameters") if isinstance(content, Mapping) else None
    if not isinstance(stored, Mapping) or not {"config", "tokenizer"} <= stored.keys():
        return None
    if not isinstance(stored["tokenizer"], Record):
        return None
    try:
        result, remarks = _convert(content, stored)
    # Anything may stand in any place of such a file; torch and memory complain by RuntimeError.
    except (
        ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RuntimeError,
        MemoryError,
    ) as error:  # fmt: skip
        reason = shown(one_line(str(error)) or type(error).__name__, 200)
        raise CheckpointError(f"{path}: checkpoint of bd3lms: {reason}") from error
    _report(path, remarks)
    return result


def _convert(content: Mapping[str, Any], stored: Mapping[str, Any]) -> tuple[dict, list[str]]:
    theirs = plain_tree(stored["config"])
    if not isinstance(theirs, dict) or not isinstance(content.get("state_dict"), Mapping):
        raise ValueError("holds no config or no state_dict")
    config, remarks = convert_config(resolve(theirs))
    tensors = without_prefix(content["state_dict"])
    check_shapes(tensors, config["model"])
    state, conditioned = network_state(tensors, config["model"])
    tokenizer = tokenizer_state_of(stored["tokenizer"], tensors[EMBEDDING].shape[0])
    result = {
        "state_dict": state,
        "ema": _average(content.get("ema"), state, config["model"]["n_blocks"], conditioned),
        "hyper_parameters": {"config": config, "tokenizer": tokenizer},
        "global_step": _count(content, "global_step"),
        "provenance": {
            "git": None,
            "config_hash": None,
            "data_fingerprint": None,
            "versions": {"lightning": shown(content.get("pytorch-lightning_version"))},
        },
        "origin": ORIGIN,
        "sampling_interval": sampling_interval(content, tensors),
    }
    return result, remarks


def _average(ema: Any, state: dict, n_blocks: int, conditioned: bool) -> dict[str, Any] | None:
    if ema is None:
        return None
    if not isinstance(ema, Mapping):
        raise ValueError("ema: allowed {decay, num_updates, shadow_params}")
    shadows = ordered_average(ema.get("shadow_params"), state, n_blocks, conditioned)
    updates = 0 if ema.get("num_updates") is None else _count(ema, "num_updates")
    return {"decay": ema.get("decay"), "num_updates": updates, "shadow_params": shadows}


def _count(values: Mapping[str, Any], key: str) -> int:
    value = values.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{key}={shown(value)}: allowed is a count")
    return value


def _report(path: Path, remarks: list[str]) -> None:
    """Say once per file what is different about it."""
    if str(path) in _reported:
        return
    _reported.add(str(path))
    for remark in remarks:
        log.warning("%s: %s", path, shown(remark, 4000))
