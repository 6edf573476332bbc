"""mode=benchmark_table: models side by side: `mode.runs=[nce] mode.baseline=stage2`."""

import glob
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from evaluation.benchmark_report import comparison_markdown, comparison_text, plot_table
from evaluation.benchmark_table import BenchmarkRun, BenchmarkTable, Result, benchmark_table
from modes.benchmark_folder import read_json, read_results
from modes.compare import run_folders, show_list
from runtime.errors import ConfigError
from runtime.run import write_json

ALLOWED = "folders of finished mode=benchmark_eval runs, or .json files of published counts"


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
    """Folders, and files of counts, in the order given; a glob's in the order of their names.

    Raises:
        ConfigError: a folder that is not there, or a glob of files that fits none.
    """
    places: list[Path] = []
    for pattern in patterns:
        file = Path(pattern).expanduser()
        if file.suffix != ".json":
            places += run_folders([pattern], own)
            continue
        is_glob = glob.has_magic(pattern) and not file.is_file()
        found = sorted(map(Path, glob.glob(str(file), recursive=True))) if is_glob else [file]
        if not found:
            raise ConfigError(f"mode.runs={pattern}: no such files; allowed: {ALLOWED}")
        places += found
    return list(dict.fromkeys(places))


def read_run(place: Path) -> BenchmarkRun:
    """A run of mode=benchmark_eval by its folder, or published counts by their file.

    Raises:
        ConfigError: it is neither.
        DataError: a row of its items, by file and line.
    """
    if place.suffix == ".json":
        return read_counts(place)
    label, found = read_results(place)
    return BenchmarkRun(label, {
        name: Result.of_rows(
            one.rows, grader=one.grader, settings=one.conditions["settings"],
            expected=one.score.expected,
        )
        for name, one in found.items()
    })  # fmt: skip


def read_counts(path: Path) -> BenchmarkRun:
    """Published counts: {"label": NAME, "counts": {BENCHMARK: [CORRECT, ITEMS], ...}}.

    Raises:
        ConfigError: the file is not there or holds something else.
    """
    found = read_json(path, ALLOWED)
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
