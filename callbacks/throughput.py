"""What a training cost: tokens seen, tokens per second, and the least memory that was left.

Wall times differ from run to run, so they go to a file of their own; metrics.csv stays the same for
a run that was resumed and one that was not.
"""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor

from runtime.run import write_json

_GIB = 2**30
_KEY = "throughput"  # of a checkpoint


class Throughput(L.Callback):
    """Counts over the whole run, however often it was interrupted, and writes `path` at its end.

    `tokens_seen`: tokens of all rows that were trained on, on all ranks, padding left out.
    `wall_s`: from the first step to the end of the training, validations included; of a run that
    was interrupted, up to the checkpoint that it went on from. `tok_per_sec`: their ratio.
    `available_mem_gib_min`: the least memory that was available after an optimiser step, over all
    ranks, and `available_mem_of`: of what (`available_memory`); both absent where
    the system does not tell.

    Args:
        path: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._tokens: Tensor | int = 0  # of this rank; it stays on the device until it is asked for
        self._wall, self._started = 0.0, 0.0
        self._memory: float | None = None
        self._memory_of: str | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Start the clock."""
        self._started = time.monotonic()

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Any,
        batch: Mapping[str, Any],
        batch_idx: int,
    ) -> None:
        """Count the tokens of a micro-batch; look at the memory."""
        self._tokens = self._tokens + batch["token_mask"].sum()
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        found = available_memory(pl_module.device)
        if found is not None:
            self._memory_of, free = found
            self._memory = min(free, self._memory if self._memory is not None else free)

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the counts of all ranks."""
        checkpoint[_KEY] = self._totals()

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Go on from them; the first rank holds what all have seen."""
        saved = checkpoint.get(_KEY)
        if saved is None:
            return
        self._tokens = saved["tokens_seen"] if trainer.is_global_zero else 0
        self._wall, self._memory = saved["wall_s"], saved["memory"]
        self._memory_of = saved["memory_of"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file."""
        totals = self._totals()
        if not trainer.is_global_zero:
            return
        content = {
            "tokens_seen": totals["tokens_seen"],
            "wall_s": totals["wall_s"],
            "tok_per_sec": totals["tokens_seen"] / totals["wall_s"],
        }
        if totals["memory"] is not None:
            content["available_mem_gib_min"] = totals["memory"] / _GIB
            content["available_mem_of"] = totals["memory_of"]
        write_json(self.path, content)

    def _totals(self) -> dict[str, Any]:
        """Of all ranks and of all parts of the run so far, as plain values."""
        ranks = _gathered((int(self._tokens), self._memory))
        known = [memory for _, memory in ranks if memory is not None]
        return {
            "tokens_seen": sum(tokens for tokens, _ in ranks),
            "wall_s": self._wall + time.monotonic() - self._started,
            "memory": min(known, default=None),
            "memory_of": self._memory_of,
        }


def _gathered(value: Any) -> list[Any]:
    """The values of all ranks."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def available_memory(device: torch.device) -> tuple[str, float] | None:
    """Bytes that can still be had, and of what; None where the system does not tell.

    "device": free memory of a GPU that has its own. "host": what new programs could get without
    swapping (MemAvailable of proc(5)), on a CPU and where a GPU shares the memory of the host.
    """
    if device.type == "cuda" and not torch.cuda.get_device_properties(device).is_integrated:
        return "device", float(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # macOS, Windows
        return None
    for line in lines:
        name, _, amount = line.partition(":")
        if name == "MemAvailable":
            return "host", 1024.0 * int(amount.split()[0])
    return None
