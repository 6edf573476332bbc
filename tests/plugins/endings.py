"""A mode that ends in the way it is told."""

import os
import signal

from omegaconf import DictConfig

from data.errors import DataError
from runtime.errors import CheckpointError, NonFiniteError


def run(cfg: DictConfig) -> dict[str, float]:
    """End with the error that `mode.ending` names, or return metrics."""
    ending = cfg.mode.ending
    if ending in ("SIGTERM", "SIGINT"):
        os.kill(os.getpid(), getattr(signal, ending))
    errors = {
        "data": DataError("corpus.txt: line 3: not UTF-8"),
        "checkpoint": CheckpointError("a.ckpt: no such checkpoint"),
        "nonfinite": NonFiniteError("non-finite loss at step 5, rows [1, 2]", 5),
        "bug": ZeroDivisionError("a mistake"),
    }
    if ending in errors:
        raise errors[ending]
    return {"steps": 1, "val/nll": (cfg.optim.lr - 0.25) ** 2}
