"""metrics.csv: one table for the whole run, however often it was interrupted."""

import csv
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class MetricsCSV(Logger):
    """Appends every logged row to `save_dir/metrics.csv`, on disk as soon as it is logged.

    `step` is the number of optimiser steps done (Lightning numbers them from zero; here the last
    row of a run says trainer.max_steps). Lightning's `epoch` is left out: a run is one of them.
    When a run resumes at step k, `ExactResume` calls `drop_after(k)`: rows beyond k are about to
    be made again.
    """

    def __init__(self, save_dir: str | os.PathLike[str]) -> None:
        super().__init__()
        self.path = Path(save_dir) / "metrics.csv"
        self._columns: list[str] | None = None

    @property
    def name(self) -> str:
        """The file's name without its ending."""
        return self.path.stem

    @property
    def version(self) -> str:
        """Empty: one folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The folder of metrics.csv."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """Nothing to do: the run folder has config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row; a metric not seen before becomes a new column."""
        values = {key: value for key, value in metrics.items() if key != "epoch"}
        row = {"step": 0 if step is None else step + 1, **values}
        new = [column for column in row if column not in self._known_columns()]
        if new:
            self._rewrite([*self._known_columns(), *new], self._rows())
        with self.path.open("a", newline="") as file:
            _writer(file, self._known_columns()).writerow(row)

    @rank_zero_only
    def drop_after(self, step: int) -> None:
        """Forget rows beyond `step`, and a last row that was cut off while it was written."""
        if self.path.is_file():
            kept = [row for row in self._rows() if int(row["step"]) <= step]
            self._rewrite(self._known_columns(), kept)

    def _known_columns(self) -> list[str]:
        if self._columns is None:
            self._columns = _header(self.path)
        return self._columns

    def _rows(self) -> list[dict[str, str]]:
        if not self.path.is_file():
            return []
        with self.path.open(newline="") as file:
            return [row for row in csv.DictReader(file) if _complete(row)]

    def _rewrite(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        """Replace the file in one move, so that a kill leaves the old table or the new one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".csv.part")
        with temporary.open("w", newline="") as file:
            writer = _writer(file, columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.path)
        self._columns = columns


def _writer(file: IO[str], columns: list[str]) -> csv.DictWriter:
    return csv.DictWriter(file, columns, restval="", lineterminator="\n")


def _header(path: Path) -> list[str]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return next(csv.reader(file), [])


def _complete(row: Mapping[str | None, Any]) -> bool:
    return None not in row and None not in row.values() and str(row["step"]).isdigit()


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The rows of a metrics.csv, each with the cells it has; `step` is an int."""
    with Path(path).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if _complete(row)]
    return [
        {key: int(cell) if key == "step" else float(cell) for key, cell in row.items() if cell}
        for row in rows
    ]
