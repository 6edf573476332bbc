"""Intervals and standard errors for the numbers that are reported."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError

# One number per row.
Values = Sequence[float] | NDArray[np.float64]


class Interval(NamedTuple):
    """A confidence interval."""

    low: float
    high: float


class Estimate(NamedTuple):
    """A value and its standard error (nan where a single row leaves it undetermined)."""

    value: float
    standard_error: float


class MeanEstimate(NamedTuple):
    """A mean, the standard deviation of its rows, an interval, and the number of rows.

    A single row leaves deviation and interval undetermined: nan.
    """

    value: float
    deviation: float
    low: float
    high: float
    rows: int


class RatioEstimate(NamedTuple):
    """A ratio of sums, its bootstrap standard error and percentile interval."""

    value: float
    standard_error: float
    low: float
    high: float


def wilson_interval(successes: float, trials: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a rate (Wilson 1927).

    With p = successes / trials, n = trials and z the normal quantile its ends are

        (p + z^2 / 2n  -+  z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n).

    It stays within [0, 1] and keeps a width where no trial, or every trial, succeeds. A tie counts
    as half a success.

    Raises:
        DataError: no trials, or successes outside 0 .. trials.
    """
    if trials < 1 or not 0 <= successes <= trials:
        raise DataError(f"a rate needs 0 <= successes <= trials, got {successes} of {trials}")
    z = _normal_quantile(confidence)
    rate = successes / trials
    scale = 1.0 + z * z / trials
    centre = (rate + z * z / (2 * trials)) / scale
    spread = math.sqrt(rate * (1 - rate) / trials + z * z / (4 * trials * trials))
    half_width = z * spread / scale
    # At the ends the interval touches 0 or 1 exactly, which rounding would miss.
    low = 0.0 if successes == 0 else centre - half_width
    high = 1.0 if successes == trials else centre + half_width
    return Interval(low, high)


def mcnemar_p(only_first: int, only_second: int) -> float:
    """Two-sided exact p-value of McNemar's test for paired yes-or-no answers (McNemar 1947).

    Of the n = b + c pairs on which two systems differ, b went to the first alone. If both are
    equally good, b is binomial(n, 1/2), so with m = min(b, c)

        p = min(1, 2 sum_{k <= m} C(n, k) / 2^n).

    Exact for any n, in whole numbers; never smaller than the mid-p variant. Without a pair that
    differs it is 1.

    Args:
        only_first: b, pairs that the first alone got right.
        only_second: c, pairs that the second alone got right.

    Raises:
        DataError: a count below 0.
    """
    if min(only_first, only_second) < 0:
        raise DataError(f"counts of pairs must be >= 0, got {only_first} and {only_second}")
    pairs = only_first + only_second
    ways = sum(math.comb(pairs, k) for k in range(min(only_first, only_second) + 1))
    # Of whole numbers: the quotient is right even where neither fits into a float.
    return min(1.0, 2 * ways / 2**pairs)


def mean_and_standard_error(values: Values) -> Estimate:
    """Mean of independent rows and its standard error s / sqrt(n), s^2 with denominator n - 1.

    Raises:
        DataError: there are no rows.
    """
    rows = np.asarray(values, dtype=np.float64)
    if rows.size == 0:
        raise DataError("a mean needs at least 1 row, got 0")
    if rows.size == 1:
        return Estimate(float(rows[0]), math.nan)
    return Estimate(float(rows.mean()), float(rows.std(ddof=1) / math.sqrt(rows.size)))


def mean_interval(values: Values, confidence: float = 0.95) -> MeanEstimate:
    """Mean of a few independent rows, such as seeds, with Student's interval (Student 1908).

    mean -+ t s / sqrt(n), t the quantile with n - 1 degrees of freedom. Exact for normal rows; with
    two or three of them it is wide, and rightly so.

    Raises:
        DataError: there are no rows.
    """
    mean, error = mean_and_standard_error(values)
    rows = len(values)
    if rows < 2:
        return MeanEstimate(mean, math.nan, math.nan, math.nan, rows)
    half_width = student_quantile(rows - 1, confidence) * error
    deviation = error * math.sqrt(rows)
    return MeanEstimate(mean, deviation, mean - half_width, mean + half_width, rows)


def student_quantile(freedom: int, confidence: float) -> float:
    """Half width, in standard errors, of the central interval of Student's t.

    The t with P(|T| <= t) = confidence, by bisection of the closed form for whole degrees of
    freedom (Abramowitz and Stegun 1964, 26.7.3 and 26.7.4).
    """
    assert freedom >= 1 and 0 < confidence < 1
    low, high = 0.0, 1.0
    while _student_coverage(high, freedom) < confidence:
        high *= 2
    for _ in range(100):
        middle = (low + high) / 2
        inside = _student_coverage(middle, freedom) < confidence
        low, high = (middle, high) if inside else (low, middle)
    return high


