"""The folder of a reward gate: what its rollouts depend on, the rollouts, and what follows.

RUN/arms/ARM.jsonl     rollouts with rewards, which everything else is rebuilt from
RUN/arms/ARM.json      the numbers of this arm alone
RUN/probe/ARM.jsonl    suffixes behind other thoughts, with rewards
RUN/partial/           prefixes; rollouts and judgements as they come
RUN/conditions.json    what the rollouts depend on
RUN/gate.{json,md,png}, thought_probe.{json,md}
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import read_objects
from data.journal import encode_row
from data.storage import atomic_file
from evaluation.benchmark_run import Row
from evaluation.comparison import flatten
from evaluation.gate import Gate, check_same_prefixes, gate
from evaluation.gate_report import gate_markdown, gate_text, plain_arm, plain_gate, plot_gate
from evaluation.gate_run import OWN, GatePrefix
from evaluation.rollout_metrics import by_prefix
from evaluation.tables import text_table
from evaluation.thought_probe import (
    ProbeRow,
    plain_probe,
    probe_cells,
    probe_markdown,
    thought_probe,
)
from modes.benchmark_folder import FOLDER, read_json
from runtime.errors import ConfigError
from runtime.key_kinds import is_integer, is_number
from runtime.run import write_json

ARMS, PROBE, PARTIAL = "arms", "probe", "partial"
CONDITIONS = "conditions.json"
PREFIXES = f"{PARTIAL}/prefixes.jsonl"
ALLOWED = "what mode=reward_gate writes; run it again"
# Names of arms are names of files.
ARM_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Arms = dict[str, list[Row]]


def claim(run_dir: Path, conditions: Mapping[str, Any], arms: Mapping[str, Any]) -> None:
    """Note what the rollouts here depend on, or see that it is what they were begun with.

    Args:
        run_dir: the folder.
        conditions: of all arms.
        arms: identity of the weights by name; other arms that are here stay.

    Raises:
        ConfigError: the first difference.
    """
    path = run_dir / CONDITIONS
    # As JSON has it: a tuple comes back as a list.
    facts = json.loads(json.dumps({**conditions, "arms": dict(arms)}))
    before = read_json(path, ALLOWED) if path.is_file() else facts
    known: dict[str, Any] = before.get("arms") or {}
    # An arm that is new changes nothing for the others.
    expected = {**before, "arms": {name: known.get(name, facts["arms"][name]) for name in arms}}
    old, new = flatten(expected), flatten(facts)
    for key in sorted({*old, *new}):
        if old.get(key) != new.get(key):
            raise ConfigError(
                f"{FOLDER}={run_dir}: was begun with {key}={json.dumps(old.get(key))},"
                f" now {json.dumps(new.get(key))}; allowed: the same, or another folder"
            )
    write_json(path, {**facts, "arms": {**known, **facts["arms"]}})


def compared(folders: Sequence[Path]) -> list[str]:
    """What a reader must know of arms from several folders, by their conditions.json.

    Raises:
        DataError: another judge in one than in another: rewards that cannot be compared.
    """
    there = {one: one / CONDITIONS for one in folders if (one / CONDITIONS).is_file()}
    known = {one: flatten(read_json(path, ALLOWED)) for one, path in there.items()}
    notes = [f"{one}: no {CONDITIONS}, so who judged is not known"
             for one in folders if one not in known and len(folders) > 1]  # fmt: skip
    (first, base), *others = known.items() or [(Path(), {})]
    for one, facts in others:
        for key in sorted(key for key in {*base, *facts} if not key.startswith("arms.")):
            old, new = (json.dumps(found.get(key)) for found in (base, facts))
            if old != new and key.startswith("reward."):
                raise DataError(
                    f"{there[one]}: {key}={new}, but {old} in {first}; allowed: folders with one"
                    " judge"
                )
            if old != new:
                notes.append(f"{key}: {old} in {first}, {new} in {one}")
    return notes


def write_prefixes(run_dir: Path, prefixes: Sequence[GatePrefix]) -> None:
    """Keep the prefixes for all arms and later runs."""
    (run_dir / PARTIAL).mkdir(parents=True, exist_ok=True)
    _write_rows(run_dir / PREFIXES, [asdict(prefix) for prefix in prefixes])


def read_prefixes(run_dir: Path) -> list[GatePrefix]:
    """The prefixes of the folder; none if there is no file."""
    path = run_dir / PREFIXES
    if not path.is_file():
        return []
    try:
        return [GatePrefix(**row) for _, row in read_objects(path)]
    except TypeError as error:
        raise DataError(f"{path}: not the prefixes of a gate ({error}); remove it") from error


def write_arm(run_dir: Path, name: str, rows: Sequence[Row], tags: tuple[str, str]) -> None:
    """An arm's rollouts and its own numbers; `tags` are the delimiters of thoughts."""
    (run_dir / ARMS).mkdir(parents=True, exist_ok=True)
    _write_rows(run_dir / ARMS / f"{name}.jsonl", rows)
    arm = gate({name: rows}, tags=tags).arms[name]
    write_json(run_dir / ARMS / f"{name}.json", {"arm": name, **plain_arm(arm)})


