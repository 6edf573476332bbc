"""Arms that a gate is asked for by name: those that go/no-go compares, and those of the order."""

from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig

from modes.gate_folder import ARMS
from runtime.errors import ConfigError
from runtime.overrides import overridden_keys

_COMPARED = ("base_arm", "phase3_arm")


def arms_in(run_dir: Path) -> list[str]:
    """Names of the arms whose rollouts are complete in a folder."""
    return sorted(path.stem for path in (run_dir / ARMS).glob("*.jsonl"))


def require_arms(cfg: DictConfig, there: Sequence[str]) -> None:
    """See that every arm that the user names is among those that are there.

    `mode.base_arm` and `mode.phase3_arm` have names by themselves, which no arm need have: these
    are checked where the command line gives them, and `mode.order` wherever the mode has it.

    Raises:
        ConfigError: the first that is not there, and which are.
    """
    given = overridden_keys()
    named = [(key, str(cfg.mode[key])) for key in _COMPARED if f"mode.{key}" in given]
    order = [str(name) for name in cfg.mode.get("order") or ()]
    shown = dict(named) | {"order": f"[{','.join(order)}]"}
    for key, name in [*named, *(("order", name) for name in order)]:
        if name not in there:
            raise ConfigError(
                f"mode.{key}={shown[key]}: there is no arm {name}; allowed: {', '.join(there)}"
            )
