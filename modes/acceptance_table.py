"""mode=acceptance_table: drafts side by side: `mode.runs=[m1,m15,m16] mode.reference_run=m0`."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from evaluation.acceptance_report import gap_table, markdown_table, plot_averages
from evaluation.acceptance_run import draft_run
from evaluation.acceptance_table import AcceptanceTable, DraftRun, acceptance_table
from modes.compare import run_folders, show_list
from runtime.errors import ConfigError
from runtime.run import write_json

DRAFT, REFERENCE = "draft", "reference"
RESULT = "acceptance.json"


def run(cfg: DictConfig) -> dict[str, float]:
    """Compare finished runs of mode=acceptance_eval, in the order of `mode.runs`.

    Writes acceptance_table.md, .json and .png.

    Returns:
        average tau of every run, `delta/NAME` to the run before, `closed/NAME` of the gap.

    Raises:
        ConfigError: no such folder, or one without a measurement.
        DataError: runs that cannot be compared: which, and what differs.
    """
    out, patterns = Path(cfg.paths.run_dir), cfg.mode.runs
    folders = run_folders([patterns] if isinstance(patterns, str) else list(patterns), out)
    if not folders:
        raise ConfigError(f"mode.runs={show_list(patterns)}: no such folder; allowed: folders of"
                          " mode=acceptance_eval runs")  # fmt: skip
    runs = [read_run(folder, DRAFT) for folder in folders]
    reference = find_reference(folders, cfg.mode.reference_run)
    table = acceptance_table(runs, reference, cfg.mode.resamples, cfg.seed)
    text = report(table, [*folders], list(cfg.mode.remarks))
    out.mkdir(parents=True, exist_ok=True)
    (out / "acceptance_table.md").write_text(text, encoding="utf-8")
    write_json(out / "acceptance_table.json", asdict(table))
    plot_averages(
        out / "acceptance_table.png",
        {row.name: row.tau for row in table.rows},
        {row.name: row.tau_interval for row in table.rows},
    )
    print(text)
    return metrics_of(table)


def read_run(folder: Path, draft: str) -> DraftRun:
    """One draft of a finished measurement.

    Raises:
        ConfigError: the folder holds no finished measurement, or no rows of this draft.
    """
    found = read_result(folder)
    label = str(found["label"]) if draft == DRAFT else f"{found['label']} {draft}"
    one = draft_run(folder, label, draft, found["conditions"])
    if one is None:
        raise ConfigError(
            f"{folder}: no answers of its {draft} (a server that only counts leaves no rows);"
            " allowed: folders of mode=acceptance_eval runs with rows"
        )
    return one


def read_result(folder: Path) -> dict[str, Any]:
    """acceptance.json of a folder.

    Raises:
        ConfigError: it is not there, or not what mode=acceptance_eval writes.
    """
    path = folder / RESULT
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        complete = {"label", "conditions"} <= found.keys()
    except (OSError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}); allowed: the folder of a finished"
            " mode=acceptance_eval run"
        ) from error
    if not complete or not isinstance(found["conditions"], dict):
        raise ConfigError(f"{path}: no label or no conditions; measure again")
    return found


def find_reference(folders: Sequence[Path], named: str | None) -> DraftRun | None:
    """The draft of the run that is named, or the reference measured beside the last run."""
    if named is not None:
        return read_run(Path(named).expanduser(), DRAFT)
    found = read_result(folders[-1])
    has_one = REFERENCE in found.get("acceptance", {})
    return read_run(folders[-1], REFERENCE) if has_one else None


def report(table: AcceptanceTable, folders: Sequence[Path], remarks: Sequence[str]) -> str:
    """The tables, and what has to be said about them."""
    prompts = ", ".join(f"{name} {count}" for name, count in table.prompts.items())
    said = [
        "tau: tokens per verify cycle, pooled; average: unweighted mean of the benchmarks; step: to"
        " the row before, p its two-sided bootstrap p-value. 95 % intervals of a paired bootstrap"
        " over prompts.",
        f"prompts: {prompts}; {table.left_out} left out, which had no verify cycle in some run",
        f"runs: {', '.join(str(folder) for folder in folders)}",
        *(["what the reference was trained on is not known here: it may have seen the benchmarks"]
          if table.reference else []),
        *remarks,
    ]  # fmt: skip
    parts = [markdown_table(table), gap_table(table), "\n".join(f"- {line}" for line in said)]
    return "\n".join(part for part in parts if part) + "\n"


def metrics_of(table: AcceptanceTable) -> dict[str, float]:
    """By name of the run."""
    metrics: dict[str, float] = {"runs": len(table.rows)}
    for row in table.rows:
        metrics[f"tau/{row.name}"] = row.average
        if row.delta is not None and row.name != table.reference:
            metrics[f"delta/{row.name}"] = row.delta.value
            metrics[f"delta_low/{row.name}"] = row.delta.low
            metrics[f"delta_high/{row.name}"] = row.delta.high
        if row.closed is not None:
            metrics[f"closed/{row.name}"] = row.closed
        if row.closed_interval is not None:
            metrics[f"closed_low/{row.name}"] = row.closed_interval.low
            metrics[f"closed_high/{row.name}"] = row.closed_interval.high
    return metrics
