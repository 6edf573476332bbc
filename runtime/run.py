"""The folder of a run: what it was asked (config.yaml) and what came out (summary.json)."""

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from runtime.checkpoint import provenance
from runtime.errors import Interrupted, NonFiniteError

SUMMARY_KEYS = ("mode", "algo", "status", "steps", "wall_s", "metrics", "provenance")
STATUSES = ("done", "failed", "interrupted", "nonfinite")


class RunFolder:
    """Records one run.

    Files: `config.yaml` (resolved), `provenance.json`, `summary.json` with exactly the keys
    "mode", "algo", "status", "steps", "wall_s", "metrics", "provenance", and "error" (one line)
    in addition when the run did not end well.
    """

    def __init__(self, cfg: DictConfig) -> None:
        self.cfg = cfg
        self.path = Path(cfg.paths.run_dir)
        self._started = time.monotonic()

    def open(self) -> None:
        """Create the folder with config.yaml."""
        # An earlier run in this folder may have had other data.
        (self.path / "provenance.json").unlink(missing_ok=True)
        write_config(self.path, self.cfg)

    def close(
        self, metrics: Mapping[str, float] | None = None, error: BaseException | None = None
    ) -> dict[str, Any]:
        """Write summary.json.

        Args:
            metrics: what the mode returned; "steps" moves to its own key.
            error: what ended the run early, if anything did.
        """
        metrics = dict(metrics or {})
        summary: dict[str, Any] = {
            "mode": self.cfg.mode.name,
            "algo": OmegaConf.load(self.path / "config.yaml").algo.name,
            "status": _status(error),
            "steps": int(metrics.pop("steps", _steps_at(error))),
            "wall_s": round(time.monotonic() - self._started, 3),
            "metrics": metrics,
            "provenance": read_provenance(self.path) or provenance(self.cfg),
        }
        if error is not None:
            summary["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"
        write_json(self.path / "summary.json", summary)
        return summary


def _status(error: BaseException | None) -> str:
    if error is None:
        return "done"
    if isinstance(error, Interrupted | KeyboardInterrupt):
        return "interrupted"
    return "nonfinite" if isinstance(error, NonFiniteError) else "failed"


def _steps_at(error: BaseException | None) -> int:
    return (error.step or 0) if isinstance(error, Interrupted | NonFiniteError) else 0


def load_summary(run_dir: str | Path) -> dict[str, Any]:
    """Read summary.json of a run folder.

    Raises:
        FileNotFoundError: the run wrote none.
    """
    return json.loads((Path(run_dir) / "summary.json").read_text())


def write_config(run_dir: str | Path, cfg: DictConfig) -> None:
    """Write config.yaml, resolved.

    A mode that opens a checkpoint calls this again, once it knows what is evaluated.
    """
    _write(Path(run_dir) / "config.yaml", OmegaConf.to_yaml(cfg, resolve=True))


def write_provenance(run_dir: str | Path, facts: Mapping[str, Any]) -> None:
    """Note in the run folder what `runtime.checkpoint.provenance` said.

    A mode calls this once its data is known; summary.json then carries the same facts.
    """
    write_json(Path(run_dir) / "provenance.json", facts)


def read_provenance(run_dir: str | Path) -> dict[str, Any] | None:
    """What `write_provenance` noted, or None."""
    path = Path(run_dir) / "provenance.json"
    return json.loads(path.read_text()) if path.is_file() else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write strict JSON atomically: a reader sees the old file or the new one, never half."""
    _write(path, json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    """Replace inf and nan, which JSON does not have, by their names."""
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
