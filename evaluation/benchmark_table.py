"""Models side by side on benchmarks: accuracy with its interval, and the step to a baseline.

Runs that kept their rows are compared item by item: the same id under the same prompt, McNemar's
test and Newcombe's interval for pairs. Where only counts are known, as of published tables, nothing
can be paired, and the comparison is the cautious one of two samples.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data.errors import DataError
from evaluation.benchmark_run import forward_passes
from evaluation.rate_differences import (
    Difference,
    Pairs,
    paired_difference_of_rates,
    unpaired_difference_of_rates,
)
from evaluation.statistics import Interval, wilson_interval

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Result:
    """What one model made of one benchmark.

    Attributes:
        correct: items that are right.
        items: all of them.
        rows: the rows of items.jsonl by id; None where only the counts are known.
        grader: fingerprint of who judged.
        settings: of the answers.
        expected: items of the complete benchmark, if that is known.
    """

    correct: int
    items: int
    rows: Mapping[str, Item] | None = None
    grader: Any = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    expected: int | None = None

    @classmethod
    def of_rows(cls, rows: Sequence[Item], **about: Any) -> "Result":
        """Of the rows of one benchmark."""
        by_id = {row["id"]: row for row in rows}
        assert len(by_id) == len(rows), "whoever reads rows refuses an id that is there twice"
        return cls(sum(row["correct"] for row in rows), len(rows), by_id, **about)


@dataclass(frozen=True)
class BenchmarkRun:
    """A model and its results by benchmark."""

    name: str
    results: Mapping[str, Result]


@dataclass(frozen=True)
class TableRow:
    """One benchmark of one run.

    Attributes:
        run, benchmark: names.
        items, correct, accuracy, interval: of all items of the run; 95 %, Wilson.
        delta: accuracy minus the baseline's, over the items that both have; None in the baseline.
        pairs: what `delta` was counted from; None where it is unpaired.
        tokens_per_forward: None where nobody counted passes.
    """

    run: str
    benchmark: str
    items: int
    correct: int
    accuracy: float
    interval: Interval
    delta: Difference | None
    pairs: Pairs | None
    tokens_per_forward: float | None


@dataclass(frozen=True)
class BenchmarkTable:
    """The rows, the baseline's first, and what has to be said about them."""

    rows: list[TableRow]
    baseline: str
    notes: list[str]


def benchmark_table(runs: Sequence[BenchmarkRun], baseline: BenchmarkRun) -> BenchmarkTable:
    """Compare runs with a baseline on the benchmarks that both have.

    Raises:
        DataError: names that repeat, no benchmark in common, other prompts under the same id, or
            verdicts of another grader.
    """
    every = [baseline, *runs]
    names = [run.name for run in every]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated or not runs:
        problem = f"two runs are called {repeated[0]}" if repeated else "no run beside the baseline"
        raise DataError(f"a benchmark table: {problem}")
    rows = [_row(baseline.name, key, one, None, None) for key, one in baseline.results.items()]
    notes = _Notes()
    for run in runs:
        if not run.results.keys() & baseline.results.keys():
            raise DataError(
                f"{run.name} and {baseline.name} have no benchmark in common:"
                f" {', '.join(run.results)}, and {', '.join(baseline.results)}"
            )
        for key, one in run.results.items():
            bar = baseline.results.get(key)
            delta, pairs = (None, None) if bar is None else _delta(run.name, key, one, bar)
            rows.append(_row(run.name, key, one, delta, pairs))
            notes.add(run.name, key, _differences(one, bar) if bar is not None else ())
    for run in every:
        for key, one in run.results.items():
            notes.add(run.name, key, _remarks(one))
    return BenchmarkTable(rows, baseline.name, notes.lines())


