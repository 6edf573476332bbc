"""The folder of a mode=benchmark_eval run: whose answers it has, and its results."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.few_shot import Prompt
from data.files import read_objects
from data.journal import Journal, encode_row
from data.storage import atomic_file
from evaluation.benchmark_report import markdown, score_cells
from evaluation.benchmark_run import Answered, Row, Score, score
from evaluation.comparison import flatten
from evaluation.tables import text_table
from runtime.errors import ConfigError
from runtime.key_kinds import is_integer, is_number
from runtime.run import write_json

# Answers as they come; answers with verdicts, in the order of the items; what the answers depend
# on; and the scores.
PARTIAL, ITEMS, CONDITIONS, RESULT = (
    "partial.jsonl", "items.jsonl", "conditions.json", "benchmark.json",
)  # fmt: skip
FOLDER = "paths.run_dir"
ALLOWED = "what mode=benchmark_eval writes; run it again"


@dataclass(frozen=True)
class Finished:
    """A benchmark that has been answered and graded.

    Attributes:
        rows: with verdicts.
        score: of them.
        grader: fingerprint of who judged.
        conditions: what the answers depend on.
    """

    rows: Sequence[Row]
    score: Score
    grader: Any
    conditions: Mapping[str, Any]


def claim_folder(
    run_dir: Path,
    conditions: Mapping[str, Any],
    earlier: Mapping[str, Finished],
    same_prompts: Collection[str],
) -> list[str]:
    """Note what the answers here depend on, or see that it is what they were begun with.

    Args:
        run_dir: the folder.
        conditions: of the benchmarks of this run.
        earlier: results of others that stay.
        same_prompts: benchmarks whose answers are to the prompts of this run, whatever has become
            of the files behind them: a mended right answer, say.

    Returns:
        the benchmarks of the folder, in the order in which they were begun.

    Raises:
        ConfigError: the first difference of a benchmark that the folder has answers of, another
            model than that of any benchmark, or answers of nobody knows what.
    """
    path, partial = run_dir / CONDITIONS, run_dir / PARTIAL
    is_begun = partial.is_file() and partial.stat().st_size > 0
    if is_begun and not path.is_file():
        raise ConfigError(
            f"{FOLDER}={run_dir}: answers without {CONDITIONS}, which says whose they are; allowed:"
            " another folder"
        )
    before = read_json(path, ALLOWED) if is_begun else {}
    for name, one in earlier.items():
        before.setdefault(name, one.conditions)
    # As JSON has it: a tuple comes back as a list.
    facts = json.loads(json.dumps(conditions))
    model = {"model": next(iter(facts.values()))["model"]}
    for name, old in before.items():
        new = facts.get(name, model)
        if name not in facts:
            old = {"model": old["model"]}
        elif name in same_prompts:
            old = {**old, "prompts": new["prompts"]}
        _require_same(f"{FOLDER}={run_dir}: {name}", old, new)
    write_json(path, {**before, **facts})
    return list({**before, **facts})


def _require_same(where: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = flatten(before), flatten(now)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{where} was begun with {key}={json.dumps(old.get(key))},"
                f" now {json.dumps(new.get(key))}; allowed: the same, or another folder"
            )


def is_same(name: str, prompts: Sequence[Prompt], journal: Journal) -> bool:
    """Whether there are answers to a benchmark's prompts, and all of them to these very ones.

    Raises:
        ConfigError: an item's answer is that of another benchmark.
    """
    answers = [(one, journal.read(one.id)) for one in prompts if one.id in journal]
    for prompt, row in answers:
        if row.get("task") != name:
            raise ConfigError(
                f"benchmark={name}: item {prompt.id!r} was answered for {row.get('task')!r};"
                " allowed: item sets of different names, or another folder"
            )
    return bool(answers) and all(row.get("prompt_hash") == one.hash for one, row in answers)


def write_results(run_dir: Path, label: str, results: Mapping[str, Finished]) -> None:
    """items.jsonl; benchmark.json, which mode=benchmark_table reads; benchmark.md; the terminal."""
    with atomic_file(run_dir / ITEMS, FOLDER) as file:
        for one in results.values():
            for row in one.rows:
                file.write(encode_row(row))
    found = {
        name: {"score": asdict(one.score), "grader": one.grader, "conditions": one.conditions}
        for name, one in results.items()
    }
    write_json(run_dir / RESULT, {"label": label, "benchmarks": found})
    header, cells = score_cells({name: one.score for name, one in results.items()})
    incomplete = [
        f"{name}: {one.score.items} items; the complete benchmark has {one.score.expected}"
        for name, one in results.items()
        if one.score.expected not in (None, one.score.items)
    ]
    notes = "".join(f"- {line}\n" for line in incomplete)
    text = f"# {label}\n\n{markdown(header, cells)}\n{notes}"
    (run_dir / "benchmark.md").write_text(text, encoding="utf-8")
    print(text_table(header, cells))
    print(notes, end="")


def read_results(folder: Path, without: Collection[str] = ()) -> tuple[str, dict[str, Finished]]:
    """The label and the results of a folder.

    Args:
        folder: of a run that has ended.
        without: benchmarks that are left aside, unread.

    Raises:
        ConfigError: there is no result, or not one of this mode.
        DataError: a row, by file and line, that is none or is there twice, or too few of them.
    """
    path = folder / RESULT
    found = read_json(path, ALLOWED)
    label, listed = found.get("label"), found.get("benchmarks")
    if not isinstance(label, str) or not isinstance(listed, dict):
        raise ConfigError(f"{path}: no label or no benchmarks; allowed: {ALLOWED}")
    about = {name: one for name, one in listed.items() if name not in without}
    for name, one in about.items():
        _check_about(f"{path}: benchmarks.{name}", one)
    rows = _read_rows(folder / ITEMS, about, without) if about else {}
    for name, of_task in rows.items():
        if len(of_task) != about[name]["score"]["items"]:
            raise DataError(f"{folder / ITEMS}: {len(of_task)} rows of {name}, {RESULT} has another"
                            " number; run mode=benchmark_eval again")  # fmt: skip
    return label, {name: _finished(about[name], of_task) for name, of_task in rows.items()}


def _check_about(where: str, one: Any) -> None:
    """Raise ConfigError for what is said of a benchmark that says too little."""
    score_of = one.get("score") if isinstance(one, dict) else None
    parts = one.get("conditions") if isinstance(one, dict) else None
    if not isinstance(score_of, dict) or "grader" not in one or not isinstance(parts, dict):
        raise ConfigError(f"{where}: needs score, grader and conditions; allowed: {ALLOWED}")
    if not all(isinstance(parts.get(part), dict) for part in ("model", "settings")):
        raise ConfigError(f"{where}.conditions: needs model and settings; allowed: {ALLOWED}")
    items, expected = score_of.get("items", 0), score_of.get("expected")
    if not is_integer(items) or items < 1 or not (expected is None or is_integer(expected)):
        raise ConfigError(
            f"{where}.score: items={items}, expected={expected}; allowed: an integer >= 1, and an"
            f" integer or null ({ALLOWED})"
        )


def _finished(about: Mapping[str, Any], rows: Sequence[Row]) -> Finished:
    speed = about["score"].get("tokens_per_s")
    found = score(rows, about["score"]["expected"], Answered({}, 0, 0.0))
    found = replace(found, tokens_per_s=speed if is_number(speed) else None)
    return Finished(rows, found, about["grader"], about["conditions"])


def _read_rows(
    path: Path, names: Collection[str], without: Collection[str]
) -> dict[str, list[Row]]:
    """The rows of items.jsonl by benchmark."""
    rows: dict[str, list[Row]] = {name: [] for name in names}
    ids: set[str] = set()
    for place, row in read_objects(path):
        for field, (is_kind, kind) in _FIELDS.items():
            if field not in row or not is_kind(row[field]):
                value = json.dumps(row.get(field))[:40]
                raise DataError(f"{place}: {field}={value}; allowed: {kind} ({ALLOWED})")
        if row["id"] in ids:
            raise DataError(f"{place}: a second row of {row['id']!r}; allowed: {ALLOWED}")
        ids.add(row["id"])
        if row["task"] not in rows and row["task"] not in without:
            raise DataError(f"{place}: task={row['task']!r} is no benchmark of {RESULT}; allowed:"
                            f" {ALLOWED}")  # fmt: skip
        rows.get(row["task"], []).append(row)
    return rows


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


# What a row must have to be counted and compared, and how a message says so.
_FIELDS = {
    "id": (_is_text, "a text"),
    "task": (_is_text, "a text"),
    "prompt_hash": (_is_text, "a text"),
    "correct": (lambda v: isinstance(v, bool), "true, false"),
    "error": (lambda v: v is None or isinstance(v, str), "a text or null"),
    "finish": (_is_text, "a text"),
    "num_tokens": (lambda v: is_integer(v) and v >= 0, "an integer >= 0"),
    "work": (
        lambda v: v is None or (isinstance(v, dict) and all(map(is_number, v.values()))),
        "{NAME: NUMBER, ...} or null",
    ),
}


def read_json(path: Path, allowed: str) -> dict[str, Any]:
    """The object in a file.

    Raises:
        ConfigError: there is none.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    # Brackets nested a thousand deep exhaust the stack.
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path}: cannot be read ({type(error).__name__}); allowed: {allowed}"
        ) from error
    if not isinstance(found, dict):
        raise ConfigError(f"{path}: no JSON object; allowed: {allowed}")
    return found
