"""Drafts side by side: pooled tau by benchmark, the step to the row before, the gap that is left.

Rows are runs, in the order given. `average` is the unweighted mean of the benchmarks' pooled taus;
`delta` its difference to the row before. With a reference draft and t the average,

    closed = (t(run) - t(first run)) / (t(reference) - t(first run)).

All intervals come from one paired bootstrap: each resample draws prompts of every benchmark once
and weighs every run with the same draw, so what makes a prompt hard cancels in a difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from evaluation.acceptance import Answer, per_prompt
from evaluation.statistics import Interval


@dataclass(frozen=True)
class DraftRun:
    """A measured draft.

    Attributes:
        name: its label.
        conditions: what must be equal for a comparison, by name.
        answers: of all benchmarks.
    """

    name: str
    conditions: Mapping[str, Any]
    answers: Sequence[Answer]

    def among(self, other: "DraftRun") -> "DraftRun":
        """Only the prompts that another draft has answered, too."""
        theirs = {(answer.benchmark, answer.id) for answer in other.answers}
        kept = [answer for answer in self.answers if (answer.benchmark, answer.id) in theirs]
        return replace(self, answers=kept)


@dataclass(frozen=True)
class Difference:
    """A difference of paired runs, its 95 % interval and two-sided bootstrap p-value."""

    value: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class TableRow:
    """One run of the table.

    Attributes:
        name: of the run.
        tau: pooled, by benchmark.
        tau_interval: 95 %, by benchmark.
        average: unweighted mean of `tau`.
        average_interval: 95 %.
        delta: of the average, to the row before; None in the first.
        delta_by_benchmark: the same for every benchmark.
        gap: reference - run, by benchmark; None without a reference.
        average_gap: reference - run, of the average.
        closed: share of the first run's average gap that is closed; None without a reference, or
            where the reference is not ahead of the first run.
        closed_interval: 95 %, of the same draws; None where the reference is not ahead in each of
            them, which makes the share a division by about nothing.
        tokens, cycles: of the prompts compared, by benchmark; tokens without the prefills'.
    """

    name: str
    tau: dict[str, float]
    tau_interval: dict[str, Interval]
    average: float
    average_interval: Interval
    delta: Difference | None
    delta_by_benchmark: dict[str, Difference] | None
    gap: dict[str, Difference] | None
    average_gap: Difference | None
    closed: float | None
    closed_interval: Interval | None
    tokens: dict[str, int]
    cycles: dict[str, int]


@dataclass(frozen=True)
class AcceptanceTable:
    """Runs in order, the reference last.

    Attributes:
        rows: of the runs.
        reference: name of the row that is the reference, if there is one.
        prompts: number of prompts in the paired comparison, by benchmark.
        left_out: prompts without a verify cycle in some run, which no rate can be paired on.
    """

    rows: list[TableRow]
    reference: str | None
    prompts: dict[str, int]
    left_out: int


class _Resampled:
    """Pooled taus of one run: the value and its resamples, by benchmark and averaged."""

    def __init__(
        self,
        totals: Mapping[str, NDArray[np.float64]],
        weights: Mapping[str, NDArray[np.float64]],
    ) -> None:
        self.tokens = {name: int(rows[:, 0].sum()) for name, rows in totals.items()}
        self.cycles = {name: int(rows[:, 1].sum()) for name, rows in totals.items()}
        self.value = {name: _pooled(rows.sum(0)) for name, rows in totals.items()}
        self.draws = {name: _pooled(weights[name] @ rows) for name, rows in totals.items()}
        self.average = float(np.mean(list(self.value.values())))
        self.average_draws = np.mean(list(self.draws.values()), axis=0)


def acceptance_table(
    runs: Sequence[DraftRun],
    reference: DraftRun | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> AcceptanceTable:
    """Compare runs that answered the same prompts under the same conditions.

    Args:
        runs: the rows, each compared with the one before.
        reference: the draft whose gap is to be closed; becomes the last row.
        resamples: of the paired bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: no run, names that repeat, conditions or prompts that differ (and which).
    """
    every = [*runs, *([reference] if reference else [])]
    _check_comparable(every)
    totals, left_out = _paired_totals(every)
    first = totals[every[0].name]
    rng = np.random.Generator(np.random.Philox(key=seed))
    weights = {name: _draw_weights(rng, len(rows), resamples) for name, rows in first.items()}
    measured = [_Resampled(totals[run.name], weights) for run in every]
    bar = measured[-1] if reference else None
    rows = [
        _row(run.name, here, measured[place - 1] if place else None, measured[0], bar)
        for place, (run, here) in enumerate(zip(every, measured, strict=True))
    ]
    prompts = {name: len(rows) for name, rows in first.items()}
    return AcceptanceTable(rows, reference.name if reference else None, prompts, left_out)


def _row(
    name: str,
    here: _Resampled,
    before: _Resampled | None,
    first: _Resampled,
    bar: _Resampled | None,
) -> TableRow:
    ahead = bar.average - first.average if bar else 0.0
    return TableRow(
        name=name,
        tau=here.value,
        tau_interval={key: _interval(draws) for key, draws in here.draws.items()},
        average=here.average,
        average_interval=_interval(here.average_draws),
        delta=_average_difference(here, before) if before else None,
        delta_by_benchmark=_differences(here, before) if before else None,
        gap=_differences(bar, here) if bar else None,
        average_gap=_average_difference(bar, here) if bar else None,
        closed=(here.average - first.average) / ahead if ahead > 0 else None,
        closed_interval=_closed_interval(here, first, bar) if bar and ahead > 0 else None,
        tokens=here.tokens,
        cycles=here.cycles,
    )


def _closed_interval(here: _Resampled, first: _Resampled, bar: _Resampled) -> Interval | None:
    ahead = bar.average_draws - first.average_draws
    if not np.all(ahead > 0):
        return None
    return _interval((here.average_draws - first.average_draws) / ahead)


def _differences(first: _Resampled, second: _Resampled) -> dict[str, Difference]:
    return {
        key: _difference(first.value[key] - second.value[key], first.draws[key] - second.draws[key])
        for key in first.value
    }


def _average_difference(first: _Resampled, second: _Resampled) -> Difference:
    draws = first.average_draws - second.average_draws
    return _difference(first.average - second.average, draws)


def _difference(value: float, draws: NDArray[np.float64]) -> Difference:
    """p is twice the smaller share of resamples on either side of zero, at least 1 / resamples."""
    low, high = _interval(draws)
    tail = min(float(np.mean(draws <= 0)), float(np.mean(draws >= 0)))
    return Difference(value, low, high, min(1.0, max(2 * tail, 1 / len(draws))))


def _interval(draws: NDArray[np.float64]) -> Interval:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(float(low), float(high))


def _pooled(tokens_cycles: NDArray[np.float64]) -> Any:
    return tokens_cycles[..., 0] / tokens_cycles[..., 1]


def _draw_weights(rng: np.random.Generator, prompts: int, resamples: int) -> NDArray[np.float64]:
    """How often each prompt occurs in each resample: [resamples, prompts]."""
    return rng.multinomial(prompts, np.full(prompts, 1 / prompts), resamples).astype(np.float64)


def _check_comparable(runs: Sequence[DraftRun]) -> None:
    if not runs:
        raise DataError("an acceptance table needs at least 1 run, got 0")
    names = [run.name for run in runs]
    repeated = sorted({name for name in names if names.count(name) > 1})
    if repeated:
        raise DataError(f"runs of one name in a table: {', '.join(repeated)}")
    first, *others = runs
    for run in others:
        for key in sorted({*first.conditions, *run.conditions}):
            ours, theirs = first.conditions.get(key), run.conditions.get(key)
            if ours != theirs:
                raise DataError(
                    f"{first.name} and {run.name} cannot be compared: {key} is {ours!r} and"
                    f" {theirs!r}"
                )


def _paired_totals(
    runs: Sequence[DraftRun],
) -> tuple[dict[str, dict[str, NDArray[np.float64]]], int]:
    """Tokens and cycles [prompts, 2] by run and benchmark, and the prompts left out."""
    found = {run.name: per_prompt(run.answers) for run in runs}
    keys = list(found[runs[0].name])
    for run in runs[1:]:
        _check_same_prompts(runs[0], run, found)
    kept = [key for key in keys if all(found[run.name][key][1] for run in runs)]
    benchmarks = dict.fromkeys(benchmark for benchmark, _ in keys)
    for benchmark in benchmarks:
        if not any(key[0] == benchmark for key in kept):
            raise DataError(f"{benchmark}: no prompt with a verify cycle in every run")
    totals = {
        run.name: {
            benchmark: np.array(
                [found[run.name][key] for key in kept if key[0] == benchmark], dtype=np.float64
            )
            for benchmark in benchmarks
        }
        for run in runs
    }
    return totals, len(keys) - len(kept)


def _check_same_prompts(first: DraftRun, run: DraftRun, found: Mapping[str, Mapping]) -> None:
    ours, theirs = found[first.name], found[run.name]
    lacking = sorted(ours.keys() ^ theirs.keys())
    if lacking:
        benchmark, prompt = lacking[0]
        has, lacks = (first, run) if lacking[0] in ours else (run, first)
        raise DataError(
            f"{first.name} and {run.name} cannot be compared: {lacks.name} lacks {benchmark}"
            f" {prompt}, which {has.name} has (and {len(lacking) - 1} more differ)"
        )
