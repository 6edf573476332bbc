"""Finished runs side by side: what differs between them, and what that does to their metrics."""

import math
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from evaluation.statistics import mean_interval

Value = Any  # what a configuration file can hold


@dataclass(frozen=True)
class Run:
    """A finished run.

    Attributes:
        folder: where it is.
        seed: its `seed`.
        config: its configuration with dotted keys.
        metrics: finite numbers of its summary.json.
    """

    folder: str
    seed: int
    config: Mapping[str, Value]
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        values: the keys that tell it from other groups, None where it has no such key.
        runs: by seed, in order.
    """

    values: Mapping[str, Value]
    runs: Mapping[int, Run]

    @property
    def label(self) -> str:
        """How a user would name it: `masking.mix_alpha=0.5,block_size=4`."""
        return ",".join(f"{key}={show(value)}" for key, value in self.values.items()) or "all"

    def metric(self, name: str) -> dict[int, float]:
        """Its values by seed, of the runs that have it."""
        found = {seed: run.metrics.get(name) for seed, run in self.runs.items()}
        return {seed: value for seed, value in found.items() if value is not None}


def show(value: Value) -> str:
    """A value as the command line spells it; a dash for none."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) else str(value)


def flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, Value]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are values."""
    flat: dict[str, Value] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def differing_keys(runs: Sequence[Run], ignore: Collection[str] = ()) -> list[str]:
    """Keys whose values are not the same in all runs; a key that is absent is like null."""
    keys = sorted({key for run in runs for key in run.config} - set(ignore))
    return [key for key in keys if len({_plain(run.config.get(key)) for run in runs}) > 1]


def telling_keys(runs: Sequence[Run], keys: Sequence[str], first: Iterable[str] = ()) -> list[str]:
    """As few of the keys as tell apart what all of them do.

    Of keys that go together (`noise.name` and the options of each schedule) the names come first,
    then the alphabet; those in `first` are kept in any case.
    """
    kept = [key for key in dict.fromkeys(first) if key in keys]
    rest = sorted((key for key in keys if key not in kept), key=_preference)
    for key in rest:
        if len(_partition(runs, [*kept, key])) > len(_partition(runs, kept)):
            kept.append(key)
    return kept


def _preference(key: str) -> tuple[bool, bool, str]:
    return key.endswith("._target_"), not key.endswith(".name"), key


def _partition(runs: Sequence[Run], keys: Sequence[str]) -> dict[tuple, list[Run]]:
    parts: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        parts[tuple(_plain(run.config.get(key)) for key in keys)].append(run)
    return parts


def _plain(value: Value) -> Any:
    """Something that can be hashed; 1 and 1.0 are the same, 1 and true are not."""
    if isinstance(value, bool) or value is None:
        return str(value)
    return value if isinstance(value, int | float) else f"'{value}'"


def group_runs(runs: Sequence[Run], keys: Sequence[str]) -> list[Group]:
    """Runs with equal values of `keys`, in the order of these values (numbers as numbers).

    Raises:
        DataError: two runs of a group have one seed.
    """
    groups = []
    for members in _partition(runs, keys).values():
        by_seed: dict[int, Run] = {}
        for run in sorted(members, key=lambda run: run.seed):
            if run.seed in by_seed:
                raise DataError(
                    f"{by_seed[run.seed].folder} and {run.folder}: the same configuration and"
                    f" seed={run.seed}; leave one of them out of mode.runs"
                )
            by_seed[run.seed] = run
        values = {key: members[0].config.get(key) for key in keys}
        groups.append(Group(values, by_seed))
    return sorted(groups, key=lambda group: [_order(v) for v in group.values.values()])


def _order(value: Value) -> tuple[int, float, str]:
    if value is None:
        return 0, 0.0, ""
    return (1, float(value), "") if is_number(value) else (2, 0.0, str(value))


def is_number(value: Value) -> bool:
    """A finite int or float that is not a bool."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def find_group(groups: Sequence[Group], wanted: Mapping[str, str]) -> Group:
    """The one group with these values, written as on a command line.

    Raises:
        DataError: none has them, or several do.
    """
    found = [
        group for group in groups
        if all(key in group.values and _same(group.values[key], wanted[key]) for key in wanted)
    ]  # fmt: skip
    if len(found) == 1:
        return found[0]
    asked = ",".join(f"{key}={value}" for key, value in wanted.items())
    labels = "; ".join(group.label for group in (found or groups))
    raise DataError(f"mode.reference={asked}: fits {len(found)} groups; allowed: one of {labels}")


def _same(value: Value, text: str) -> bool:
    if is_number(value):
        try:
            return float(text) == value
        except ValueError:
            return False
    return show(value) == text or (value is None and text == "null")


def compare(
    groups: Sequence[Group], metrics: Sequence[str], reference: Group
) -> list[dict[str, Any]]:
    """One line per metric and group: mean over seeds, and difference to the reference by seed.

    Returns:
        dicts with `metric`, the group's values, `runs`, `n` (runs with the metric), `mean`, `sd`,
        `low` and `high` (95 %, Student's t over seeds), `seeds` and `values` of these; and of the
        differences over the `pairs` seeds that both have: `difference`, `difference_sd`,
        `difference_low`, `difference_high`. None where nothing can be said.
    """
    return [
        {
            "metric": metric,
            **group.values,
            **_summary(group, metric),
            **_differences(group, reference, metric),
        }
        for metric in metrics
        for group in groups
    ]


def _summary(group: Group, metric: str) -> dict[str, Any]:
    found = group.metric(metric)
    line: dict[str, Any] = {
        "runs": len(group.runs), "n": len(found), "mean": None, "sd": None, "low": None,
        "high": None, "seeds": list(found), "values": list(found.values()),
    }  # fmt: skip
    if found:
        mean = mean_interval(list(found.values()))
        line |= {"mean": mean.value}
        if mean.rows > 1:
            line |= {"sd": mean.deviation, "low": mean.low, "high": mean.high}
    return line


def _differences(group: Group, reference: Group, metric: str) -> dict[str, Any]:
    ours, theirs = group.metric(metric), reference.metric(metric)
    shared = [seed for seed in ours if seed in theirs] if group is not reference else []
    line: dict[str, Any] = {
        "pairs": None if group is reference else len(shared), "difference": None,
        "difference_sd": None, "difference_low": None, "difference_high": None,
    }  # fmt: skip
    if shared:
        mean = mean_interval([ours[seed] - theirs[seed] for seed in shared])
        line |= {"difference": mean.value}
        if mean.rows > 1:
            line |= {
                "difference_sd": mean.deviation,
                "difference_low": mean.low,
                "difference_high": mean.high,
            }
    return line


def numeric_keys(groups: Sequence[Group]) -> list[str]:
    """Keys with at least two different numbers, those with most of them first."""
    if not groups:
        return []
    counts = {
        key: len({group.values[key] for group in groups if is_number(group.values[key])})
        for key in groups[0].values
    }
    return sorted((key for key in counts if counts[key] > 1), key=lambda key: -counts[key])
