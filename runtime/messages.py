"""Hydra's complaints about a command line, as one line each."""

import difflib
import re

from hydra.core.override_parser.types import Override
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
    override = _override_of(error)
    if override is not None:
        return _no_choice(override)
    cause = error.__cause__
    if isinstance(cause, _UNKNOWN_KEY) and isinstance(cause.parent_node, DictConfig):
        return _unknown_key(str(error), cause)
    message = one_line(str(error).split("Config search path:")[0])
    reason = one_line(str(cause or ""))
    # Many messages already end with what they were raised from.
    return message if reason in message else one_line(f"{message}\n{reason}")


def _override_of(error: BaseException) -> Override | None:
    """The override of a group that Hydra refuses for its value, which its message does not name."""
    if not str(error).startswith("Config group override must be"):
        return None
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    found = trace.tb_frame.f_locals.get("override") if trace is not None else None
    return found if isinstance(found, Override) else None


def _no_choice(override: Override) -> str:
    """A group that is set to null, or to a number."""
    group = override.get_key_element().lstrip("+")
    # What is added is no default, and cannot be taken away.
    none = "leave it out" if override.is_add() else f"~{group}"
    return (
        f"{override.input_line}: not the name of a choice; allowed: {group}=NAME, or {none} for"
        " none"
    )


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
