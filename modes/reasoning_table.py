"""mode=reasoning_table: arms of mode=reasoning_eval side by side: `mode.runs=[host1,host2]`."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from evaluation.reasoning import ReasoningTable, reasoning_table
from evaluation.reasoning_report import plot_reasoning, report_markdown, report_text
from evaluation.reasoning_rows import gather
from modes.reasoning_folder import compared, read_runs
from runtime.config import to_plain
from runtime.errors import ConfigError
from runtime.run import write_json

NAME = "reasoning_table"


def run(cfg: DictConfig) -> dict[str, float]:
    """Rebuild the tables of all arms from their rows alone.

    Writes reasoning_table.md, .json and .png. Where conditions.json stands beside the rows it is
    seen that an arm is one model, and said which settings of sampling are not those of all.

    Returns:
        `mean/ARM/BENCHMARK`, `any/...` and `tokens/...` of every arm, benchmark and the macro
        average; `delta_mean/RIGHT-LEFT/BENCHMARK` with delta_mean_low, delta_mean_high and
        delta_mean_p, and so for any and tokens.

    Raises:
        ConfigError: no such folder, an arm or benchmark that is not there, or an arm that is
            compared with itself.
        DataError: rows that cannot be merged or compared: which sample is missing or there twice,
            or which arm is of two models.
    """
    out, mode = Path(cfg.paths.run_dir), to_plain(cfg.mode)
    runs = [mode["runs"]] if isinstance(mode["runs"], str) else mode["runs"]
    arms, files = read_runs(runs, out)
    names = _chosen("arms", mode["arms"], list(arms))
    all_arms = set(arms)
    arms = {name: arms[name] for name in names}
    there = list(dict.fromkeys(name for one in arms.values() for name in one))
    benchmarks = _chosen("benchmarks", mode["benchmarks"], sorted(there))
    counts, notes = gather(arms, benchmarks)
    folders = list(dict.fromkeys(file.parent for file in files if file.parent.name in arms))
    notes += compared(folders, benchmarks)
    pairs = _pairs(mode["comparisons"], names)
    used = [
        file
        for file in files
        if file.parent.name not in all_arms - {*names} and file.stem not in {*there} - {*benchmarks}
    ]
    notes.append(f"rows: {', '.join(map(str, used))}")
    table = reasoning_table(counts, pairs, notes)
    out.mkdir(parents=True, exist_ok=True)
    text = report_markdown(table, "Reasoning evaluation")
    (out / f"{NAME}.md").write_text(text, encoding="utf-8")
    write_json(out / f"{NAME}.json", asdict(table))
    plot_reasoning(out / f"{NAME}.png", table)
    print(report_text(table))
    return metrics_of(table)


def _chosen(key: str, wanted: Sequence[str] | None, there: Sequence[str]) -> list[str]:
    """What is asked for, in that order, or all there is.

    Raises:
        ConfigError: something that is not there.
    """
    if wanted is None:
        return list(there)
    unknown = [name for name in wanted if name not in there]
    if unknown or not wanted:
        raise ConfigError(
            f"mode.{key}=[{','.join(wanted)}]: {'no ' + unknown[0] if unknown else 'nothing'};"
            f" allowed: {', '.join(there)}"
        )
    return list(dict.fromkeys(wanted))


def _pairs(wanted: Sequence[Sequence[str]] | None, arms: Sequence[str]) -> Any:
    """`mode.comparisons` as pairs; None: the default.

    Raises:
        ConfigError: an arm that is not there, or one beside itself.
    """
    if wanted is None:
        return None
    for right, left in wanted:
        if right == left:
            raise ConfigError(
                f"mode.comparisons: [{right},{left}] is one arm twice; allowed: pairs [RIGHT,LEFT]"
                f" of unlike arms of {', '.join(arms)}"
            )
    for name in (name for pair in wanted for name in pair):
        if name not in arms:
            raise ConfigError(
                f"mode.comparisons: no arm {name}; allowed: pairs [RIGHT,LEFT] of {', '.join(arms)}"
            )
    return [(right, left) for right, left in wanted]


def metrics_of(table: ReasoningTable) -> dict[str, float]:
    """By name of the arm, or of both, and the benchmark; unknown ends of intervals are left out."""
    metrics: dict[str, float | None] = {}
    for name, row in table.every_row():
        for key, value in (("mean", row.mean), ("any", row.any), ("tokens", row.tokens)):
            metrics[f"{key}/{row.arm}/{name}"] = value.value
    for delta in table.deltas:
        name = f"{delta.right}-{delta.left}/{delta.benchmark}"
        for key, change in (("mean", delta.mean), ("any", delta.any), ("tokens", delta.tokens)):
            metrics |= {
                f"delta_{key}/{name}": change.value, f"delta_{key}_low/{name}": change.low,
                f"delta_{key}_high/{name}": change.high, f"delta_{key}_p/{name}": change.p,
            }  # fmt: skip
    return {name: value for name, value in metrics.items() if value is not None}
