"""mode=rlmt_table: training runs of thoughts side by side: `mode.runs=[rlmt_base,rlmt_phase3]`."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from evaluation.benchmark_report import markdown
from evaluation.rlmt_plot import plot_runs
from evaluation.rlmt_table import AVERAGES, REWARD, RlmtRow, rlmt_cells, rlmt_notes, rlmt_row
from evaluation.tables import text_table
from modes.benchmark_folder import read_json
from modes.compare import run_folders, show_list
from runtime.errors import ConfigError
from runtime.key_kinds import is_integer, is_number
from runtime.run import write_json

METRICS = "metrics.json"
ALLOWED = f"{METRICS} of an online training (algo=rlmt)"


def run(cfg: DictConfig) -> dict[str, float]:
    """Average the steps of the runs of `mode.runs`, each by its metrics.json.

    Writes rlmt_table.md, .json and .png (`evaluation.rlmt_plot`).

    Returns:
        per run `ARM/completed_steps`, `ARM/wall_time_s`, `ARM/final_reward`, and `ARM/NAME`, the
        mean over steps.

    Raises:
        ConfigError: no such runs, a file that is none, or two runs of one arm.
    """
    out, patterns = Path(cfg.paths.run_dir), cfg.mode.runs
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    folders = [out] if listed == [str(out)] else run_folders(listed, Path())
    if not folders:
        raise ConfigError(f"mode.runs={show_list(patterns)}: nothing there; allowed: {ALLOWED}")
    runs = [read_metrics(folder / METRICS) for folder in folders]
    rows = [rlmt_row(metrics) for metrics in runs]
    names = [row.arm for row in rows]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(
                f"mode.runs={show_list(patterns)}: two runs are of arm {name}; allowed: one each"
            )
    notes = [*rlmt_notes(rows), f"runs: {', '.join(map(str, folders))}"]
    said = "".join(f"- {line}\n" for line in notes)
    out.mkdir(parents=True, exist_ok=True)
    text = f"# RLMT\n\n{markdown(*rlmt_cells(rows))}\n{said}"
    (out / "rlmt_table.md").write_text(text, encoding="utf-8")
    plot_runs(out / "rlmt_table.png", {run["arm"]: run["history"] for run in runs})
    write_json(out / "rlmt_table.json", {"rows": [asdict(row) for row in rows], "notes": notes})
    print(text_table(*rlmt_cells(rows)) + f"\n{said}", end="")
    return {name: value for row in rows for name, value in _metrics(row).items()}


def _metrics(row: RlmtRow) -> dict[str, float]:
    found = {
        "completed_steps": row.completed_steps, "wall_time_s": row.wall_time_s,
        "final_reward": row.final_reward, **row.averages,
    }  # fmt: skip
    return {f"{row.arm}/{name}": value for name, value in found.items() if value is not None}


def read_metrics(path: Path) -> dict[str, Any]:
    """The metrics.json of a run.

    Raises:
        ConfigError: it is not there or is something else, such as that of a run that has no
            rewards.
    """
    found = read_json(path, ALLOWED)
    history = found.get("history")
    checks = {
        "arm": (isinstance(found.get("arm"), str), "a text"),
        "completed_steps": (_is_count(found.get("completed_steps")), "an integer >= 0"),
        "stopped_reason": (isinstance(found.get("stopped_reason"), str | None), "a text or null"),
        "wall_time_s": (is_number(found.get("wall_time_s")), "a number"),
        "history": (
            isinstance(history, list) and all(map(_is_step, history)),
            f"a list of {{NAME: NUMBER}} with {REWARD} and others",
        ),
    }
    for name, (good, kind) in checks.items():
        if not good:
            value = str(found.get(name))[:40]
            raise ConfigError(f"{path}: {name}={value}; allowed: {kind} ({ALLOWED})")
    names = (REWARD, *AVERAGES)
    if history and not any(name in step for step in history for name in names):
        raise ConfigError(
            f"{path}: arm {found['arm']}: no step has {', '.join(names)}, as none of"
            " algo=online_dpo or rf_nll does; allowed: runs of algo=rlmt, rlmt_paper, rlmt_seed"
        )
    return found


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _is_step(step: Any) -> bool:
    # Others, such as the loss of a step that ended the run, need not be numbers.
    names = (REWARD, *AVERAGES)
    return isinstance(step, Mapping) and all(is_number(step[n]) for n in names if n in step)
