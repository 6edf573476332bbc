"""The Lightning trainer of a run, and where the run resumes."""

import logging
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from runtime.config import instantiate
from runtime.devices import chosen_accelerator, world_size
from runtime.errors import CheckpointError, ConfigError
from runtime.full_state import check_whole, full_states, is_full_state, step_of
from runtime.validation import is_sharded

if TYPE_CHECKING:
    import lightning as L

log = logging.getLogger(__name__)


def build_trainer(cfg: DictConfig, **overrides: Any) -> "L.Trainer":
    """The trainer with its callbacks and loggers.

    `trainer.val_check_interval` counts optimiser steps, so that a run validates at the same
    places whatever its number of devices and micro-batches; Lightning counts micro-batches.

    Args:
        cfg: the whole configuration.
        overrides: arguments of `lightning.pytorch.Trainer` that replace those of `cfg.trainer`.
    """
    _quiet_lightning()
    accumulation = accumulation_steps(cfg)
    updates = OmegaConf.select(cfg, "algo.updates", default=None)
    options: dict[str, Any] = {
        "accelerator": chosen_accelerator(cfg.trainer.accelerator),
        "callbacks": overrides.pop("callbacks", None) or build_group(cfg, "callbacks"),
        "plugins": _plugins(cfg),
        "logger": build_group(cfg, "logger") or False,
        "default_root_dir": str(checkpoint_root(cfg)),
        "accumulate_grad_batches": accumulation,
        "val_check_interval": max(1, validation_interval(cfg) // (updates or 1)) * accumulation,
    }
    if updates is not None:
        # Such an algorithm steps by itself, and clips as the configuration says.
        options["gradient_clip_val"] = None
    if not cfg.trainer.get("enable_progress_bar", True):
        # Lightning refuses a bar among the callbacks when bars are switched off.
        options["callbacks"] = [x for x in options["callbacks"] if not _is_progress_bar(x)]
    return instantiate(cfg.trainer, **(options | overrides))


def _plugins(cfg: DictConfig) -> list[Any]:
    """Those of the configuration, and ours for checkpoints unless one of these is for them.

    Raises:
        ConfigError: one that knows no full states, which are asked for.
    """
    from lightning.pytorch.plugins import CheckpointIO

    from runtime.checkpoint_io import FolderCheckpointIO

    nodes = cfg.trainer.get("plugins") or []
    plugins = [instantiate(node) for node in ([nodes] if isinstance(nodes, DictConfig) else nodes)]
    given = [plugin for plugin in plugins if isinstance(plugin, CheckpointIO)]
    every = cfg.checkpointing.full_state_every_n_steps
    if every is not None and given and not isinstance(given[0], FolderCheckpointIO):
        raise ConfigError(
            f"checkpointing.full_state_every_n_steps={every}: {type(given[0]).__name__} of"
            " trainer.plugins writes no folders; allowed: null, or one derived from"
            " runtime.checkpoint_io.FolderCheckpointIO"
        )
    return plugins if given else [*plugins, FolderCheckpointIO()]


def _is_progress_bar(callback: Any) -> bool:
    from lightning.pytorch.callbacks import ProgressBar

    return isinstance(callback, ProgressBar)


def validation_interval(cfg: DictConfig) -> int:
    """Optimiser steps between two validations; a fraction is one of trainer.max_steps."""
    interval = cfg.trainer.val_check_interval
    if isinstance(interval, int):
        return interval
    return max(1, round(interval * cfg.trainer.max_steps))


def _quiet_lightning() -> None:
    """Leave out Lightning's remarks on hardware and services, and what does not apply here."""
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    # What is logged on validation is already the same on all ranks.
    warnings.filterwarnings("ignore", message=".*sync_dist=True.*")
    # A frozen network is in evaluation mode on purpose.
    warnings.filterwarnings("ignore", message=".*in eval mode at the start of training.*")
    # The algorithm corrupts a batch before it travels; the data module has nothing to do there.
    warnings.filterwarnings("ignore", message=".*overridden `on_before_batch_transfer`.*")
    # A loader here starts at trainer.global_step, so every one of them is resumable.
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before")


def build_group(cfg: DictConfig, group: str) -> list[Any]:
    """Everything in a group of named components (`callbacks`, `logger`); none for null."""
    nodes = cfg.get(group) or {}
    return [instantiate(node) for node in nodes.values() if node is not None]


def accumulation_steps(cfg: DictConfig) -> int:
    """Micro-batches per optimiser step: global_batch_size / (batch_size x devices x nodes).

    Raises:
        ConfigError: the division leaves a rest.
    """
    total, size, ranks = (
        cfg.loader.global_batch_size,
        cfg.loader.batch_size,
        world_size(cfg.trainer),
    )
    micro = (size or 1) * ranks
    if total % micro:
        raise ConfigError(
            f"loader.global_batch_size={total}: not a multiple of loader.batch_size x devices = "
            f"{size or 1} x {ranks}; allowed: multiples of {micro}"
        )
    return total // micro if size is not None else 1


def checkpoint_root(cfg: DictConfig) -> Path:
    """checkpointing.save_dir, or else the run folder."""
    return Path(cfg.checkpointing.save_dir or cfg.paths.run_dir)


def checkpoint_folder(cfg: DictConfig) -> Path:
    """The folder of best.ckpt, last.ckpt and full states."""
    return checkpoint_root(cfg) / cfg.checkpointing.get("subdir", "checkpoints")


def resume_point(cfg: DictConfig) -> Path | None:
    """The checkpoint to go on from.

    `checkpointing.resume_ckpt_path` if given; else, with `resume_from_ckpt` true, the newest of
    checkpoints/last.ckpt and what a SLURM requeue left behind (hpc_ckpt_N.ckpt), if any, or a whole
    full state (checkpoints/checkpoint-STEP-TIME/) of a later step; the same with `required`, but
    then there must be one; with false, none.

    Raises:
        ConfigError: a checkpoint was required and there is none, or the strategy cannot read it.
        CheckpointError: there are full states, and the newest file cannot be compared with them.
    """
    point = _resume_point(cfg)
    if point is not None and is_full_state(point) and is_sharded(cfg):
        raise ConfigError(
            f"checkpointing.resume_ckpt_path={point}: a sharded trainer.strategy reads no full"
            " states; allowed: a checkpoint file, or trainer=ddp"
        )
    return point


def _resume_point(cfg: DictConfig) -> Path | None:
    policy, explicit = cfg.checkpointing.resume_from_ckpt, cfg.checkpointing.resume_ckpt_path
    if explicit is not None:
        return Path(explicit)
    if policy is False:
        return None
    root = checkpoint_root(cfg)
    found = [checkpoint_folder(cfg) / "last.ckpt", *root.glob("hpc_ckpt_*.ckpt")]
    present = [path for path in found if path.is_file()]
    file = max(present, key=lambda path: path.stat().st_mtime, default=None)
    newest = _later_state(checkpoint_folder(cfg), file) or file
    if newest is None and policy == "required":
        raise ConfigError(
            f"checkpointing.resume_from_ckpt=required: no {found[0]}; allowed: true, false, or "
            "checkpointing.resume_ckpt_path=FILE"
        )
    return newest


def _later_state(directory: Path, file: Path | None) -> Path | None:
    """The newest whole full state, if it is of a later step than the checkpoint in `file`."""
    from runtime.checkpoint import read_checkpoint

    states, torn = full_states(directory), []
    if file is not None and states:
        reached = read_checkpoint(file)["global_step"]
        states = [state for state in states if (step_of(state) or 0) > reached]
    while states:
        try:
            check_whole(states[-1])
            break
        except CheckpointError as error:
            torn.append(str(error))
            states.pop()
    if torn:
        log.warning("passed over %d full states that are not whole: %s", len(torn), "; ".join(torn))
    return states[-1] if states else None
