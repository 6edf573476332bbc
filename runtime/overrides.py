"""Evaluating a checkpoint: its own configuration, except for what the command line says."""

from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

# What a checkpoint is, as opposed to how it is run.
IDENTITY = (
    "algo", "objective", "refine", "bon", "nce", "scorer", "model", "data", "noise", "masking",
    "block_size", "seed", "training",
)  # fmt: skip


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
        named = {key.replace("/", "."): "/" in key for key in keys}
        for key in sorted(named, key=lambda key: key.count(".")):
            if "." in key and key.split(".")[0] in IDENTITY:
                value = OmegaConf.select(cfg, key)
                # Of another choice in a group nothing of the old one may be left.
                OmegaConf.update(result, key, value, merge=not named[key], force_add=True)
        # Where files are kept belongs to this machine, not to the one that wrote the checkpoint.
        if not {"data", "data.parse"} & set(named):
            _move_parse(result, cfg, stored, keys)
        result.data.cache_dir = cfg.data.cache_dir
        result.training.from_pretrained = cfg.training.from_pretrained
    return result


def _move_parse(result: DictConfig, cfg: DictConfig, stored: dict, keys: Sequence[str]) -> None:
    """Take the parse of a checkpoint's data from this machine, and its parser as it was named."""
    data = stored.get("data", {})
    parse = data.get("parse")
    if parse is None:
        return
    old_cache, folder = data["cache_dir"], Path(parse["folder"])
    if "data.parse.folder" not in keys and folder.is_relative_to(old_cache):
        moved = Path(cfg.data.cache_dir) / folder.relative_to(old_cache)
        result.data.parse.folder = str(moved)
    # What the parser was built with no longer follows the keys beside it.
    for name in parse["parser"]:
        if f"data.parse.{name}" in keys:
            result.data.parse.parser[name] = OmegaConf.select(cfg, f"data.parse.{name}")


def overridden_keys() -> list[str]:
    """Keys and groups named on this process's command line; none outside of Hydra."""
    if not HydraConfig.initialized():
        return []
    overrides = HydraConfig.get().overrides.task
    return [override.lstrip("+~").split("=", 1)[0].split("@")[0] for override in overrides]
