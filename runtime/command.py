"""The command line of another mode on the data of this one, complete enough to be run."""

import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from hydra import compose
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

# Strings that Hydra takes for themselves without quotes; there are more.
_PLAIN = re.compile(r"(?!(?:null|true|false|nan|inf)$)[A-Za-z/][\w/.-]*", re.ASCII | re.IGNORECASE)


def command_for(mode: str, config: DictConfig) -> str:
    """The command line of `mode` on the data of `config`.

    What the user has said of the data is repeated. The rest, such as the data of a checkpoint, is
    added key by key.

    Args:
        mode: name of the mode.
        config: has `data`, with its `parse`, and `model.length`.
    """
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    named = [override for override in task if _is_of_data(_key(override))]
    keys = {_key(override) for override in named}
    choices = {"data": config.data.name}
    if config.data.get("parse") is not None:
        choices["data/parse"] = config.data.parse.name
    if "experiment" not in keys:
        named[:0] = [f"{key}={as_text(choices[key])}" for key in choices if key not in keys]
    if HydraConfig.initialized() and GlobalHydra.instance().is_initialized():
        named += _differences(config, named)
    return shlex.join(["python", "main.py", *_config_folder(), f"mode={mode}", *named])


def _key(override: str) -> str:
    return override.lstrip("+~").split("=", 1)[0]


def _is_of_data(key: str) -> bool:
    # The length is that of the rows, and an experiment may choose anything.
    named = ("data", "model", "model.length", "experiment", "plugins", "paths.cache_dir")
    return key in named or key.startswith(("data.", "data/"))


def _differences(config: DictConfig, named: Sequence[str]) -> list[str]:
    """Overrides that turn the data that `named` composes into those of `config`."""
    wanted = _values(config)
    added: list[str] = []
    # First what others follow: data.source.files is data.files unless somebody says otherwise.
    for is_last in (False, True):
        try:
            base = compose(HydraConfig.get().job.config_name, [*named, *added])
        # The configuration of a checkpoint may be of files that are not here.
        except HydraException:
            return added
        found = _values(base)
        for key, value in wanted.items():
            if key not in found:
                added += [f"+{key}={as_text(value)}"] if is_last else []
            elif found[key] != value and (is_last or not _follows(base, key)):
                added.append(f"{key}={as_text(value)}")
    return added


def _values(config: DictConfig) -> dict[str, Any]:
    """What decides on the rows, by full key."""
    data = OmegaConf.to_container(config.data, resolve=True)
    return {**dict(_leaves("data", data)), "model.length": config.model.length}


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _leaves(f"{key}.{name}", inner)
    else:
        yield key, value


def _follows(config: DictConfig, key: str) -> bool:
    """Whether a value is that of another key."""
    parent, name = key.rsplit(".", 1)
    return OmegaConf.is_interpolation(OmegaConf.select(config, parent), name)


def _config_folder() -> list[str]:
    sources = HydraConfig.get().runtime.config_sources if HydraConfig.initialized() else []
    paths = [source.path for source in sources if source.provider == "command-line"]
    return [text for path in paths for text in ("--config-dir", path)]


def as_text(value: Any) -> str:
    """A value as Hydra reads it on a command line."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(as_text, value))}]"
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{key}:{as_text(inner)}" for key, inner in value.items()) + "}"
    if isinstance(value, str) and not _PLAIN.fullmatch(value):
        return QuotedString(value, Quote.single).with_quotes()
    return str(value)
