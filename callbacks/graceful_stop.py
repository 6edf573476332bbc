"""Signals during training: finish the step, save, then leave or let the job be requeued."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import torch

from callbacks.checkpoints import between_steps, save_atomically
from runtime.errors import Interrupted

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# By which SLURM announces the end of a job's time: to Lightning, and to submitit.
_WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


class GracefulStop(L.Callback):
    """Stops a run at the next boundary between two optimiser steps, on all ranks together.

    The first signal is only noted. At the boundary `last.ckpt` is saved and `Interrupted` raised.
    A second one raises at once, without a checkpoint; a third one meets the system's default.
    A validation in progress is finished first, so that the resumed run need not repeat it.

    Lightning handles SIGTERM itself by stopping after the micro-batch, in the middle of an
    accumulation if need be; during training this callback takes its place. A warning of SLURM
    (SIGUSR1, SIGUSR2) for which Lightning or submitit has a handler waits for a boundary as well:
    `last.ckpt` is saved, then that handler is called on all ranks, to requeue the job.

    Args:
        dirpath: folder of `last.ckpt`.
    """

    def __init__(self, dirpath: str | Path) -> None:
        self.last_path = Path(dirpath) / "last.ckpt"
        self.signum = 0
        self.warning = 0
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Take over the signals; Lightning has set up its own handlers just before."""
        if threading.current_thread() is not threading.main_thread():
            return
        self._pid = os.getpid()
        handled = [number for number in _WARNINGS if callable(signal.getsignal(number))]
        self._previous = {number: signal.getsignal(number) for number in (*_SIGNALS, *handled)}
        for number in self._previous:
            signal.signal(number, self._note)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if os.getpid() != self._pid:
            return  # a worker forked from this process: the parent decides
        if signum in _WARNINGS:
            self.warning = signum
            return
        if self.signum:
            signal.signal(signum, signal.SIG_DFL)
            raise Interrupted(signum)
        self.signum = signum

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """At a boundary: if any rank was told to stop, save and stop.

        Raises:
            Interrupted: with the signal and the number of steps done.
        """
        if not between_steps(trainer, batch_idx):
            return
        signum, warning = self._agreed(trainer)
        if (signum or warning) and trainer.global_step:
            save_atomically(trainer, self.last_path)
        if signum:
            raise Interrupted(signum, trainer.global_step)
        if warning:
            self.warning = 0
            self._previous[warning](warning, None)

    def _agreed(self, trainer: L.Trainer) -> tuple[int, int]:
        """The signal and the warning to act on; 0 while no rank has got one."""
        if trainer.world_size == 1:
            return self.signum, self.warning
        mine = bool(self.signum or self.warning)
        if not trainer.strategy.reduce_boolean_decision(mine, all=False):
            return 0, 0
        numbers = torch.tensor([self.signum, self.warning], device=trainer.strategy.root_device)
        signum, warning = trainer.strategy.reduce(numbers, reduce_op="max").tolist()
        return signum, warning if warning in self._previous else 0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Give the signals back."""
        self._restore()

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back."""
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
