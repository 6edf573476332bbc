"""mode=compare: finished runs side by side, seeds joined: `mode.runs='multirun/x/*'`."""

import csv
import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from evaluation.comparison import (
    Group,
    Run,
    compare,
    differing_keys,
    find_group,
    flatten,
    group_runs,
    is_number,
    numeric_keys,
    show,
    telling_keys,
)
from evaluation.comparison_plot import plot_comparison
from evaluation.tables import format_cell, text_table
from runtime.checkpoint import experiment_config
from runtime.errors import ConfigError
from runtime.excerpt import shown
from runtime.key_kinds import is_integer
from runtime.run import load_summary

# What is compared unless asked otherwise, as far as all runs have it.
MAIN_METRICS = ("nll", "val/nll", "best/val/nll", "gap", "grammatical_rate")
_NOT_A_RUN = ("audit", "compare")


class LeftOut(NamedTuple):
    """A folder that is not in the comparison, and why."""

    folder: str
    reason: str


def run(cfg: DictConfig) -> dict[str, float]:
    """Compare the runs in `mode.runs` by their summary.json and config.yaml.

    Writes compare.csv (a line per metric and group), compare.md and, where a number differs
    between the groups, compare.png.

    Returns:
        runs (compared), left_out, groups, and lacking (pairs of run and metric without a value).

    Raises:
        ConfigError: no finished run, an unknown metric, reference or axis.
        DataError: two runs with one configuration and seed.
    """
    folders = run_folders(_as_list(cfg.mode.runs), Path(cfg.paths.run_dir))
    runs, left_out = read_runs(folders)
    if not runs:
        reasons = "; ".join(f"{folder}: {reason}" for folder, reason in left_out[:3])
        raise ConfigError(
            f"mode.runs={show_list(cfg.mode.runs)}: no finished run there"
            f" ({reasons or 'nothing fits'}); allowed: folders with config.yaml and summary.json"
        )
    metrics = choose_metrics(runs, cfg.mode.metrics)
    wanted = parse_reference(cfg.mode.reference)
    asked = [*([cfg.mode.x] if cfg.mode.x else []), *wanted]
    keys = differing_keys(runs, list(cfg.mode.ignore))
    told = telling_keys(runs, keys, first=asked)
    groups = group_runs(runs, told)
    reference = find_group(groups, wanted) if wanted else groups[0]
    lines = compare(groups, metrics, reference)
    x = choose_axis(groups, cfg.mode.x)

    out = Path(cfg.paths.run_dir)
    out.mkdir(parents=True, exist_ok=True)
    write_csv(out / "compare.csv", lines)
    said = remarks(runs, left_out, metrics, reference, [key for key in keys if key not in told], x)
    (out / "compare.md").write_text(markdown(lines, metrics, told, said), encoding="utf-8")
    if x is not None:
        plot_comparison(out / "compare.png", groups, metrics, x)
    for metric in metrics:
        print(f"\n{metric}\n{text_table(*table(lines, metric, told))}")
    print("\n" + "\n".join(said))
    lacking = sum(metric not in run.metrics for run in runs for metric in metrics)
    return {
        "runs": len(runs), "left_out": len(left_out), "groups": len(groups), "lacking": lacking,
    }  # fmt: skip


def _as_list(value: Any) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def show_list(value: Any) -> str:
    """`mode.runs` as the command line spells it."""
    return value if isinstance(value, str) else f"[{','.join(value)}]"


def run_folders(patterns: Sequence[str], own: Path) -> list[Path]:
    """The folders that paths and globs name, each once, without this comparison's own.

    Raises:
        ConfigError: a folder that is not there.
    """
    folders: dict[Path, Path] = {}
    for pattern in patterns:
        path = Path(pattern).expanduser()
        is_glob = glob.has_magic(pattern)
        if not is_glob and not path.is_dir():
            raise ConfigError(f"mode.runs={pattern}: no such folder; allowed: folders of runs")
        found = sorted(map(Path, glob.glob(str(path), recursive=True))) if is_glob else [path]
        folders |= {place.resolve(): place for place in found if place.is_dir()}
    folders.pop(own.resolve(), None)
    return list(folders.values())


def read_runs(folders: Sequence[Path]) -> tuple[list[Run], list[LeftOut]]:
    """The finished runs among the folders, and what is left out."""
    runs: list[Run] = []
    left_out: list[LeftOut] = []
    for folder in folders:
        try:
            runs.append(_read_run(folder))
        # Anything may stand in a folder: one of many ends no comparison.
        except Exception as error:
            left_out.append(LeftOut(str(folder), _reason(folder, error)))
    return runs, left_out


def _reason(folder: Path, error: Exception) -> str:
    for name in ("config.yaml", "summary.json"):
        if not (folder / name).is_file():
            return f"no {name}"
    if isinstance(error, ConfigError):
        return str(error)
    reason = shown(" ".join(str(error).split()), 100)
    return f"cannot be read ({type(error).__name__}: {reason})"


