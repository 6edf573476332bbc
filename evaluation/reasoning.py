"""Several sampled answers to every problem as numbers: Mean@n, Pass@k, tokens, and differences.

With c of n samples of a problem right, Mean@n is the mean of c / n over problems, and Pass@k that
of

    1 - C(n - c, k) / C(n, k),

the chance that k of the samples, drawn without replacement, have a right one among them: unbiased
for k new samples (arXiv:2107.03374, eq. 1). At k = n it is the share of problems with any right
sample. The macro average is the unweighted mean over benchmarks, of tokens as well.

Samples of one problem depend on each other, so intervals draw whole problems
(`evaluation.grouped`): 95 %, percentile. The draws of a benchmark are the same for all arms, which
makes differences paired; benchmarks are drawn independently. Only the share of problems with any
right sample, of which there is one per problem, has Wilson's interval.

Legend: P problems, D resamples, K columns.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from data.fingerprint import fingerprint
from evaluation.grouped import RESAMPLES, Groups, least_p
from evaluation.statistics import wilson_interval

Floats = NDArray[np.float64]
MACRO = "Macro"
# Columns before those of Pass@k.
_MEAN, _ANY, _TOKENS, _FIRST_K = range(4)


class Problem(NamedTuple):
    """The samples of one problem.

    Attributes:
        correct: c, how many are right.
        tokens: of all of them.
        choices: to pick from; None where the answer is free.
    """

    correct: int
    tokens: int
    choices: int | None = None


@dataclass(frozen=True)
class Problems:
    """One benchmark of one arm.

    Attributes:
        samples: n, of every problem.
        of: the problems, in an order that all arms share.
    """

    samples: int
    of: Sequence[Problem]


@dataclass(frozen=True)
class Value:
    """A number and its 95 % interval, which one problem alone leaves undetermined: None."""

    value: float
    low: float | None
    high: float | None


@dataclass(frozen=True)
class Change:
    """right - left, its 95 % interval, and the p-value of no difference (`Groups.difference`)."""

    value: float
    low: float | None
    high: float | None
    p: float | None


@dataclass(frozen=True)
class Chance:
    """What guessing gives: the means over problems of 1 / c, and of 1 - (1 - 1 / c)^n."""

    mean: float
    passed: float


@dataclass(frozen=True)
class ArmRow:
    """One benchmark of one arm.

    Attributes:
        problems, samples: how many; samples = n * problems.
        correct: samples that are right.
        passed: problems with a right sample.
        mean: correct / samples.
        any: passed / problems, with Wilson's interval.
        tokens: mean of a sample.
        pass_at: Pass@k by k.
        chance: of guessing; None where there is nothing to choose from.
    """

    arm: str
    benchmark: str
    problems: int
    samples: int
    correct: int
    passed: int
    mean: Value
    any: Value
    tokens: Value
    pass_at: Mapping[int, Value]
    chance: Chance | None


@dataclass(frozen=True)
class MacroRow:
    """An arm's unweighted means over benchmarks; Pass@n is `any`."""

    arm: str
    mean: Value
    any: Value
    tokens: Value
    pass_at: Mapping[int, Value]


@dataclass(frozen=True)
class DeltaRow:
    """What the right arm has more than the left one, on a benchmark or in the macro average."""

    right: str
    left: str
    benchmark: str
    mean: Change
    any: Change
    tokens: Change


@dataclass(frozen=True)
class ReasoningTable:
    """The three tables, and what has to be said about them.

    Attributes:
        samples: n.
        resamples: of the intervals.
    """

    samples: int
    resamples: int
    rows: Sequence[ArmRow]
    macro: Sequence[MacroRow]
    deltas: Sequence[DeltaRow]
    notes: Sequence[str]

    def every_row(self) -> "list[tuple[str, ArmRow | MacroRow]]":
        """Arms on benchmarks, then their macro averages, each after the benchmark's name."""
        rows: list[tuple[str, ArmRow | MacroRow]] = [(row.benchmark, row) for row in self.rows]
        return [*rows, *((MACRO, row) for row in self.macro)]


