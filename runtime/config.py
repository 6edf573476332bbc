"""From a configuration to objects: one `instantiate`, and what its `_target_` may name.

A `_target_` is code that a text file asks to run, so it is checked twice: the dotted name must
start with an allowed prefix, and the object found there must have been *defined* below such a
prefix. The second check stops names that only pass through (`modes.train.os.system`).
"""

import importlib
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import hydra.utils
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from runtime.errors import ConfigError
from runtime.excerpt import shown

ROOT = Path(__file__).resolve().parents[1]

_PACKAGES = (
    "callbacks", "data", "decoding", "evaluation", "models", "modes", "objectives", "rewards",
    "tests.plugins",
)  # fmt: skip
_ROOT_MODULES = ("algorithm", "dataloader", "diffusion")
_LIBRARIES = (
    "lightning.pytorch.Trainer",
    "lightning.pytorch.trainer.trainer.Trainer",
    "lightning.pytorch.callbacks",
    "lightning.pytorch.loggers",
    "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "lightning.pytorch.strategies",
    "torch.distributed.fsdp.MixedPrecision",
    "torch.distributed.fsdp.api.MixedPrecision",
    "torch.optim",
)
PLUGINS_VARIABLE = "PALIMPSEST_PLUGINS"

_plugins: set[str] = set()


def allow_plugins(packages: Iterable[str]) -> None:
    """Let `_target_` name these packages too, for the rest of the process.

    Only the user may widen the list (`plugins: [my_package]` or the environment variable
    PALIMPSEST_PLUGINS=my_package,other): never call this with what a checkpoint contains.
    """
    _plugins.update(packages)


def allowed_prefixes() -> tuple[str, ...]:
    """Every dotted prefix that a `_target_` may start with."""
    from_environment = filter(None, os.environ.get(PLUGINS_VARIABLE, "").split(","))
    return (*_PACKAGES, *_root_modules(), *_LIBRARIES, *sorted({*_plugins, *from_environment}))


def _root_modules() -> tuple[str, ...]:
    # A checkout may grow new algorithms as files beside main.py; once installed, the folder
    # belongs to everybody's packages and only the known names count.
    if not (ROOT / ".git").exists() and not (ROOT / "pyproject.toml").is_file():
        return _ROOT_MODULES
    found = {path.stem for path in ROOT.glob("*.py")} - {"main", "setup", "conftest"}
    return tuple(sorted({*_ROOT_MODULES, *found}))


def is_allowed(name: str) -> bool:
    """Whether a dotted name lies at or below an allowed prefix."""
    return any(name == prefix or name.startswith(prefix + ".") for prefix in allowed_prefixes())


