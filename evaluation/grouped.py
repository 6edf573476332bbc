"""Means over blocks with intervals that draw whole groups of them.

Blocks of one row or document depend on each other, so the bootstrap draws groups: 95 %, percentile
(Efron 1979). The draws are made once and shared, so whatever is measured of the same blocks is
paired, and numerator and denominator of a ratio stay together.

Legend: M blocks, G groups, D resamples, K columns.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

RESAMPLES = 2000
# Sums of rates may differ by rounding.
_EQUAL = 1e-12


class Measure(NamedTuple):
    """A mean, its 95 % interval, and the number it is a mean over.

    The value is None where there is nothing to count, the interval where there is one group.
    """

    value: float | None
    low: float | None
    high: float | None
    over: float


class Groups:
    """Resampled groups of blocks, shared by all measures of them.

    Args:
        group_M: of every block.
        resamples: how often the groups are drawn.
        seed: of the draws.
    """

    def __init__(self, group_M: Ints, resamples: int = RESAMPLES, seed: int = 0) -> None:
        names, self._place_M = np.unique(group_M, return_inverse=True)
        self.number = len(names)
        rng = np.random.Generator(np.random.Philox(key=seed))
        even = np.full(self.number, 1 / self.number)
        self.times_DG = rng.multinomial(self.number, even, resamples).astype(np.float64)

    def sums(self, values_MK: Floats) -> Floats:
        """[G, K] of columns of numbers per block."""
        sums_GK = np.zeros((self.number, values_MK.shape[1]))
        np.add.at(sums_GK, self._place_M, values_MK)
        return sums_GK

    def times_of_blocks(self, resample: int) -> Floats:
        """[M] how often a resample has every block."""
        return self.times_DG[resample][self._place_M]

    def interval(self, draws_D: Floats) -> tuple[float | None, float | None]:
        """Of a statistic's resamples; those in which it has no value (nan) are left out."""
        kept = draws_D[~np.isnan(draws_D)]
        if self.number < 2 or not len(kept):
            return None, None
        low, high = np.quantile(kept, [0.025, 0.975])
        return float(low), float(high)

    def ratio(self, numerator_M: NDArray, denominator_M: NDArray | None = None) -> Measure:
        """sum a / sum b over blocks; b = 1 for each where it is not given."""
        return self.measure(*self._ratio_draws(numerator_M, denominator_M))

    def measure(self, value: float, draws_D: Floats, over: float) -> Measure:
        """A value and its resamples as a measure."""
        return Measure(None if math.isnan(value) else value, *self.interval(draws_D), over)

    def _ratio_draws(
        self, numerator_M: NDArray, denominator_M: NDArray | None = None
    ) -> tuple[float, Floats, float]:
        if denominator_M is None:
            denominator_M = np.ones(len(numerator_M))
        sums_G2 = self.sums(np.stack([numerator_M, denominator_M], axis=-1).astype(np.float64))
        sums_2 = sums_G2.sum(0)
        return float(quotient(*sums_2)), quotient(*(self.times_DG @ sums_G2).T), float(sums_2[1])

    def difference(
        self, first_M: NDArray, second_M: NDArray, denominator_M: NDArray | None = None
    ) -> tuple[Measure, float | None]:
        """A paired difference, sum (a - b) / sum d over blocks, and its p-value.

        d = 1 for each where it is not given: a mean. p is twice the smaller share of resamples on
        either side of zero, at least `least_p`; None for one group. Resamples in which nothing is
        below are left out.
        """
        difference_M = first_M.astype(np.float64) - second_M.astype(np.float64)
        differing = int(np.count_nonzero(np.abs(self.sums(difference_M[:, None])) > _EQUAL))
        value, draws_D, over = self._ratio_draws(difference_M, denominator_M)
        measure = self.measure(value, draws_D, over)
        kept_D = draws_D[~np.isnan(draws_D)]
        if self.number < 2 or not len(kept_D):
            return measure, None
        tail = min(float(np.mean(kept_D <= 0)), float(np.mean(kept_D >= 0)))
        return measure, max(min(1.0, 2 * tail), least_p(differing, len(kept_D)))


def least_p(differing: int, resamples: int) -> float:
    """No p-value of a paired difference is below this, however alike the groups are.

    max(1 / D, 2^(1 - m)): D resamples show no smaller share, and of m groups that differ at all the
    signs have 2^m equally likely patterns without a difference, of which two are the most extreme
    (Fisher's sign-flip test, two-sided). Resamples alone call two groups out of two certain.
    """
    return min(1.0, max(1 / resamples, 2.0 ** (1 - differing)))


def quotient(above: NDArray | float, below: NDArray | float) -> Floats:
    """above / below; nan where nothing is below."""
    under = np.asarray(below, dtype=np.float64)
    return np.divide(above, under, out=np.full(under.shape, np.nan), where=under != 0)
