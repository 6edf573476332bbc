"""Full states of a run while it trains: `checkpoints/checkpoint-00008706-20260501_081812/`.

Beside `last.ckpt`, which is one file and always overwritten, these are folders of parts
(`runtime.full_state`) that stay, all of them or the newest few.
"""

import logging
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from callbacks.checkpoints import between_steps
from runtime.errors import CheckpointError, ConfigError
from runtime.full_state import PATTERN, folder_name, full_states, step_of
from runtime.parts import remove_parts, remove_unfinished

log = logging.getLogger(__name__)


class FullStateFolders(Checkpoint):
    """Saves the full state every so many optimiser steps, and at the end of training.

    The folder that the run resumed from is never deleted, nor are those of later steps, which
    this run cannot have written.

    Args:
        dirpath: where the folders go.
        every_n_steps: optimiser steps between two of them; None saves none.
        keep: how many stay, the newest; None keeps all.
    """

    def __init__(
        self, dirpath: str | Path, every_n_steps: int | None = None, keep: int | None = None
    ) -> None:
        for name, value in (("every_n_steps", every_n_steps), ("keep", keep)):
            if value is not None and value < 1:
                raise ConfigError(f"callbacks.full_state.{name}={value}: allowed >= 1, null")
        self.dirpath = Path(dirpath)
        self.every_n_steps, self.keep = every_n_steps, keep
        self.resumed_from: Path | None = None
        self._saved = self._started = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Note where the run starts; clear away what a killed one left half written."""
        self._started, self._saved = trainer.global_step, 0
        self.resumed_from = Path(trainer.ckpt_path).resolve() if trainer.ckpt_path else None
        if self.every_n_steps is None or not trainer.is_global_zero:
            return
        left = remove_unfinished(self.dirpath, PATTERN)
        if left:
            log.warning("deleted %d full states that were broken off while written", left)
        later = [path for path in full_states(self.dirpath) if _step(path) > self._started]
        if later:
            log.warning(
                "%d full states in %s are of later steps than %d, at which this run starts; it will"
                " not delete them, and one that resumes by itself takes the newest: move them away",
                len(later),
                self.dirpath,
                self._started,
            )

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Save between two optimiser steps."""
        step, every = trainer.global_step, self.every_n_steps
        if every is not None and step % every == 0 and between_steps(trainer, batch_idx):
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state."""
        if self.every_n_steps is not None:
            self._save(trainer)

    def _save(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if step in (0, self._saved):
            return
        self._saved = step
        # A run that was stopped at this very step had no time to save it.
        here = [_step(path) for path in full_states(self.dirpath)]
        exists = trainer.strategy.broadcast(step == self._started and step in here)
        if not exists:
            trainer.save_checkpoint(self.dirpath / folder_name(step))
        if trainer.is_global_zero:
            self._delete_old(step)

    def _delete_old(self, step: int) -> None:
        if self.keep is None:
            return
        past = [path for path in full_states(self.dirpath) if _step(path) <= step]
        for path in past[: -self.keep]:
            if path.resolve() == self.resumed_from:
                continue
            try:
                remove_parts(path)
            except CheckpointError as error:
                # The new state is safe, and the other ranks are on their way to the next step.
                log.warning("%s; the run goes on", error)


def _step(folder: Path) -> int:
    step = step_of(folder)
    assert step is not None, "full_states names no other folders"
    return step