def _student_coverage(t: float, freedom: int) -> float:
    """P(|T| <= t) with theta = atan(t / sqrt(freedom)).

    Even degrees of freedom: sin theta (1 + 1/2 cos^2 + (1 3)/(2 4) cos^4 + ...), the last power
    being freedom - 2. Odd ones: 2/pi (theta + sin theta (cos + 2/3 cos^3 + (2 4)/(3 5) cos^5 ...)).
    """
    theta = math.atan(t / math.sqrt(freedom))
    odd = freedom % 2
    term, total = math.cos(theta) if odd else 1.0, 0.0
    for power in range(odd, freedom - 1, 2):
        total += term
        term *= math.cos(theta) ** 2 * (power + 1) / (power + 2)
    total *= math.sin(theta)
    return 2 / math.pi * (theta + total) if odd else total


def paired_difference(first: Values, second: Values) -> Estimate:
    """Mean of first - second over rows that both systems scored, with its standard error.

    Raises:
        DataError: the two do not have the same number of rows, or none.
    """
    if len(first) != len(second):
        raise DataError(f"paired rows must match in number, got {len(first)} and {len(second)}")
    return mean_and_standard_error(np.subtract(first, second))


def ratio_with_standard_error(numerators: Values, denominators: Values) -> Estimate:
    """Ratio of sums over independent rows, r = sum(a) / sum(b), with its linearised error.

    se^2 = n / (n - 1) * sum (a_i - r b_i)^2 / (sum b)^2, the delta method: as `bootstrap_ratio`
    without the resampling, good enough for hundreds of rows and cheap enough for every validation.

    Raises:
        DataError: no rows, rows that do not match in number, or no denominator at all.
    """
    above = np.asarray(numerators, dtype=np.float64)
    below = np.asarray(denominators, dtype=np.float64)
    if above.shape != below.shape or above.size == 0 or not below.sum() > 0:
        raise DataError(
            f"a ratio needs matching rows with a positive total, got {above.size} and {below.size}"
            f" rows with total {below.sum()}"
        )
    ratio = float(above.sum() / below.sum())
    if above.size == 1:
        return Estimate(ratio, math.nan)
    squares = float(((above - ratio * below) ** 2).sum())
    correction = above.size / (above.size - 1)
    return Estimate(ratio, math.sqrt(correction * squares) / float(below.sum()))


def bootstrap_ratio(
    numerators: Values,
    denominators: Values,
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> RatioEstimate:
    """Ratio of sums over rows, such as nats per token, with a bootstrap over the rows.

    The rows, not the tokens in them, are independent, and numerator and denominator of a row are
    drawn together (Efron 1979, percentile interval).

    Args:
        numerators: one value per row.
        denominators: one positive value per row.
        num_resamples: number of resampled data sets; at least 2.
        confidence: coverage of the interval, between 0 and 1.
        seed: determines the resampling.

    Raises:
        DataError: no rows, rows that do not match in number, or a denominator that is not positive.
    """
    above = np.asarray(numerators, dtype=np.float64)
    below = np.asarray(denominators, dtype=np.float64)
    if above.shape != below.shape or above.size == 0:
        raise DataError(f"a ratio needs matching rows, got {above.size} and {below.size}")
    if not np.all(below > 0):
        row = int(np.argmin(below > 0))
        raise DataError(f"denominator of row {row} is {below[row]}, must be positive")
    assert num_resamples >= 2 and 0 < confidence < 1
    rng = np.random.Generator(np.random.Philox(key=seed))
    # One resample at a time keeps the memory linear in the number of rows.
    picks = (rng.integers(0, above.size, above.size) for _ in range(num_resamples))
    ratios = np.array([above[pick].sum() / below[pick].sum() for pick in picks])
    low, high = np.quantile(ratios, [(1 - confidence) / 2, (1 + confidence) / 2])
    value = float(above.sum() / below.sum())
    return RatioEstimate(value, float(ratios.std(ddof=1)), float(low), float(high))


def bootstrap_interval(
    rows: Sequence[Sequence[float]],
    statistic: Callable[[NDArray[np.float64]], NDArray[np.float64]],
    num_resamples: int = 1000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Interval:
    """Percentile interval of a function of the sums of several columns, over resampled rows.

    What belongs to a row is drawn together (Efron 1979), so a ratio of ratios keeps what its parts
    have in common.

    Args:
        rows: the columns of every row.
        statistic: of the sums [resamples, columns], one value each.
        num_resamples: number of resampled data sets; at least 2.
        confidence: coverage of the interval, between 0 and 1.
        seed: determines the resampling.

    Raises:
        DataError: no rows.
    """
    table = np.asarray(rows, dtype=np.float64)
    if table.size == 0:
        raise DataError("an interval needs at least 1 row, got 0")
    assert num_resamples >= 2 and 0 < confidence < 1
    rng = np.random.Generator(np.random.Philox(key=seed))
    picks = (rng.integers(0, len(table), len(table)) for _ in range(num_resamples))
    values = statistic(np.array([table[pick].sum(0) for pick in picks]))
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def _normal_quantile(confidence: float) -> float:
    """Half width, in standard deviations, of the central interval of a normal distribution."""
    assert 0 < confidence < 1
    return NormalDist().inv_cdf((1 + confidence) / 2)
