"""Evaluating a checkpoint: its own configuration, except for what the command line says."""

import shlex
from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

# What a checkpoint is, as opposed to how it is run.
IDENTITY = ("algo", "model", "data", "noise", "masking", "block_size", "seed", "training")


def checkpoint_config(cfg: DictConfig, stored: dict, keys: Sequence[str]) -> DictConfig:
    """The configuration to evaluate `stored` with.

    Sections that say what the model and its data are (`IDENTITY`) come from the checkpoint;
    everything else, and every key or group that the user named, from the composed configuration.

    Args:
        cfg: the composed configuration.
        stored: the configuration inside the checkpoint.
        keys: what the user named, e.g. ["data", "model.length"].
    """
    result = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(result, DictConfig)
    if "experiment" in keys:
        return result
    with open_dict(result):
        for section in IDENTITY:
            if section in stored and section not in keys:
                result[section] = stored[section]
        # A group inside a section, data/parse, goes before the keys inside it, data.parse.folder.
        for key in sorted((key.replace("/", ".") for key in keys), key=lambda key: key.count(".")):
            if "." in key and key.split(".")[0] in IDENTITY:
                OmegaConf.update(result, key, OmegaConf.select(cfg, key), force_add=True)
        # Where files are kept belongs to this machine, not to the one that wrote the checkpoint.
        result.data.cache_dir = cfg.data.cache_dir
        result.training.from_pretrained = cfg.training.from_pretrained
    return result


def overridden_keys() -> list[str]:
    """Keys and groups named on this process's command line; none outside of Hydra."""
    if not HydraConfig.initialized():
        return []
    overrides = HydraConfig.get().overrides.task
    return [override.lstrip("+~").split("=", 1)[0].split("@")[0] for override in overrides]


def command_for(mode: str) -> str:
    """The command line of another mode on the data of this one."""
    task = HydraConfig.get().overrides.task if HydraConfig.initialized() else []
    kept = [override for override in task if _is_of_data(override.lstrip("+~").split("=", 1)[0])]
    return shlex.join(["python", "main.py", f"mode={mode}", *kept])


def _is_of_data(key: str) -> bool:
    # The length is that of the rows, and an experiment may choose anything.
    named = ("data", "model", "model.length", "experiment", "plugins", "paths.cache_dir")
    return key in named or key.startswith(("data.", "data/"))