class _Notes:
    """What is to be said of benchmarks of runs; the same of several is said once."""

    def __init__(self) -> None:
        self._said: dict[tuple[str, str], list[str]] = {}

    def add(self, run: str, benchmark: str, sentences: Iterable[str]) -> None:
        """Sentences about one benchmark of a run."""
        for sentence in sentences:
            self._said.setdefault((run, sentence), []).append(benchmark)

    def lines(self) -> list[str]:
        """In the order in which they came."""
        return [
            f"{run}, {', '.join(names)}: {sentence}"
            for (run, sentence), names in self._said.items()
        ]


def _row(
    run: str, benchmark: str, one: Result, delta: Difference | None, pairs: Pairs | None
) -> TableRow:
    passes, tokens = forward_passes(list(one.rows.values())) if one.rows else (0.0, 0)
    return TableRow(
        run=run,
        benchmark=benchmark,
        items=one.items,
        correct=one.correct,
        accuracy=one.correct / one.items,
        interval=wilson_interval(one.correct, one.items),
        delta=delta,
        pairs=pairs,
        tokens_per_forward=tokens / passes if passes else None,
    )


def _delta(run: str, key: str, ours: Result, bar: Result) -> tuple[Difference, Pairs | None]:
    if ours.rows is None or bar.rows is None:
        return unpaired_difference_of_rates(ours.correct, ours.items, bar.correct, bar.items), None
    if ours.grader != bar.grader:
        raise DataError(
            f"{run} and the baseline cannot be compared: {key} was graded by {ours.grader!r} and"
            f" {bar.grader!r}; allowed: the same grader (run mode=benchmark_eval again in the same"
            " folder: answers are kept)"
        )
    pairs = pair(ours.rows, bar.rows, f"{run}, {key}")
    return paired_difference_of_rates(pairs), pairs


def pair(ours: Mapping[str, Item], theirs: Mapping[str, Item], where: str) -> Pairs:
    """Count the items that both have by who got them right.

    Raises:
        DataError: there are none, or an item was asked in another way.
    """
    shared = [row_id for row_id in ours if row_id in theirs]
    if not shared:
        raise DataError(f"{where}: no item in common with the baseline")
    for row_id in shared:
        if ours[row_id]["prompt_hash"] != theirs[row_id]["prompt_hash"]:
            raise DataError(
                f"{where}: item {row_id!r} had another prompt in the baseline; allowed: runs with"
                " the same items, exemplars and format"
            )
    right = [(ours[row_id]["correct"], theirs[row_id]["correct"]) for row_id in shared]
    return Pairs(*(right.count(kind) for kind in _KINDS))


# In the order of `Pairs`.
_KINDS = ((True, True), (True, False), (False, True), (False, False))


def _differences(ours: Result, bar: Result) -> Iterator[str]:
    """What makes a comparison less than fair."""
    if ours.rows is None or bar.rows is None:
        yield (
            "only counts are known of one side; McNemar's test needs the answers to the"
            " same items on both, so delta, interval and p are those of two unpaired samples"
        )
        return
    only_ours, only_theirs = len(ours.rows.keys() - bar.rows), len(bar.rows.keys() - ours.rows)
    if only_ours or only_theirs:
        both = len(ours.rows) - only_ours
        yield (
            f"{only_ours} items are only here and {only_theirs} only in the baseline;"
            f" delta is over the {both} that both have"
        )
    for name in sorted({*ours.settings, *bar.settings}):
        if ours.settings.get(name) != bar.settings.get(name):
            yield (
                f"{name} is {ours.settings.get(name)!r} here and"
                f" {bar.settings.get(name)!r} in the baseline"
            )


def _remarks(one: Result) -> Iterator[str]:
    """What a reader of the accuracy must know."""
    if one.expected is not None and one.expected != one.items:
        yield f"{one.items} items; the complete benchmark has {one.expected}"
    if one.rows is None:
        return
    errors = sum(row["error"] is not None for row in one.rows.values())
    if errors:
        yield f"{errors} items have no answer and count as wrong"
    capped = sum(row["finish"] == "length" for row in one.rows.values())
    if capped:
        yield f"{capped} of {one.items} answers were ended by the limit"
