"""Folders of reasoning evaluations: one per arm, in it a file of samples per benchmark.

RUN/ARM/partial.jsonl      answers as they come
RUN/ARM/BENCHMARK.jsonl    samples with verdicts, which everything else is rebuilt from
RUN/ARM/conditions.json    what the answers depend on
RUN/ARM/reasoning.json     the numbers of this arm alone; the same in reasoning.md
"""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_objects
from data.journal import encode_row
from data.storage import atomic_file
from evaluation.benchmark_run import Row
from evaluation.comparison import flatten
from evaluation.reasoning import ReasoningTable
from evaluation.reasoning_report import report_markdown, report_text
from evaluation.reasoning_rows import Arms, add_rows
from modes.benchmark_folder import CONDITIONS, FOLDER, PARTIAL, read_json
from modes.compare import run_folders
from runtime.errors import ConfigError
from runtime.run import write_json

ALLOWED = "folders that mode=reasoning_eval has written to"
NUMBERS = "reasoning"


def rows_file(arm_dir: Path, benchmark: str) -> Path:
    """Where the samples of a benchmark are."""
    return arm_dir / f"{benchmark}.jsonl"


def row_files(arm_dir: Path) -> list[Path]:
    """The files of samples in an arm's folder, by name."""
    return sorted(path for path in arm_dir.glob("*.jsonl") if path.name != PARTIAL)


def write_rows(arm_dir: Path, benchmark: str, rows: Sequence[Row]) -> None:
    """A benchmark's samples, complete or not at all."""
    with atomic_file(rows_file(arm_dir, benchmark), FOLDER) as file:
        for row in rows:
            file.write(encode_row(row))


def read_arm(arm_dir: Path, without: Collection[str] = ()) -> Arms:
    """The samples in an arm's folder.

    Raises:
        DataError: a row that is none, by file and line.
    """
    arms: Arms = {}
    for path in row_files(arm_dir):
        if path.stem not in without:
            add_rows(arms, read_objects(path))
    return arms


def read_runs(patterns: Sequence[str], own: Path) -> tuple[Arms, list[Path]]:
    """The samples of all arms of some folders, merged, and the files they are in.

    Arms come in the order of the folders, and within one by name. Halves of one arm may lie in
    several folders: those of two hosts, say.

    Raises:
        ConfigError: a folder that is not there, or nothing in any.
        DataError: a row that is none, or a sample that is there twice, by file and line.
    """
    # A table may stand in the folder of its runs, so none is left out.
    files = [
        path
        for folder in run_folders(patterns, own / PARTIAL)
        for arm_dir in sorted(place for place in folder.iterdir() if place.is_dir())
        for path in row_files(arm_dir)
    ]
    if not files:
        raise ConfigError(
            f"mode.runs=[{','.join(patterns)}]: no ARM/BENCHMARK.jsonl there; allowed: {ALLOWED}"
        )
    arms: Arms = {}
    for path in files:
        add_rows(arms, read_objects(path))
    return arms, files


def compared(arm_dirs: Sequence[Path], benchmarks: Collection[str]) -> list[str]:
    """What a reader must know of arms that were not sampled alike, by their conditions.json.

    Raises:
        DataError: an arm whose folders have answers of two models.
    """
    models: dict[str, tuple[Path, Any]] = {}
    settings: dict[str, tuple[str, Mapping[str, Any]]] = {}
    notes: list[str] = []
    for arm_dir in (one for one in arm_dirs if (one / CONDITIONS).is_file()):
        path, arm = arm_dir / CONDITIONS, arm_dir.name
        for name, one in read_json(path, ALLOWED).items():
            model = _weights(one["model"])
            first, known = models.setdefault(arm, (path, model))
            if model != known:
                raise DataError(
                    f"{path}: arm={arm} has answers of another model here than by {first};"
                    " allowed: one model per arm, of which halves may be merged"
                )
            if name in benchmarks:
                facts = flatten({key: one.get(key) for key in ("settings", "prefix")})
                other, base = settings.setdefault(name, (arm, facts))
                notes += [
                    f"{name}: {key} is {json.dumps(base.get(key))} in {other} and"
                    f" {json.dumps(facts.get(key))} in {arm}"
                    for key in sorted({*base, *facts})
                    if base.get(key) != facts.get(key)
                ]
    return notes


def _weights(model: Mapping[str, Any]) -> dict[str, Any]:
    """A model's identity; its name, a path of one host, only where there is nothing better."""
    named = model.get("fingerprint") is None
    return {key: value for key, value in model.items() if named or key != "target"}


def write_numbers(
    arm_dir: Path,
    arm: str,
    table: ReasoningTable,
    conditions: Mapping[str, Any],
    graders: Mapping[str, Any],
) -> None:
    """reasoning.json and reasoning.md of one arm, and the terminal.

    Args:
        arm_dir: its folder, so that no other arm's numbers are overwritten.
        arm: its name.
        table: of this arm alone.
        conditions: of the benchmarks that were asked now, what the answers depend on.
        graders: what their graders say of themselves.
    """
    (macro,) = table.macro
    found = {
        "arm": arm, "samples": table.samples,
        "benchmarks": {row.benchmark: asdict(row) for row in table.rows}, "macro": asdict(macro),
        "notes": list(table.notes), "conditions": conditions, "graders": graders,
    }  # fmt: skip
    write_json(arm_dir / f"{NUMBERS}.json", found)
    (arm_dir / f"{NUMBERS}.md").write_text(report_markdown(table, arm), encoding="utf-8")
    print(report_text(table))


def check_samples(arms: Arms, samples: int, arm_dir: Path) -> None:
    """Raise for benchmarks that stay here with another number of samples of each problem.

    Raises:
        ConfigError: which one, and its number.
    """
    for one in arms.values():
        for name, found in one.items():
            there = 1 + max(key[1] for key in found)
            if there != samples:
                raise ConfigError(
                    f"mode.samples={samples}: {rows_file(arm_dir, name)} has {there} samples of a"
                    f" problem; allowed: {there}, another mode.arm, or all benchmarks in one run"
                )


def check_arm(arms: Arms, arm: str, arm_dir: Path) -> None:
    """Raise DataError for rows of another arm in this one's folder."""
    for name in arms:
        if name != arm:
            raise DataError(f"{arm_dir}: has rows of arm={name}; allowed: of arm={arm} alone")