def _read_run(folder: Path) -> Run:
    config, summary = OmegaConf.load(folder / "config.yaml"), load_summary(folder)
    if not isinstance(config, DictConfig) or not isinstance(summary, dict):
        raise ConfigError("config.yaml and summary.json do not hold keys and values")
    if summary["status"] != "done":
        told = [summary["status"], summary.get("error")]
        raise ConfigError(": ".join(shown(text, 200) for text in told if text))
    if summary["mode"] in _NOT_A_RUN:
        raise ConfigError(f"mode={shown(summary['mode'])} measures no model")
    if not isinstance(summary["metrics"], dict):
        raise ConfigError(f"summary.json: metrics={shown(summary['metrics'])}")
    if OmegaConf.is_missing(config, "seed") or not is_integer(config.get("seed")):
        raise ConfigError("config.yaml: seed is no integer")
    metrics = {key: value for key, value in summary["metrics"].items() if is_number(value)}
    kept = {k: v for k, v in experiment_config(config).items() if k != "optimized_metric"}
    flat = flatten(kept)
    # A whole number may be larger than what groups are sorted by.
    for value in flat.values():
        if isinstance(value, int):
            float(value)
    return Run(str(folder), config.seed, flat, metrics)


def choose_metrics(runs: Sequence[Run], asked: Sequence[str] | None) -> list[str]:
    """The metrics asked for, or the main ones that all runs have.

    Raises:
        ConfigError: one that no run has, or none that all have.
    """
    there = sorted({name for run in runs for name in run.metrics})
    if asked is None:
        shared = [name for name in MAIN_METRICS if all(name in run.metrics for run in runs)]
        if shared:
            return shared
        raise ConfigError(
            f"mode.metrics=null: the runs share none of {', '.join(MAIN_METRICS)}; allowed: a list"
            f" of {', '.join(there) or 'nothing: the runs have no metric'}"
        )
    for name in asked:
        if name not in there:
            raise ConfigError(
                f"mode.metrics=[{','.join(asked)}]: no run has {name}; allowed: {', '.join(there)}"
            )
    return list(asked)


def parse_reference(given: Any) -> dict[str, str]:
    """{"masking.mix_alpha": "0"} of {masking.mix_alpha: 0} or of `masking.mix_alpha=0,...`."""
    if given is None:
        return {}
    if not isinstance(given, str):
        return {str(key): show(value) for key, value in given.items()}
    pairs = [part.partition("=") for part in given.split(",")]
    if not all(sign for _, sign, _ in pairs):
        raise ConfigError(f"mode.reference={given}: allowed KEY=VALUE, or several with commas")
    return {key.strip(): value.strip() for key, _, value in pairs}


def choose_axis(groups: Sequence[Group], asked: str | None) -> str | None:
    """The key of the horizontal axis, None where no number differs.

    Raises:
        ConfigError: the key asked for is none that differs by numbers.
    """
    keys = numeric_keys(groups)
    if asked is None:
        return keys[0] if keys else None
    if asked not in keys:
        raise ConfigError(
            f"mode.x={asked}: not a number that differs between the groups; allowed:"
            f" {', '.join(keys) or 'none does'}"
        )
    return asked


def table(
    lines: Sequence[dict[str, Any]], metric: str, keys: Sequence[str]
) -> tuple[list[str], list[list[Any]]]:
    """Header and rows of one metric: a row per group."""
    header = [*(keys or ["group"]), "n", "mean", "s.d.", "95 % interval", "difference",
              "95 % interval", "pairs", "by seed"]  # fmt: skip
    rows = [
        [
            *([show(line[key]) for key in keys] or ["all"]),
            line["n"] if line["n"] == line["runs"] else f"{line['n']} of {line['runs']}",
            line["mean"], line["sd"], _interval(line["low"], line["high"]), line["difference"],
            _interval(line["difference_low"], line["difference_high"]), line["pairs"],
            " ".join(
                f"{seed}:{value:.4f}"
                for seed, value in zip(line["seeds"], line["values"], strict=True)
            ),
        ]
        for line in lines
        if line["metric"] == metric
    ]  # fmt: skip
    return header, rows


def _interval(low: float | None, high: float | None) -> str | None:
    return None if low is None else f"[{low:.4f}, {high:.4f}]"


def markdown(
    lines: Sequence[dict[str, Any]], metrics: Sequence[str], keys: Sequence[str], said: list[str]
) -> str:
    """compare.md: a table per metric, then what has to be said."""
    parts = []
    for metric in metrics:
        header, rows = table(lines, metric, keys)
        cells = [header, ["---"] * len(header), *([format_cell(c) for c in row] for row in rows)]
        parts.append(f"## {metric}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in cells))
    return "\n\n".join([*parts, "\n".join(f"- {line}" for line in said)]) + "\n"


def write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    """All lines with all digits; lists (of seeds and their values) as JSON."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), lineterminator="\n")
        writer.writeheader()
        for line in lines:
            writer.writerow(
                {k: json.dumps(v) if isinstance(v, list) else v for k, v in line.items()}
            )


def remarks(
    runs: Sequence[Run],
    left_out: Sequence[LeftOut],
    metrics: Sequence[str],
    reference: Group,
    also: Sequence[str],
    x: str | None,
) -> list[str]:
    """What the numbers are, and everything that is not in them."""
    said = [
        "mean, standard deviation and 95 % interval (Student's t) over seeds; difference to"
        f" {reference.label}, of runs with equal seeds",
        f"{len(runs)} runs compared, {len(left_out)} left out",
    ]
    said += [f"left out: {folder}: {reason}" for folder, reason in left_out]
    for metric in metrics:
        lacking = [run.folder for run in runs if metric not in run.metrics]
        if lacking:
            said.append(f"without a finite {metric}: {len(lacking)} runs: {', '.join(lacking)}")
    if also:
        said.append(f"differ together with the keys of the table: {', '.join(also)}")
    said.append("no plot: no number differs between the groups" if x is None else f"plot over {x}")
    return said
