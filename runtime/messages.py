"""Hydra's complaints about a command line, as one line each."""

import difflib
import re

from hydra.errors import MissingConfigException, OverrideParseException
from omegaconf import DictConfig
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from runtime.config import one_line

_UNKNOWN_KEY = (ConfigKeyError, ConfigAttributeError)


def explain(error: BaseException) -> str:
    """One line naming the key, the value where known, and what is allowed."""
    if isinstance(error, MissingConfigException) and error.options:
        return _unknown_option(error)
    if isinstance(error, OverrideParseException):
        reason = re.sub(r"See https\S+.*|Error parsing override '.*'", "", str(error))
        return f"{error.override}: cannot be read ({one_line(reason)}); allowed: KEY=VALUE"
    cause = error.__cause__
    if isinstance(cause, _UNKNOWN_KEY) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(str(error), cause)
    lines = [str(error).split("Config search path:")[0], str(cause or "")]
    return one_line("\n".join(lines))


def _unknown_option(error: MissingConfigException) -> str:
    group, _, option = str(error.missing_cfg_file).rpartition("/")
    return f"{group}={option}: no such option; allowed: {', '.join(error.options or ())}"


def _unknown_key(message: str, cause: OmegaConfBaseException) -> str:
    """Hydra's text ends in "use +KEY=VALUE", the only place that still has the value."""
    key, parent = str(cause.full_key), cause.parent_node
    given = re.search(r"use \+(\S.*)$", message)
    names = sorted(str(name) for name in parent if name != "hydra")
    near = difflib.get_close_matches(str(cause.key), names, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return (
        f"{given.group(1) if given else key}: no such key{hint}; allowed: {', '.join(names)}"
        f" (a new one: +{key}=...)"
    )
