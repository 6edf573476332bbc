"""mode=audit: does a run keep its promises? `python main.py mode=audit mode.run=FOLDER`."""

import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from omegaconf import DictConfig, OmegaConf

from callbacks.metrics_csv import read_metrics
from runtime.checkpoint import config_hash, read_checkpoint
from runtime.errors import AuditError, CheckpointError, ConfigError
from runtime.run import SUMMARY_KEYS, load_summary
from runtime.trainer import checkpoint_folder


class Check(NamedTuple):
    """One promise and whether it was kept."""

    name: str
    passed: bool
    detail: str


def run(cfg: DictConfig) -> dict[str, float]:
    """Check the run in `mode.run` and print a table.

    Returns:
        {"checks": how many were made, "failed": 0}.

    Raises:
        ConfigError: the folder is not that of a run.
        AuditError: a promise is broken; main ends with exit code 1.
    """
    checks = audit(Path(cfg.mode.run))
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{'ok  ' if check.passed else 'FAIL'}  {check.name:<{width}}  {check.detail}")
    failed = [check for check in checks if not check.passed]
    if failed:
        raise AuditError(
            f"{cfg.mode.run}: {len(failed)} of {len(checks)} checks failed: "
            f"{', '.join(check.name for check in failed)}"
        )
    return {"checks": len(checks), "failed": 0}


def audit(run_dir: Path) -> list[Check]:
    """All checks of one run folder."""
    for name in ("config.yaml", "summary.json", "metrics.csv"):
        if not (run_dir / name).is_file():
            raise ConfigError(f"mode.run={run_dir}: no {name} there; allowed: folder of a run")
    config = OmegaConf.load(run_dir / "config.yaml")
    assert isinstance(config, DictConfig)
    summary = load_summary(run_dir)
    rows = read_metrics(run_dir / "metrics.csv")
    rates = [(row["step"], row["lr"]) for row in rows if "lr" in row]
    return [
        check_summary(summary),
        check_hash(config, summary),
        check_rates(rates),
        check_steps([int(step) for step, _ in rates], int(config.trainer.log_every_n_steps)),
        check_end(rates, summary["steps"], int(config.trainer.log_every_n_steps)),
        *check_checkpoints(_checkpoints(run_dir, config), summary["steps"]),
    ]


def _checkpoints(run_dir: Path, config: DictConfig) -> Path:
    # The folder beside the metrics counts first: a run may have been moved since.
    beside = run_dir / config.checkpointing.get("subdir", "checkpoints")
    return beside if beside.is_dir() else checkpoint_folder(config)


def check_summary(summary: dict) -> Check:
    """summary.json has exactly its keys and says done."""
    exact = tuple(summary) == SUMMARY_KEYS
    status = summary.get("status")
    return Check("summary", exact and status == "done", f"status {status}")


def check_hash(config: DictConfig, summary: dict) -> Check:
    """The configuration beside the results is the one they were made with."""
    now, then = config_hash(config), summary["provenance"]["config_hash"]
    return Check("config hash", now == then, f"{then} in summary.json, {now} from config.yaml")


def check_rates(rates: Sequence[tuple[float, float]]) -> Check:
    """The learning rate never rises again after it has fallen from its peak."""
    if not rates:
        return Check("learning rate", False, "metrics.csv has no column lr")
    peak = max(rate for _, rate in rates)
    fallen, previous = False, rates[0][1]
    for step, rate in rates:
        if fallen and rate > previous * (1 + 1e-9):
            return Check("learning rate", False, f"rises at step {step}: {previous:g} -> {rate:g}")
        fallen = fallen or rate < previous * (1 - 1e-9)
        previous = rate
    return Check("learning rate", True, f"peak {peak:g}, end {previous:g}")


def check_steps(steps: Sequence[int], interval: int) -> Check:
    """Every logged step is there once, in order, also across interruptions."""
    for before, after in itertools.pairwise(steps):
        if after - before != interval:
            return Check(
                "steps", False, f"{before} is followed by {after}, not {before + interval}"
            )
    span = f"{steps[0]} to {steps[-1]}" if steps else "none"
    return Check("steps", bool(steps), f"{len(steps)} rows, {span}, every {interval}")


def check_end(rates: Sequence[tuple[float, float]], steps: int, interval: int) -> Check:
    """The metrics reach to the last step."""
    last = int(rates[-1][0]) if rates else 0
    return Check("end", 0 <= steps - last < interval, f"{steps} steps done, last row {last}")


def check_checkpoints(folder: Path, steps: int) -> Iterator[Check]:
    """best.ckpt and last.ckpt can be read, and the last one is of the last step."""
    for name in ("best.ckpt", "last.ckpt"):
        try:
            step = read_checkpoint(folder / name)["global_step"]
        except CheckpointError as error:
            yield Check(name, False, str(error))
            continue
        yield Check(name, step == steps or (name == "best.ckpt" and step < steps), f"step {step}")