def pass_at_k(samples: int, correct: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k), as 1 - prod_{i = n - c + 1}^{n} (1 - k / i): no large numbers.

    Raises:
        DataError: k outside 1 .. n, or c outside 0 .. n.
    """
    if not (1 <= k <= samples and 0 <= correct <= samples):
        raise DataError(
            f"pass@{k} of {correct} right samples among {samples}: allowed 1 <= k <= samples, and"
            " 0 to all of them right"
        )
    if samples - correct < k:
        return 1.0
    return 1.0 - prod(1.0 - k / i for i in range(samples - correct + 1, samples + 1))


def chance_of(choices: Iterable[int], samples: int) -> Chance:
    """Of guessing among c choices, once and n times: Mean@n and Pass@n of knowing nothing."""
    rates = [1.0 / count for count in choices]
    passed = [1.0 - (1.0 - rate) ** samples for rate in rates]
    return Chance(sum(rates) / len(rates), sum(passed) / len(passed))


def powers_up_to(samples: int) -> list[int]:
    """1, 2, 4, ... below n, and n."""
    return [*(1 << place for place in range(samples.bit_length()) if 1 << place < samples), samples]


def consecutive(arms: Sequence[str]) -> list[tuple[str, str]]:
    """(right, left) of every arm and the one before it."""
    return list(zip(arms[1:], arms, strict=False))


def reasoning_table(
    arms: Mapping[str, Mapping[str, Problems]],
    comparisons: Sequence[tuple[str, str]] | None = None,
    notes: Sequence[str] = (),
    resamples: int = RESAMPLES,
) -> ReasoningTable:
    """Count, average and compare.

    Args:
        arms: by name, by benchmark. All have the same benchmarks with the same problems in the
            same order, n samples of each (`evaluation.reasoning_rows.gather` sees to it).
        comparisons: pairs (right, left) of arms; None: every arm with the one before it.
        notes: what else is to be said.
        resamples: of the intervals.

    Raises:
        DataError: an arm that is not there.
    """
    pairs = consecutive(list(arms)) if comparisons is None else comparisons
    for name in (name for pair in pairs for name in pair):
        if name not in arms:
            raise DataError(f"comparison with {name}: no such arm; allowed: {', '.join(arms)}")
    samples = next(iter(next(iter(arms.values())).values())).samples
    groups = {
        name: Groups(np.arange(len(one.of)), resamples, int(fingerprint({"problems of": name}), 16))
        for name, one in next(iter(arms.values())).items()
    }
    draws = {arm: _Draws.of(found, samples, groups) for arm, found in arms.items()}
    rows = [
        _arm_row(arm, name, one, draws[arm])
        for arm, found in arms.items()
        for name, one in found.items()
    ]
    macro = [_macro_row(arm, one) for arm, one in draws.items()]
    deltas = [row for pair in pairs for row in _delta_rows(*pair, draws)]
    return ReasoningTable(samples, resamples, rows, macro, deltas, list(notes))


class _Draws:
    """Columns of an arm, their means and their resamples: by benchmark, and the macro average.

    Attributes:
        ks: of Pass@k.
        values_PK: of every problem, by benchmark.
        mean_K, draw_DK: by benchmark, and under `MACRO`.
        determined: where there is more than one problem (in the macro average, of every benchmark).
    """

    def __init__(self, ks: Sequence[int]) -> None:
        self.ks = ks
        self.values_PK: dict[str, Floats] = {}
        self.mean_K: dict[str, Floats] = {}
        self.draw_DK: dict[str, Floats] = {}
        self.determined: dict[str, bool] = {}

    @classmethod
    def of(
        cls, found: Mapping[str, Problems], samples: int, groups: Mapping[str, Groups]
    ) -> "_Draws":
        """All benchmarks of an arm, with their resampled problems."""
        self = cls(powers_up_to(samples))
        for name, one in found.items():
            assert one.samples == samples, "all benchmarks have n samples of a problem"
            values_PK = _columns(one, self.ks)
            self.values_PK[name] = values_PK
            self.mean_K[name] = values_PK.mean(0)
            self.draw_DK[name] = groups[name].times_DG @ values_PK / len(values_PK)
            self.determined[name] = len(values_PK) > 1
        self.mean_K[MACRO] = np.mean(list(self.mean_K.values()), axis=0)
        self.draw_DK[MACRO] = np.mean(list(self.draw_DK.values()), axis=0)
        self.determined[MACRO] = all(self.determined.values())
        return self

    def value(self, name: str, column: int) -> Value:
        """A mean with the interval of its resamples."""
        mean = float(self.mean_K[name][column])
        if not self.determined[name]:
            return Value(mean, None, None)
        return Value(mean, *_ends(self.draw_DK[name][:, column]))

    def pass_at(self, name: str) -> dict[int, Value]:
        """Pass@k by k."""
        return {k: self.value(name, _FIRST_K + place) for place, k in enumerate(self.ks)}

    def minus(self, left: "_Draws", name: str, column: int) -> Change:
        """The paired difference of two arms: p is twice the smaller share of resamples on either
        side of zero, at least `least_p`."""
        value = float(self.mean_K[name][column] - left.mean_K[name][column])
        if not self.determined[name]:
            return Change(value, None, None, None)
        draws_D = self.draw_DK[name][:, column] - left.draw_DK[name][:, column]
        tail = min(float(np.mean(draws_D <= 0)), float(np.mean(draws_D >= 0)))
        least = least_p(self._differing(left, name, column), len(draws_D))
        return Change(value, *_ends(draws_D), max(min(1.0, 2 * tail), least))

    def _differing(self, left: "_Draws", name: str, column: int) -> int:
        """Problems that are not alike in both arms, of a benchmark or of all."""
        names = list(self.values_PK) if name == MACRO else [name]
        return sum(
            int(np.count_nonzero(self.values_PK[n][:, column] != left.values_PK[n][:, column]))
            for n in names
        )


def _columns(one: Problems, ks: Sequence[int]) -> Floats:
    """[P, K]: share of right samples, any right one, mean tokens, Pass@k of every k."""
    n = one.samples
    correct_P = np.array([problem.correct for problem in one.of])
    tokens_P = np.array([problem.tokens for problem in one.of])
    at_k = [[pass_at_k(n, correct, k) for correct in range(n + 1)] for k in ks]
    columns = [correct_P / n, correct_P > 0, tokens_P / n]
    return np.stack([*columns, *(np.array(table)[correct_P] for table in at_k)], axis=-1)


def _ends(draws_D: Floats) -> tuple[float, float]:
    low, high = np.quantile(draws_D, [0.025, 0.975])
    return float(low), float(high)


def _arm_row(arm: str, benchmark: str, one: Problems, draws: _Draws) -> ArmRow:
    problems, passed = len(one.of), sum(problem.correct > 0 for problem in one.of)
    choices = [problem.choices for problem in one.of if problem.choices is not None]
    return ArmRow(
        arm=arm,
        benchmark=benchmark,
        problems=problems,
        samples=problems * one.samples,
        correct=sum(problem.correct for problem in one.of),
        passed=passed,
        mean=draws.value(benchmark, _MEAN),
        any=Value(passed / problems, *wilson_interval(passed, problems)),
        tokens=draws.value(benchmark, _TOKENS),
        pass_at=draws.pass_at(benchmark),
        chance=chance_of(choices, one.samples) if len(choices) == problems else None,
    )


def _macro_row(arm: str, draws: _Draws) -> MacroRow:
    mean, passed, tokens = (draws.value(MACRO, column) for column in (_MEAN, _ANY, _TOKENS))
    return MacroRow(arm, mean, passed, tokens, draws.pass_at(MACRO))


def _delta_rows(right: str, left: str, draws: Mapping[str, _Draws]) -> list[DeltaRow]:
    ours, theirs = draws[right], draws[left]
    return [
        DeltaRow(right, left, name, *(
            ours.minus(theirs, name, column) for column in (_MEAN, _ANY, _TOKENS)
        ))
        for name in ours.mean_K
    ]  # fmt: skip
