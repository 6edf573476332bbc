"""Clipped-schedule search: after every validation, train on the masking rates that vary least."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from callbacks.metrics_csv import MetricsCSV, read_metrics
from objectives.clip_search import (
    Interval,
    batch_variance,
    candidate_intervals,
    interval_variances,
    least_variance,
)
from objectives.corruption import FULL_INTERVAL, MaskingProcess
from runtime.errors import ConfigError

log = logging.getLogger(__name__)

METHODS = ("binned", "exact")
_PREFIX = "clip/var "


class ClipSearch(L.Callback):
    """Measures the variance of the training loss on candidate intervals, and sets the best one.

    It uses the validation rows with the moving average of the weights in fp32, and the weights of
    tokens if there are any: the loss whose variance counts is the one that is trained on. The
    interval is stored in the checkpoint by the algorithm. Random numbers are keyed by the optimiser
    step, so a search that is cut short and repeated after resuming finds the same.

    Args:
        widths: widths of the intervals (`algo.clip_search_widths`); None or none of them: no search.
        enabled: `algo.var_min`.
        fix: measure, but leave the interval as it is (`algo.fix_clipping`).
        delta: distance between intervals of equal width.
        method: `binned` draws times over the full interval and reads all variances off these
            draws; `exact`, the published way, makes a forward pass for every interval.
        draws: forward passes per batch of `binned`.
        num_rows: validation rows used, the first ones of the split, on any number of processes;
            `exact` still depends on how they are cut into batches, within which it takes variances.

    Raises:
        ConfigError: an unknown method, or numbers below 1.
    """

    def __init__(
        self,
        widths: Sequence[float] | None,
        enabled: bool = True,
        fix: bool = False,
        delta: float = 0.05,
        method: str = "binned",
        draws: int = 3,
        num_rows: int = 10_000,
    ) -> None:
        if method not in METHODS:
            raise ConfigError(
                f"callbacks.clip_search.method={method}: allowed {', '.join(METHODS)}"
            )
        for key, value in {"draws": draws, "num_rows": num_rows}.items():
            if value < 1:
                raise ConfigError(f"callbacks.clip_search.{key}={value}: allowed 1 or more")
        self.widths, self.delta = list(widths or ()), delta
        self.enabled = enabled and bool(self.widths)
        self.fix, self.method, self.draws, self.num_rows = fix, method, draws, num_rows
        self.intervals: list[Interval] = []
        self._parts: list[list[Tensor]] = []

    def setup(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        """List the intervals.

        Raises:
            ConfigError: an algorithm that masks nothing, or intervals without any rate.
        """
        if self.enabled:
            self.list_intervals(pl_module)

    def list_intervals(self, module: Any) -> None:
        """The candidates for this algorithm; see `setup`."""
        process: MaskingProcess | None = module.process
        if process is None:
            raise ConfigError(
                "algo.var_min=true: this algorithm has no masking rates to search; allowed: false"
            )
        try:
            self.intervals = candidate_intervals(
                self.widths, self.delta, process.block_size, process.resample
            )
        except ValueError as error:
            raise ConfigError(f"algo.clip_search_widths={self.widths}: {error}") from error

    def on_validation_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin anew: a search that was cut short leaves nothing behind."""
        self._parts = []

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        outputs: Any,
        batch: dict[str, Tensor],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw losses on a validation batch; the moving average is in place."""
        if self._searches(trainer):
            self.draw(pl_module, batch, trainer.global_step, batch_idx)

    def draw(self, module: Any, batch: dict[str, Tensor], step: int, batch_idx: int) -> None:
        """Losses of the blocks of one batch, with random numbers keyed by `step`."""
        batch = _first_rows(batch, self.num_rows)
        if not len(batch["index"]):
            return
        with torch.autocast(module.device.type, enabled=False):
            if self.method == "exact":
                losses = [
                    module.block_losses(batch, (step, 0, number), interval).loss_N
                    for number, interval in enumerate(self.intervals)
                ]
                batch_N = torch.full(losses[0].shape, batch_idx)
                self._keep(batch_N, torch.stack(losses, dim=-1))
            else:
                for number in range(self.draws):
                    found = module.block_losses(batch, (step, 1, number), FULL_INTERVAL)
                    self._keep(*(column for column in found if column is not None))

    def _searches(self, trainer: L.Trainer) -> bool:
        return self.enabled and trainer.state.fn == "fit" and not trainer.sanity_checking

    def _keep(self, *columns: Tensor) -> None:
        self._parts.append([column.cpu() for column in columns])

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Compare the intervals over all ranks, choose, log."""
        if not self._searches(trainer) or not self._parts:
            return
        step = trainer.global_step
        variances = self.variances(pl_module)
        number = least_variance(variances)
        if number is None:
            log.warning("step %d: no finite variance to compare, search skipped", step)
            return
        best = self.intervals[number]
        if not self.fix:
            pl_module.process.interval = best
        low, high = pl_module.process.interval
        values = {_name(i): float(v) for i, v in zip(self.intervals, variances, strict=True)}
        pl_module.log_dict({"clip/low": low, "clip/high": high, **values})
        if trainer.is_global_zero:
            log.info(
                "step %d: least variance %.4g on [%g, %g], %.4g on the full interval; training on"
                " [%g, %g]", step, variances.nan_to_num(nan=torch.inf).min(),
                *best, variances[0], low, high,
            )  # fmt: skip

    def variances(self, module: Any) -> Tensor:
        """[I] variance of every interval over what all ranks have drawn; forgets the draws."""
        columns = [module.gather(torch.cat(column)) for column in zip(*self._parts, strict=True)]
        self._parts = []
        if self.method == "exact":
            batch_N, loss_NI = columns
            return torch.stack([batch_variance(loss_N, batch_N) for loss_N in loss_NI.T])
        time_N, loss_N, count_N, maskable_N, *pmf = columns
        pmf_NC = pmf[0] if pmf else None
        return interval_variances(time_N, loss_N, self.intervals, pmf_NC, count_N, maskable_N)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draw clip_search.png from metrics.csv, which knows of the searches before a resume."""
        tables = [logger.path for logger in trainer.loggers if isinstance(logger, MetricsCSV)]
        if self.enabled and trainer.is_global_zero and tables and tables[0].is_file():
            plot_searches(tables[0], tables[0].with_name("clip_search.png"))


def _first_rows(batch: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """The rows of a batch that are among the first `count` of their split."""
    chosen_B = batch["index"] < count
    columns = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    if bool(chosen_B.all()):
        return columns
    return {key: value[chosen_B] for key, value in columns.items()}


def _name(interval: Interval) -> str:
    return f"{_PREFIX}{interval[0]:g}-{interval[1]:g}"


def plot_searches(table: Path, picture: Path) -> None:
    """Variances of the last search, and the interval trained on over the steps."""
    from matplotlib.figure import Figure

    rows = [row for row in read_metrics(table) if "clip/low" in row]
    if not rows:
        return
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    last = {key: value for key, value in rows[-1].items() if key.startswith(_PREFIX)}
    for name, variance in last.items():
        low, high = (float(end) for end in name.removeprefix(_PREFIX).split("-"))
        left.plot([low, high], [variance, variance], color="C0", linewidth=2, alpha=0.6)
    chosen = last.get(_name((rows[-1]["clip/low"], rows[-1]["clip/high"])))
    if chosen is not None:
        trained_on = [rows[-1]["clip/low"], rows[-1]["clip/high"]]
        left.plot(trained_on, [chosen] * 2, color="C3", linewidth=3, label="trained on")
        left.legend(frameon=False)
    left.set(xlabel="masking rate", ylabel="variance of a block's loss", yscale="log")
    left.set_title(f"step {rows[-1]['step']}")
    steps = [row["step"] for row in rows]
    lows, highs = ([row[f"clip/{end}"] for row in rows] for end in ("low", "high"))
    right.fill_between(steps, lows, highs, step="post", alpha=0.4, color="C3")
    right.plot(steps, lows, steps, highs, marker="o", color="C3", drawstyle="steps-post")
    right.set(xlabel="optimiser steps", ylabel="interval trained on", ylim=(0, 1.05))
    figure.savefig(picture, dpi=150)
