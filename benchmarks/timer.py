"""CPU seconds and memory of training steps and of the machine's matrix products."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch


class StepTimer(L.Callback):
    """Writes the CPU seconds between the ends of consecutive steps to `path`, with the peak RSS."""

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.seconds: list[float] = []
        self._last = 0.0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._last = time.process_time()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        """One step: data, corruption, forward, backward, guard, update, moving average, logging."""
        now = time.process_time()
        self.seconds.append(now - self._last)
        self._last = now

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the figures."""
        self.path.write_text(json.dumps({"seconds": self.seconds, "rss_gib": peak_rss_gib()}))


def peak_rss_gib() -> float:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def time_steps(step: Callable[[], None], count: int) -> list[float]:
    """CPU seconds of `count` calls after one that is not counted."""
    step()
    seconds = []
    for _ in range(count):
        start = time.process_time()
        step()
        seconds.append(time.process_time() - start)
    return seconds


def product_rate(
    dtype: torch.dtype, rows: int = 1024, inner: int = 768, columns: int = 3072
) -> float:
    """GFLOP/s of the three products of a linear layer: forward, input and weight gradient."""
    x = torch.randn(rows, inner, dtype=dtype)
    w = torch.randn(columns, inner, dtype=dtype)
    g = torch.randn(rows, columns, dtype=dtype)

    def products() -> None:
        torch.mm(x, w.t())
        torch.mm(g, w)
        torch.mm(g.t(), x)

    return 3 * 2 * rows * inner * columns / min(time_steps(products, 10)) / 1e9
