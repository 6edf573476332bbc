"""checkpoints/best.ckpt and checkpoints/last.ckpt.

Lightning's own ModelCheckpoint saves inside a step, before the step's metrics are logged and
before a validation that is due; a run that dies there resumes without them. Here `last.ckpt` is
written between two steps, when everything that belongs to the first one is done.
"""

import math
import os
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from runtime.errors import CheckpointError, ConfigError


class BestAndLast(Checkpoint):
    """Keeps the best validated weights and the newest state.

    Args:
        dirpath: folder of the two files.
        every_n_steps: optimiser steps between two `last.ckpt`; one more is written at the end.
        monitor: metric of validation that decides what is best.
        mode: min or max, which of its values is best.
        keep_every_n_steps: optimiser steps between two checkpoints that stay, `step1000.ckpt`, such
            as the ends of epochs; None keeps none.
    """

    def __init__(
        self,
        dirpath: str | Path,
        every_n_steps: int = 500,
        monitor: str = "val/nll",
        mode: str = "min",
        keep_every_n_steps: int | None = None,
    ) -> None:
        if mode not in ("min", "max"):
            raise ConfigError(f"callbacks.checkpoints.mode={mode}: allowed min, max")
        self.best_path = Path(dirpath) / "best.ckpt"
        self.last_path = Path(dirpath) / "last.ckpt"
        self.every_n_steps, self.keep_every_n_steps = every_n_steps, keep_every_n_steps
        self.monitor = monitor
        self.sign = 1.0 if mode == "min" else -1.0
        self.best_score = self.sign * math.inf
        self.best_step = 0
        self._last_saved = self._started = self._kept = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """What was just loaded need not be saved again."""
        self._last_saved = self._started = trainer.global_step

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save `last.ckpt` and what is to stay between two optimiser steps."""
        step = trainer.global_step
        if between_steps(trainer, batch_idx):
            self._keep(trainer)
        due = step % self.every_n_steps == 0 and step != self._last_saved
        if due and between_steps(trainer, batch_idx):
            self._save_last(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save `best.ckpt` if this validation is the best so far."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        score = trainer.callback_metrics.get(self.monitor)
        if score is not None and self.sign * float(score) < self.sign * self.best_score:
            self.best_score, self.best_step = float(score), trainer.global_step
            save_atomically(trainer, self.best_path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state."""
        self._keep(trainer)
        if trainer.global_step != self._last_saved:
            self._save_last(trainer)

    def _keep(self, trainer: L.Trainer) -> None:
        step, every = trainer.global_step, self.keep_every_n_steps
        if not every or step % every or step in (0, self._kept):
            return
        path = self.last_path.with_name(f"step{step}.ckpt")
        # A run that was stopped at this very step had no time to keep it.
        if step != self._started or not path.is_file():
            self._kept = step
            save_atomically(trainer, path)

    def _save_last(self, trainer: L.Trainer) -> None:
        self._last_saved = trainer.global_step
        save_atomically(trainer, self.last_path)

    def state_dict(self) -> dict[str, Any]:
        """The best score so far, so that a resumed run does not overwrite a better `best.ckpt`."""
        return {"best_score": self.best_score, "best_step": self.best_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` saved."""
        self.best_score, self.best_step = state_dict["best_score"], state_dict["best_step"]


class FinalValidation(L.Callback):
    """Validates after the last step, also when `trainer.val_check_interval` does not hit it."""

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Make the last micro-batch one after which validation is due."""
        if batch_idx + 1 == trainer.num_training_batches:
            trainer.val_check_batch = batch_idx + 1


def save_atomically(trainer: L.Trainer, path: Path) -> None:
    """Save a checkpoint so that a kill at any moment leaves the old file or the new one, whole.

    Lightning writes below the system's temporary folder and moves the file from there, which is a
    copy when that is another file system.

    Raises:
        CheckpointError: the file system refuses (disk full, no permission).
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
            temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot be written ({error.strerror or error}); what was there before is"
            " unharmed; free space or set checkpointing.save_dir to another disk"
        ) from error


def between_steps(trainer: L.Trainer, batch_idx: int) -> bool:
    """Whether the micro-batch about to start is the first of an optimiser step."""
    return batch_idx % trainer.accumulate_grad_batches == 0
