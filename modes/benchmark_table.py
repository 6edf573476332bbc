"""mode=benchmark_table: models side by side: `mode.runs=[nce] mode.baseline=stage2`."""

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.errors import DataError
from data.files import read_objects
from evaluation.benchmark_report import comparison_markdown, comparison_text, plot_table
from evaluation.benchmark_table import BenchmarkRun, BenchmarkTable, Result, benchmark_table
from modes.benchmark_eval import ITEMS, RESULT
from modes.compare import run_folders, show_list
from runtime.errors import ConfigError
from runtime.run import write_json

ALLOWED = "folders of finished mode=benchmark_eval runs, or .json files of published counts"
# What a row of items.jsonl must have to be compared.
FIELDS = {"id", "task", "prompt_hash", "correct", "error", "finish", "num_tokens", "work"}


def run(cfg: DictConfig) -> dict[str, float]:
    """Compare the runs of `mode.runs` with that of `mode.baseline`, benchmark by benchmark.

    Writes benchmark_table.md, .json and .png.

    Returns:
        `accuracy/RUN/BENCHMARK` of all, and of the runs `delta/RUN/BENCHMARK`, its 95 % interval
        delta_low and delta_high, and p, of no difference.

    Raises:
        ConfigError: no such run.
        DataError: runs that cannot be compared: which, and what differs.
    """
    out, patterns = Path(cfg.paths.run_dir), cfg.mode.runs
    baseline = Path(cfg.mode.baseline).expanduser()
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    places = [place for place in _places(listed, out) if place.resolve() != baseline.resolve()]
    if not places:
        raise ConfigError(
            f"mode.runs={show_list(patterns)}: nothing there beside mode.baseline; allowed:"
            f" {ALLOWED}"
        )
    table = benchmark_table([read_run(place) for place in places], read_run(baseline))
    sources = ", ".join(map(str, (baseline, *places)))
    table = replace(table, notes=[*table.notes, f"runs: {sources}", *cfg.mode.remarks])
    out.mkdir(parents=True, exist_ok=True)
    (out / "benchmark_table.md").write_text(comparison_markdown(table), encoding="utf-8")
    write_json(out / "benchmark_table.json", plain_table(table))
    plot_table(out / "benchmark_table.png", table)
    print(comparison_text(table))
    return metrics_of(table)


def _places(patterns: Sequence[str], own: Path) -> list[Path]:
    """Files of counts, then folders, in the order given."""
    places: list[Path] = []
    for pattern in patterns:
        file = Path(pattern).expanduser()
        places += [file] if file.suffix == ".json" else run_folders([pattern], own)
    return list(dict.fromkeys(places))


def read_run(place: Path) -> BenchmarkRun:
    """A run of mode=benchmark_eval by its folder, or published counts by their file.

    Raises:
        ConfigError: it is neither.
    """
    if place.suffix == ".json":
        return read_counts(place)
    found = _read_json(place / RESULT)
    try:
        label, about = str(found["label"]), dict(found["benchmarks"])
        expected = {name: one["score"]["expected"] for name, one in about.items()}
        settings = {name: one["conditions"]["settings"] for name, one in about.items()}
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError(f"{place / RESULT}: damaged; allowed: {ALLOWED}") from error
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in about}
    for where, row in read_objects(place / ITEMS):
        if not row.keys() >= FIELDS or row["task"] not in rows:
            raise DataError(f"{where}: no row of {RESULT}'s benchmarks; run mode=benchmark_eval")
        rows[row["task"]].append(row)
    for name, of_task in rows.items():
        if len(of_task) != about[name]["score"]["items"]:
            raise DataError(f"{place / ITEMS}: {len(of_task)} rows of {name}, {RESULT} has another"
                            " number; run mode=benchmark_eval again")  # fmt: skip
    return BenchmarkRun(label, {
        name: Result.of_rows(
            of_task, grader=about[name]["grader"], settings=settings[name], expected=expected[name]
        )
        for name, of_task in rows.items()
    })  # fmt: skip


def read_counts(path: Path) -> BenchmarkRun:
    """Published counts: {"label": NAME, "counts": {BENCHMARK: [CORRECT, ITEMS], ...}}.

    Raises:
        ConfigError: the file is not there or holds something else.
    """
    found = _read_json(path)
    wanted = '{"label": NAME, "counts": {BENCHMARK: [CORRECT, ITEMS], ...}}'
    results: dict[str, Result] = {}
    counts = found.get("counts")
    for name, pair in counts.items() if isinstance(counts, dict) else ():
        is_pair = isinstance(pair, list) and [type(number) for number in pair] == [int, int]
        if not is_pair or not 0 <= pair[0] <= pair[1] or pair[1] == 0:
            raise ConfigError(f"{path}: {name} is {pair}; allowed: {wanted}, 0 <= CORRECT <= ITEMS")
        results[name] = Result(*pair)
    if not results or not isinstance(found.get("label"), str):
        raise ConfigError(f"{path}: no label or no counts; allowed: {wanted}")
    return BenchmarkRun(found["label"], results)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}); allowed: {ALLOWED}"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: no JSON object; allowed: {ALLOWED}")
    return found


def plain_table(table: BenchmarkTable) -> dict[str, Any]:
    """The table as JSON, with names for what tuples hold."""
    rows = []
    for row in table.rows:
        line = asdict(row)
        for name, value in (("interval", row.interval), ("delta", row.delta), ("pairs", row.pairs)):
            line[name] = None if value is None else value._asdict()
        rows.append(line)
    return {"baseline": table.baseline, "rows": rows, "notes": table.notes}


def metrics_of(table: BenchmarkTable) -> dict[str, float]:
    """By name of the run and the benchmark."""
    metrics: dict[str, float] = {}
    for row in table.rows:
        name = f"{row.run}/{row.benchmark}"
        metrics[f"accuracy/{name}"] = row.accuracy
        if row.delta is not None:
            metrics |= {
                f"delta/{name}": row.delta.value,
                f"delta_low/{name}": row.delta.low,
                f"delta_high/{name}": row.delta.high,
                f"p/{name}": row.delta.p,
            }
    return metrics