def write_probe(run_dir: Path, name: str, rows: Sequence[Row], options: Mapping[str, Any]) -> None:
    """An arm's suffixes behind other thoughts, and which thoughts were asked for."""
    (run_dir / PROBE).mkdir(parents=True, exist_ok=True)
    # What an earlier probe was asked for is never said of the rows of this one.
    (run_dir / PROBE / f"{name}.json").unlink(missing_ok=True)
    _write_rows(run_dir / PROBE / f"{name}.jsonl", rows)
    write_json(run_dir / PROBE / f"{name}.json", options)


def probe_of(run_dir: Path, name: str) -> dict[str, Any] | None:
    """What `write_probe` noted of an arm; None before it did."""
    path = run_dir / PROBE / f"{name}.json"
    return read_json(path, ALLOWED) if path.is_file() else None


def _write_rows(path: Path, rows: Sequence[Row]) -> None:
    with atomic_file(path, FOLDER) as file:
        for row in rows:
            file.write(encode_row(row))


def read_arms(folders: Sequence[Path], order: Sequence[str] = ()) -> Arms:
    """The rollouts of all arms of some folders.

    Args:
        folders: of runs; of two hosts, say.
        order: names that come first.

    Raises:
        DataError: a row that is none, an arm that is there twice or lacks samples, or other
            prefixes under the same ids.
    """
    arms: Arms = {}
    for path in (path for folder in folders for path in sorted((folder / ARMS).glob("*.jsonl"))):
        if path.stem in arms:
            raise DataError(f"{path}: arm {path.stem} is in two folders; allowed: once")
        arms[path.stem] = _read_arm(path)
    check_same_prefixes(arms)
    known = [name for name in order if name in arms]
    return {name: arms[name] for name in dict.fromkeys([*known, *arms])}


def read_arm(run_dir: Path, name: str) -> list[Row]:
    """The rollouts of one arm; none before they are complete."""
    path = run_dir / ARMS / f"{name}.jsonl"
    return _read_arm(path) if path.is_file() else []


def _read_arm(path: Path) -> list[Row]:
    rows = _read_rows(path, lambda row: (row["prefix_id"], row["k"]))
    _check_complete(path, rows)
    return rows


def _check_complete(path: Path, rows: Sequence[Row]) -> None:
    """Every prefix has the samples 0 .. K - 1, each once."""
    groups = by_prefix(rows)
    if not groups:
        raise DataError(f"{path}: no rows; allowed: {ALLOWED}")
    samples = max(row["k"] for row in rows) + 1
    for prefix_id, group in groups.items():
        if sorted(row["k"] for row in group) != list(range(samples)):
            raise DataError(
                f"{path}: prefix {prefix_id!r} has not the samples 0 .. {samples - 1}, each once;"
                f" allowed: {ALLOWED}"
            )


def read_probes(folders: Sequence[Path], arms: Arms) -> dict[str, dict[str, list[Row]]]:
    """Rows by arm and condition; `own` are the arm's rollouts with the numbers that were probed.

    Raises:
        DataError: a row that is none, or an arm without rollouts.
    """
    found: dict[str, dict[str, list[Row]]] = {}
    for path in (path for folder in folders for path in sorted((folder / PROBE).glob("*.jsonl"))):
        if path.stem not in arms:
            raise DataError(f"{path}: no rollouts of arm {path.stem} in {ARMS}/; {ALLOWED}")
        conditions: dict[str, list[Row]] = {OWN: []}
        for row in _read_probe(path):
            conditions.setdefault(row["condition"], []).append(row)
        numbers = {row["k"] for rows in conditions.values() for row in rows}
        conditions[OWN] = [row for row in arms[path.stem] if row["k"] in numbers]
        found[path.stem] = conditions
    return {name: found[name] for name in arms if name in found}


