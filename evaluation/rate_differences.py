"""Differences of two rates of right answers: paired, where the items are known, and unpaired.

The intervals are Newcombe's, made of the Wilson intervals of the two rates: they stay within
[-1, 1] and keep a width where a rate is 0 or 1. All of them are of first - second.
"""

import math
from statistics import NormalDist
from typing import NamedTuple

from data.errors import DataError
from evaluation.statistics import mcnemar_p, wilson_interval


class Pairs(NamedTuple):
    """How often two systems were right on the same items."""

    both: int
    only_first: int
    only_second: int
    neither: int


class Difference(NamedTuple):
    """first - second as a share, its 95 % interval, and the p-value of no difference."""

    value: float
    low: float
    high: float
    p: float


def paired_difference_of_rates(pairs: Pairs) -> Difference:
    """Difference with McNemar's exact p and Newcombe's interval for pairs.

    With theta = p1 - p2, (l1, u1) and (l2, u2) the Wilson intervals and phi the correlation of the
    two answers the ends are

        theta - sqrt((p1 - l1)^2 - 2 phi (p1 - l1)(u2 - p2) + (u2 - p2)^2),
        theta + sqrt((u1 - p1)^2 - 2 phi (u1 - p1)(p2 - l2) + (p2 - l2)^2)

    (Newcombe 1998, Statistics in Medicine 17:2635, method 10).

    Raises:
        DataError: no pairs, or a count below 0.
    """
    total = sum(pairs)
    if total < 1 or min(pairs) < 0:
        raise DataError(f"a difference needs pairs in counts >= 0, got {tuple(pairs)}")
    first, second = pairs.both + pairs.only_first, pairs.both + pairs.only_second
    below_1, above_1 = _arms(first, total)
    below_2, above_2 = _arms(second, total)
    phi = _correlation(pairs)
    theta = (first - second) / total
    return Difference(
        theta,
        theta - _length(below_1, above_2, phi),
        theta + _length(above_1, below_2, phi),
        mcnemar_p(pairs.only_first, pairs.only_second),
    )


def unpaired_difference_of_rates(
    first: int, first_trials: int, second: int, second_trials: int
) -> Difference:
    """Difference of two samples that have nothing to do with each other.

    The interval is Newcombe's for independent samples (1998, Statistics in Medicine 17:873, method
    10), the formula above with phi = 0; p is that of `two_rate_z`. Of two systems on the same items
    it is too cautious as a rule, because what makes an item hard does not cancel.

    Raises:
        DataError: no trials, or successes outside 0 .. trials.
    """
    below_1, above_1 = _arms(first, first_trials)
    below_2, above_2 = _arms(second, second_trials)
    theta = first / first_trials - second / second_trials
    z = two_rate_z(first, first_trials, second, second_trials)
    return Difference(
        theta,
        theta - _length(below_1, above_2, 0.0),
        theta + _length(above_1, below_2, 0.0),
        2 * NormalDist().cdf(-abs(z)),
    )


def two_rate_z(first: int, first_trials: int, second: int, second_trials: int) -> float:
    """z = (p1 - p2) / sqrt(p (1 - p) (1/n1 + 1/n2)), p the rate of both together; 0 if that is 0
    or 1."""
    rate = (first + second) / (first_trials + second_trials)
    variance = rate * (1 - rate) * (1 / first_trials + 1 / second_trials)
    difference = first / first_trials - second / second_trials
    return difference / math.sqrt(variance) if variance > 0 else 0.0


def _arms(successes: int, trials: int) -> tuple[float, float]:
    """How far a Wilson interval reaches below and above its rate."""
    low, high = wilson_interval(successes, trials)
    rate = successes / trials
    return rate - low, high - rate


def _length(first: float, second: float, phi: float) -> float:
    return math.sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def _correlation(pairs: Pairs) -> float:
    """phi of the two answers, its numerator drawn to 0 by half the number of pairs if positive;
    0 where one of the systems is always right or always wrong."""
    a, b, c, d = pairs
    margins = (a + b) * (c + d) * (a + c) * (b + d)
    if margins == 0:
        return 0.0
    product: float = a * d - b * c
    if product > 0:
        product = max(product - sum(pairs) / 2, 0.0)
    return product / math.sqrt(margins)
