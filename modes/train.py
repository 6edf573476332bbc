"""mode=train: fit the algorithm, resuming where the run was left."""

import logging
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from omegaconf import DictConfig, OmegaConf

from callbacks.metrics_csv import read_metrics
from dataloader import LanguageData
from opening import build_algorithm
from runtime.checkpoint import check_resumable, provenance, read_checkpoint
from runtime.run import write_provenance
from runtime.trainer import build_trainer, resume_point

log = logging.getLogger(__name__)

CURVES = ("train/loss", "val/nll")


def run(cfg: DictConfig) -> dict[str, float]:
    """Train to trainer.max_steps and report.

    Returns:
        steps; the last value of every validation metric (val/nll in nats per token, val/ppl, ...)
        and the best val/nll; the perplexity of the training unigrams on the validation split;
        tokens_per_s of this call's fit, validation included.

    Raises:
        ConfigError, DataError, CheckpointError: before the first step.
        NonFiniteError: a loss or gradient was inf or nan; the weights are those of the step before.
        Interrupted: stopped by a signal, after saving last.ckpt.
    """
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = resume_point(cfg)
    if checkpoint is not None:
        # Says in one line what is wrong with a bad file.
        check_resumable(read_checkpoint(checkpoint), checkpoint)
    data = LanguageData(cfg)
    algorithm = build_algorithm(cfg, data)
    metrics = fit(cfg, algorithm, data, checkpoint)
    if algorithm.models_text:
        metrics |= data.unigram_metrics("validation")  # what a model has to beat
    return metrics


def fit(
    cfg: DictConfig,
    algorithm: L.LightningModule,
    data: Any,
    checkpoint: Path | None,
) -> dict[str, float]:
    """Train a built algorithm, from `checkpoint` if there is one; returns what `run` does.

    `data` is a LightningDataModule; its `fingerprint` goes into the provenance of the run.
    """
    trainer = build_trainer(cfg)
    run_dir = Path(cfg.paths.run_dir)
    if trainer.is_global_zero:
        write_provenance(run_dir, provenance(cfg, data.fingerprint))
    first_step = 0
    if checkpoint is not None:
        first_step = read_checkpoint(checkpoint)["global_step"]
        log.info("resuming from %s at step %d", checkpoint, first_step)

    started = time.monotonic()
    try:
        trainer.fit(algorithm, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    finally:
        _finish_wandb()
    elapsed = time.monotonic() - started

    tokens = (trainer.global_step - first_step) * cfg.loader.global_batch_size * cfg.model.length
    metrics = final_metrics(trainer, run_dir, *best_metric(cfg))
    if tokens:
        metrics["tokens_per_s"] = tokens / elapsed
    if trainer.is_global_zero:
        plot_curves(run_dir)
    return metrics


def _finish_wandb() -> None:
    """The next job of a sweep in this process would log into this run otherwise."""
    if "wandb" in sys.modules:
        sys.modules["wandb"].finish()


def best_metric(cfg: DictConfig) -> tuple[str, Callable[[list[float]], float]]:
    """The metric that best.ckpt is best in, and how its best value is found."""
    name = OmegaConf.select(cfg, "algo.monitor", default="val/nll")
    return name, {"min": min, "max": max}[OmegaConf.select(cfg, "algo.monitor_mode", default="min")]


def final_metrics(
    trainer: L.Trainer,
    run_dir: Path,
    monitor: str = "val/nll",
    best: Callable[[list[float]], float] = min,
) -> dict[str, float]:
    """What the run has to show, from metrics.csv where there is one.

    The file knows what the trainer does not when a finished run is started once more.
    """
    table = run_dir / "metrics.csv"
    rows = read_metrics(table) if table.is_file() else [_floats(trainer)]
    metrics: dict[str, float] = {}
    for row in rows:
        metrics.update({key: value for key, value in row.items() if key.startswith("val/")})
    scores = [row[monitor] for row in rows if monitor in row]
    if scores:
        metrics[f"best/{monitor}"] = best(scores)
    return {"steps": trainer.global_step, **metrics}


def _floats(trainer: L.Trainer) -> dict[str, float]:
    return {key: float(value) for key, value in trainer.callback_metrics.items()}


def plot_curves(run_dir: Path) -> Path | None:
    """Draw training loss and validation nll over steps into curves.png, from metrics.csv."""
    table = run_dir / "metrics.csv"
    if not table.is_file():
        return None
    from matplotlib.figure import Figure

    rows = read_metrics(table)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, marker in zip(CURVES, ("", "o"), strict=True):
        points = [(row["step"], row[name]) for row in rows if name in row]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker=marker, linewidth=1.2)
    axes.set_xlabel("optimiser steps")
    axes.set_ylabel("nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(run_dir / "curves.png", dpi=150)
    return run_dir / "curves.png"