def targets(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (key path, `_target_`) of a nested configuration, outermost first.

    Interpolations are resolved: `a: ${b}` builds what stands in `b`.
    """
    if isinstance(node, DictConfig | ListConfig):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, dict):
        if "_target_" in node:
            yield _join(path, "_target_"), node["_target_"]
        children: Iterable[tuple[Any, Any]] = node.items()
    elif isinstance(node, list):
        children = enumerate(node)
    else:
        return
    for key, child in children:
        yield from targets(child, _join(path, key))


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def check_targets(node: Any, path: str = "") -> None:
    """Check the name of every nested `_target_` without importing anything.

    Raises:
        ConfigError: for a target outside the allowed prefixes.
    """
    for key, target in targets(node, path):
        _check_name(key, target)


def _check_name(key: str, target: Any) -> None:
    if not isinstance(target, str) or not is_allowed(target):
        raise ConfigError(
            f"{key}={shown(target)}: not an allowed target; allowed: names below "
            f"{', '.join(allowed_prefixes())} (own packages: plugins=[my_package])"
        )


def locate(target: str, key: str = "_target_") -> Any:
    """The class or function a `_target_` names; `key` is where the configuration says so.

    Raises:
        ConfigError: not allowed, not found, or only imported there from elsewhere.
    """
    _check_name(key, target)
    module_name, attributes = _importable(target, key)
    found: Any = importlib.import_module(module_name)
    try:
        for attribute in attributes:
            found = getattr(found, attribute)
    except AttributeError as error:
        missing = ".".join(attributes)
        raise ConfigError(f"{key}={target}: {module_name} has no {missing}") from error
    if not callable(found):
        raise ConfigError(f"{key}={target}: not a class or function")
    home = f"{found.__module__}.{found.__qualname__}"
    if not is_allowed(home):
        raise ConfigError(f"{key}={target}: leads to {home}, which is not an allowed target")
    return found


def _importable(target: str, key: str) -> tuple[str, Sequence[str]]:
    """Split a dotted name into its longest module and the attributes inside it."""
    parts = target.split(".")
    for size in range(len(parts) - 1, 0, -1):
        module = ".".join(parts[:size])
        try:
            importlib.import_module(module)
        except ModuleNotFoundError as error:
            # A module that exists but lacks a dependency is a different story than a wrong name.
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise ConfigError(f"{key}={target}: needs the package {error.name}") from error
            continue
        return module, parts[size:]
    raise ConfigError(f"{key}={target}: no such module")


def instantiate(node: Any, **kwargs: Any) -> Any:
    """Build what `node` describes: the only door from configuration to code.

    Args:
        node: a configuration with `_target_`. Nested targets are built first; lists and
            dictionaries arrive as plain Python.
        kwargs: further arguments of the target, passed as they are (never built from).

    Raises:
        ConfigError: a target that is not allowed, or arguments the target does not take.
        ValueError: whatever check of its own the target made.
    """
    path = node._get_full_key(None) if isinstance(node, DictConfig) else ""
    is_config = isinstance(node, DictConfig)
    plain: Any = OmegaConf.to_container(node, resolve=True) if is_config else node
    found = {key: locate(target, key) for key, target in targets(plain, path)}
    outermost = _join(path, "_target_")
    if outermost not in found:
        raise ConfigError(f"{outermost}: missing; allowed: the name of a class or function")
    options = _options_for(found[outermost], plain, kwargs, path)
    try:
        # A partial keeps hydra away from kwargs, which it would otherwise search for targets.
        build = hydra.utils.instantiate(options, _convert_="all", _partial_=True)
    except InstantiationException as error:
        cause = _root_cause(error)
        if isinstance(cause, InstantiationException):
            raise ConfigError(one_line(f"{path}: {cause}")) from error
        raise cause from None
    if plain.get("_partial_", False):
        return partial(found[outermost], *build.args, **build.keywords, **kwargs)
    return build(**kwargs)


def _root_cause(error: BaseException) -> BaseException:
    while isinstance(error, InstantiationException) and error.__cause__ is not None:
        error = error.__cause__
    return error


def _options_for(
    target: Any, node: dict[str, Any], kwargs: dict[str, Any], path: str
) -> dict[str, Any]:
    """The options to pass; an unknown one is named here, before Python's TypeError does.

    `name` labels the choice of a config group, so it is dropped when the target has no use for it.
    """
    parameters = inspect.signature(target).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return node
    options = {k: v for k, v in node.items() if k != "name" or "name" in parameters}
    given = {*map(str, options), *kwargs} - set(parameters)
    unknown = sorted(name for name in given if not name.startswith("_"))
    if unknown:
        raise ConfigError(
            f"{_join(path, unknown[0])}: unknown option of {target.__qualname__}; "
            f"allowed: {', '.join(parameters)}"
        )
    return options


def to_plain(config: dict | DictConfig) -> dict[str, Any]:
    """A configuration as nested dicts and lists: what a checkpoint can hold safely."""
    if isinstance(config, DictConfig):
        config = OmegaConf.to_container(config, resolve=True)  # type: ignore[assignment]
    return config  # type: ignore[return-value]


def one_line(text: str) -> str:
    """Fold a message of several lines into one."""
    return "; ".join(part.strip() for part in text.splitlines() if part.strip())