def _read_probe(path: Path) -> list[Row]:
    return _read_rows(
        path,
        lambda row: (row["prefix_id"], row["k"], row["condition"]),
        condition=(_is_text, "a text"),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _is_reward(value: Any) -> bool:
    return value is None or is_number(value)


# What a row must have to be counted, and how a message says so.
_FIELDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "prefix_id": (_is_text, "a text"),
    "k": (_is_count, "an integer >= 0"),
    "prefix": (_is_text, "a text"),
    "reference": (_is_text, "a text"),
    "thought": (_is_text, "a text"),
    "suffix": (_is_text, "a text"),
    "reward": (_is_reward, "a number or null"),
    "thought_tokens": (_is_count, "an integer >= 0"),
    "suffix_tokens": (_is_count, "an integer >= 0"),
    "closed_autonomously": (lambda value: isinstance(value, bool), "true, false"),
    "boundary_ids": (lambda value: isinstance(value, list), "a list of tokens"),
}


def _read_rows(
    path: Path, key: Callable[[Row], tuple[Any, ...]], **more: tuple[Callable[[Any], bool], str]
) -> list[Row]:
    """Rows with the fields that are needed, and `more`; no two of one key."""
    rows: dict[tuple[Any, ...], Row] = {}
    for place, row in read_objects(path):
        for field, (is_kind, kind) in {**_FIELDS, **more}.items():
            if field not in row or not is_kind(row[field]):
                value = json.dumps(row.get(field))[:40]
                raise DataError(f"{place}: {field}={value}; allowed: {kind} ({ALLOWED})")
        if key(row) in rows:
            raise DataError(f"{place}: a second row of {key(row)}; allowed: {ALLOWED}")
        rows[key(row)] = row
    return list(rows.values())


def write_results(
    out: Path, probes: Mapping[str, Mapping[str, Sequence[Row]]], found: Gate,
    notes: Sequence[str] = (),
) -> list[ProbeRow]:  # fmt: skip
    """gate.json, .md and .png, thought_probe.json and .md where something was probed, and the
    terminal."""
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "gate.json", plain_gate(found))
    (out / "gate.md").write_text(gate_markdown(found, notes), encoding="utf-8")
    plot_gate(out / "gate.png", found)
    print(gate_text(found))
    table = thought_probe(probes)
    if table:
        write_json(out / "thought_probe.json", plain_probe(table))
        (out / "thought_probe.md").write_text(probe_markdown(table), encoding="utf-8")
        print("\n" + text_table(*probe_cells(table)))
    return table


def metrics_of(found: Gate, probes: Sequence[ProbeRow]) -> dict[str, float]:
    """What goes into summary.json; numbers that are not known are left out."""
    metrics: dict[str, float | None] = {}
    for name, arm in found.arms.items():
        numbers = {k: v for k, v in asdict(arm).items() if v is None or isinstance(v, int | float)}
        metrics |= {f"gate/{name}/{key}": value for key, value in numbers.items()}
        if arm.interval is not None:
            metrics |= {
                f"gate/{name}/low": arm.interval.low,
                f"gate/{name}/high": arm.interval.high,
            }
    for pair in found.pairs:
        metrics[f"delta/{pair.name}"] = pair.mean_reward_delta
        metrics[f"significant/{pair.name}"] = float(pair.significant)
        if pair.interval is not None:
            metrics |= {
                f"delta_low/{pair.name}": pair.interval.low,
                f"delta_high/{pair.name}": pair.interval.high,
            }
    metrics |= {f"go_no_go/{name}": float(value) for name, value in found.go_no_go.items()}
    for row in probes:
        metrics |= {
            f"probe/{row.arm}/{row.condition}/reward_mean": row.reward_mean,
            f"probe/{row.arm}/{row.condition}/oracle": row.oracle,
        }
        if row.own_minus is not None:
            name = f"probe/{row.arm}/{row.condition}"
            metrics[f"{name}/own_minus"] = row.own_minus.mean_reward_delta
            metrics[f"{name}/significant"] = float(row.own_minus.significant)
    return {name: value for name, value in metrics.items() if value is not None}
