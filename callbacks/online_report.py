"""metrics.json: how a run of an online algorithm went, in the form that tables are made from.

    {arm, completed_steps, stopped_reason, wall_time_s, final: {...}, history: [{step, ...}, ...]}

The history is that of metrics.csv, under the names of its step metrics without `train/`. A run that
a non-finite loss ends is saved before it ends, with the weights of the step before.
"""

import time
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import lightning as L

from callbacks.checkpoints import save_atomically
from callbacks.metrics_csv import read_metrics
from runtime.errors import Interrupted, NonFiniteError
from runtime.run import write_json

_TRAIN = "train/"


@runtime_checkable
class _Stoppable(Protocol):
    stopped_reason: str | None


class OnlineReport(L.Callback):
    """Writes the file when training ends, however it ends.

    Args:
        run_dir: folder of metrics.csv and metrics.json.
        checkpoints: folder of `last.ckpt`.
        arm: what the run is called in tables; None: the name of its folder.
    """

    def __init__(self, run_dir: str | Path, checkpoints: str | Path, arm: str | None = None):
        self.run_dir = Path(run_dir)
        self.last_path = Path(checkpoints) / "last.ckpt"
        self.arm = arm or self.run_dir.name
        self._wall, self._started = 0.0, time.monotonic()

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """All steps done, or stopped by an alert."""
        assert isinstance(pl_module, _Stoppable), "of an algorithm that can be stopped by an alert"
        self._write(trainer, pl_module.stopped_reason)

    def on_exception(
        self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException
    ) -> None:
        """Save what a non-finite step has left unharmed; say why the run ended."""
        if isinstance(exception, NonFiniteError) and trainer.global_step:
            save_atomically(trainer, self.last_path)
        known = isinstance(exception, NonFiniteError | Interrupted)
        self._write(trainer, str(exception) if known else type(exception).__name__)

    def _write(self, trainer: L.Trainer, reason: str | None) -> None:
        if not trainer.is_global_zero:
            return
        table = self.run_dir / "metrics.csv"
        rows = read_metrics(table) if table.is_file() else []
        history = [
            {name.removeprefix(_TRAIN): value for name, value in row.items()}
            for row in rows
            if any(name.startswith(_TRAIN) for name in row)
        ]
        write_json(
            self.run_dir / "metrics.json",
            {
                "arm": self.arm,
                "completed_steps": trainer.global_step,
                "stopped_reason": reason,
                "wall_time_s": self._seconds(),
                "final": history[-1] if history else {},
                "history": history,
            },
        )

    def _seconds(self) -> float:
        return self._wall + time.monotonic() - self._started

    def state_dict(self) -> dict[str, Any]:
        """The time that was used, so that a resumed run adds to it."""
        return {"wall_s": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from it."""
        self._wall = state_dict["wall_s"]
