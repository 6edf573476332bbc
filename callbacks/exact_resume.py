"""k steps, stop, resume to N equals N steps: what a checkpoint needs beyond Lightning's own.

Two things. The position: here it is one number, the optimiser steps done, from which the counters
of Lightning's loops follow for any number of ranks and micro-batches. And the state of the random
number generators of every rank, from which dropout draws (the noise of an algorithm is keyed by
step and sample and needs no state).
"""

import logging
import random
from typing import Any

import lightning as L
import numpy as np
import torch

from callbacks.metrics_csv import MetricsCSV

log = logging.getLogger(__name__)


class ExactResume(L.Callback):
    """Saves and restores position and random state; trims metrics.csv to the resumed step.

    A fresh run seeds every rank differently, so that dropout differs between ranks. A run resumed
    on another number of ranks cannot continue their streams; it draws new ones from
    (seed, rank, step) and says so.

    Args:
        seed: seed of the run.
        updates: optimiser steps on every batch.
    """

    def __init__(self, seed: int, updates: int = 1) -> None:
        self.seed, self.updates = seed, updates
        self._saved: list[dict[str, Any]] | None = None
        self._pending = False

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Add the generators' states, one entry per rank."""
        checkpoint["random_states"] = _gather(capture_random_state(), trainer.world_size)

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the states for the first step; move Lightning's counters to the step boundary."""
        self._saved = checkpoint.get("random_states")
        step = checkpoint["global_step"]
        if step == 0:
            checkpoint["loops"] = None  # nothing was done yet: the loops start afresh
            return
        position = loop_position(step // self.updates, trainer.accumulate_grad_batches)
        checkpoint["loops"]["fit_loop"].update(position)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Rows of metrics.csv beyond this step are about to be made again."""
        self._pending = True
        for logger in trainer.loggers:
            if isinstance(logger, MetricsCSV):
                logger.drop_after(trainer.global_step)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Set the generators, once: opening the data loaders has drawn from them before."""
        if not self._pending:
            return
        self._pending = False
        if self._saved is not None and len(self._saved) == trainer.world_size:
            restore_random_state(self._saved[trainer.global_rank])
            return
        if self._saved is not None:
            log.warning(
                "resumed on %d ranks what %d ranks saved: dropout draws new random numbers",
                trainer.world_size,
                len(self._saved),
            )
        seed_rank(self.seed, trainer.global_rank, trainer.global_step)


def loop_position(step: int, accumulation: int) -> dict[str, Any]:
    """Lightning's loop counters after `step` >= 1 batches of the optimiser, as its restart expects
    them; what learns from a batch several times has taken more steps.

    The form is that of a checkpoint taken when the last micro-batch had been trained on but not
    counted as completed: from it, Lightning goes straight to the next micro-batch.
    """
    batches = step * accumulation
    epoch = {"ready": 1, "completed": 0, "started": 1, "processed": 0}
    batch = {"ready": batches, "completed": batches - 1, "started": batches, "processed": batches}
    unused = {"ready": 0, "completed": 0, "started": 0, "processed": 0}
    return {
        "epoch_progress": {"total": epoch, "current": dict(epoch)},
        "epoch_loop.batch_progress": {
            "total": batch,
            "current": dict(batch),
            "is_last_batch": False,
        },
        "epoch_loop.val_loop.batch_progress": {
            "total": unused,
            "current": dict(unused),
            "is_last_batch": False,
        },
        "epoch_loop.state_dict": {"_batches_that_stepped": step - 1},
    }


def capture_random_state() -> dict[str, Any]:
    """States of all generators of this process, as tensors and numbers only.

    Plain values, because checkpoints are read with `weights_only=True`.
    """
    version, words, gauss = random.getstate()
    numpy_state = np.random.get_state(legacy=True)
    assert isinstance(numpy_state, tuple)
    kind, keys, position, has_gauss, cached = numpy_state
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "python": {"version": version, "words": torch.tensor(words), "gauss": gauss},
        "numpy": {
            "kind": kind,
            "keys": torch.from_numpy(keys.astype(np.int64)),
            "position": int(position),
            "has_gauss": int(has_gauss),
            "cached": float(cached),
        },
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the generators to what `capture_random_state` saw."""
    torch.set_rng_state(state["torch"].cpu())
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    python, numpy = state["python"], state["numpy"]
    random.setstate((python["version"], tuple(python["words"].tolist()), python["gauss"]))
    keys = numpy["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state(
        (numpy["kind"], keys, numpy["position"], numpy["has_gauss"], numpy["cached"])
    )


def seed_rank(seed: int, rank: int, step: int) -> None:
    """Seed all generators of this process from (seed, rank, step)."""
    derived = int(np.random.SeedSequence([seed, rank, step]).generate_state(1)[0])
    torch.manual_seed(derived)
    random.seed(derived)
    np.random.seed(derived)


def _gather(state: dict[str, Any], world_size: int) -> list[dict[str, Any]]:
    if world_size == 1:
        return [state]
    states: list[Any] = [None] * world_size
    torch.distributed.all_gather_object(states, state)
    return states
