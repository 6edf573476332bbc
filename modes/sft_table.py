"""mode=sft_table: arms of supervised fine-tuning side by side: `mode.runs=[raw,think]`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.errors import DataError
from data.files import read_objects
from evaluation import sft_differences
from evaluation.benchmark_report import markdown
from evaluation.kind_likelihood import RowLikelihoods, read_plain_rows
from evaluation.sft_differences import (
    ROWS,
    difference_cells,
    difference_metrics,
    loss_differences,
    require_rows_of,
)
from evaluation.sft_table import NOTES, Cells, evidence_table, remarks, sft_table
from evaluation.tables import text_table
from modes.benchmark_folder import read_json
from modes.compare import run_folders, show_list
from modes.sft_eval import METRICS
from runtime.errors import ConfigError
from runtime.run import write_json

ALLOWED = "folders of finished mode=sft_eval runs, or their metrics.json"


def run(cfg: DictConfig) -> dict[str, float]:
    """Put the arms of `mode.runs` into one table, in the order given, and compare them in pairs.

    Writes sft_table.md and .json. Pairs need rows.jsonl beside metrics.json.

    Returns:
        `WHAT/ARM` of every arm, WHAT a column of the table; `delta_val_loss_raw/RIGHT-LEFT` of
        every pair that can be compared, with delta_val_loss_raw_low, delta_val_loss_raw_high and
        delta_val_loss_raw_p, and so for val_loss_selected.

    Raises:
        ConfigError: no such run.
        DataError: runs that make no table, or rows that are not those of a run's losses.
    """
    out = Path(cfg.paths.run_dir)
    files = find_metrics(cfg.mode.runs, out)
    arms = [read_json(file.expanduser(), ALLOWED) for file in files]
    tables = _tables(files, arms)
    rows = {arm["arm"]: read_rows(file, arm) for file, arm in zip(files, arms, strict=True)}
    differences, refused = loss_differences(rows)
    notes = [NOTES]
    if differences:
        tables.append(difference_cells(differences))
        notes += sft_differences.NOTES
    said = [*remarks(arms), *refused]

    out.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"{markdown(*table)}\n" for table in tables)
    text, sources = "\n\n".join([*notes, *said]), ", ".join(map(str, files))
    (out / "sft_table.md").write_text(f"{lines}\n{text}\n\nRuns: {sources}\n", encoding="utf-8")
    compared = [asdict(one) for one in differences]
    write_json(out / "sft_table.json", {"arms": arms, "differences": compared, "notes": said})
    print("\n\n".join(text_table(*table) for table in tables) + "\n" + text)
    return _numbers(arms) | difference_metrics(differences)


def _tables(files: Sequence[Path], arms: Sequence[dict[str, Any]]) -> list[Cells]:
    """The table of losses and that of their evidence.

    Raises:
        DataError: a file that makes no row, or two of one arm.
    """
    for file, arm in zip(files, arms, strict=True):
        try:
            sft_table([arm])
            evidence_table([arm])
        except DataError as error:
            raise DataError(f"{file}: {error}") from error
    return [sft_table(arms), evidence_table(arms)]


def find_metrics(patterns: str | Sequence[str], own: Path) -> list[Path]:
    """The metrics.json that paths and globs name, each once.

    Raises:
        ConfigError: there is none.
    """
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    files: list[Path] = []
    for pattern in listed:
        is_file = pattern.endswith(".json")
        found = [Path(pattern)] if is_file else [x / METRICS for x in run_folders([pattern], own)]
        files += found
    if not files:
        raise ConfigError(f"mode.runs={show_list(patterns)}: nothing there; allowed: {ALLOWED}")
    return list(dict.fromkeys(files))


def read_rows(metrics: Path, arm: dict[str, Any]) -> RowLikelihoods | None:
    """The rows beside an arm's metrics.json; None where there are none.

    Raises:
        DataError: a row that is none, by file and line, or rows of other losses.
    """
    path = metrics.expanduser().with_name(ROWS)
    if not path.is_file():
        return None
    rows = read_plain_rows(read_objects(path))
    try:
        require_rows_of(arm, rows)
    except DataError as error:
        raise DataError(f"{metrics}: {error}") from error
    return rows


def _numbers(arms: Sequence[dict[str, Any]]) -> dict[str, float]:
    return {
        f"{name}/{arm['arm']}": value
        for arm in arms
        for name, value in arm.items()
        if isinstance(value, int | float)
    }
