"""One target per process: data, training and decoding read the same frozen weights."""

import json
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from models.causal import CausalTarget
from runtime.config import instantiate
from runtime.errors import ConfigError


def open_target(model: Mapping[str, Any]) -> CausalTarget:
    """The target that the section `model` of a configuration describes, loaded once.

    Raises:
        ConfigError: the section describes something else.
        ValueError: the target cannot be had.
    """
    return _open(json.dumps(dict(model), sort_keys=True))


def take_target(model: Mapping[str, Any]) -> CausalTarget:
    """The same, for one who is going to change its weights: nobody else gets this copy.

    Raises:
        ConfigError: the section describes something else.
        ValueError: the target cannot be had.
    """
    target = open_target(model)
    _open.cache_clear()
    return target


@lru_cache(maxsize=1)
def _open(model: str) -> CausalTarget:
    section = json.loads(model)
    target = instantiate(section)
    if not isinstance(target, CausalTarget):
        raise ConfigError(f"model={section.get('name')}: not a target to draft for")
    return target
