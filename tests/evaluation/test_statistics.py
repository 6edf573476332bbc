"""Intervals and standard errors against hand computation and published values."""

import math

import numpy as np
import pytest

from data.errors import DataError
from evaluation.statistics import (
    bootstrap_ratio,
    mean_and_standard_error,
    mean_interval,
    paired_difference,
    ratio_with_standard_error,
    student_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("successes", "trials", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3.
    [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_equals_published_values(successes, trials, low, high):
    assert wilson_interval(successes, trials) == pytest.approx((low, high), abs=5e-5)


def test_wilson_interval_holds_the_rates_that_a_score_test_accepts():
    z = 1.959963984540054
    for successes, trials in [(0, 7), (3, 7), (7, 7)]:
        low, high = wilson_interval(successes, trials)
        for rate in (low, high):
            gap = abs(successes / trials - rate)
            assert gap == pytest.approx(z * math.sqrt(rate * (1 - rate) / trials), abs=1e-12)
        assert 0 <= low <= successes / trials <= high <= 1


@pytest.mark.parametrize(("successes", "trials"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(successes, trials):
    with pytest.raises(DataError, match=f"got {successes} of {trials}"):
        wilson_interval(successes, trials)


def test_mean_and_standard_error_by_hand():
    # Squared deviations 4 + 1 + 0 + 1 + 4 = 10, variance 10 / 4, standard error sqrt(2.5 / 5).
    assert mean_and_standard_error([1, 2, 3, 4, 5]) == pytest.approx((3.0, math.sqrt(0.5)))
    single = mean_and_standard_error([4.0])
    assert single.value == 4.0 and math.isnan(single.standard_error)
    with pytest.raises(DataError, match="got 0"):
        mean_and_standard_error([])


# Fisher and Yates (1963), table III, two-sided.
@pytest.mark.parametrize(
    ("freedom", "confidence", "quantile"),
    [
        (1, 0.95, 12.706), (2, 0.95, 4.303), (3, 0.95, 3.182), (4, 0.95, 2.776), (5, 0.9, 2.015),
        (10, 0.99, 3.169), (30, 0.95, 2.042), (120, 0.95, 1.980), (1, 0.5, 1.000),
    ],
)  # fmt: skip
def test_student_quantiles_equal_published_ones(freedom, confidence, quantile):
    assert student_quantile(freedom, confidence) == pytest.approx(quantile, abs=6e-4)


def test_student_becomes_normal():
    assert student_quantile(20_000, 0.95) == pytest.approx(1.959964, abs=2e-4)


def test_interval_of_a_mean_by_hand():
    """1, 2, 3: s = 1, t(2) = 4.3027, half width 4.3027 / sqrt(3)."""
    found = mean_interval([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert found == pytest.approx((2.0, 1.0, 2 - half, 2 + half, 3), rel=1e-6)
    single = mean_interval([5.0])
    assert single.value == 5.0 and single.rows == 1
    assert all(map(math.isnan, (single.deviation, single.low, single.high)))
    with pytest.raises(DataError, match="got 0"):
        mean_interval([])


def test_paired_difference_ignores_what_the_pairs_share():
    shared = np.array([10.0, -50.0, 200.0, 0.0])
    estimate = paired_difference(shared + np.array([1.0, 2.0, 1.0, 2.0]), shared)
    assert estimate == pytest.approx((1.5, math.sqrt((1 / 3) / 4)))
    with pytest.raises(DataError, match="got 2 and 1"):
        paired_difference([1.0, 2.0], [1.0])


def test_bootstrap_ratio_agrees_with_the_delta_method():
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 30, size=400).astype(float)
    nats = 2.5 * tokens + rng.normal(size=400) * 3
    ratio = nats.sum() / tokens.sum()
    expected_error = (nats - ratio * tokens).std(ddof=1) / math.sqrt(400) / tokens.mean()
    estimate = bootstrap_ratio(nats, tokens, num_resamples=2000)
    assert estimate.value == pytest.approx(ratio)
    assert estimate.standard_error == pytest.approx(expected_error, rel=0.08)
    assert estimate.low == pytest.approx(ratio - 1.96 * expected_error, abs=0.3 * expected_error)
    assert estimate.high == pytest.approx(ratio + 1.96 * expected_error, abs=0.3 * expected_error)
    assert estimate == bootstrap_ratio(nats, tokens, num_resamples=2000)
    assert estimate != bootstrap_ratio(nats, tokens, num_resamples=2000, seed=1)


def test_bootstrap_ratio_of_proportional_rows_has_no_spread():
    estimate = bootstrap_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], num_resamples=50)
    assert estimate == pytest.approx((2.0, 0.0, 2.0, 2.0), abs=1e-12)


def test_bootstrap_ratio_names_a_bad_row():
    with pytest.raises(DataError, match=r"row 1 is 0\.0"):
        bootstrap_ratio([1.0, 1.0], [1.0, 0.0])
    with pytest.raises(DataError, match="matching rows, got 1 and 2"):
        bootstrap_ratio([1.0], [1.0, 2.0])


def test_linearised_ratio_agrees_with_the_bootstrap():
    """Same ratio, and a standard error within the bootstrap's own noise."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(5, 30, 400).astype(float)
    nats = tokens * 2.5 + rng.normal(0, 6, 400)
    exact = ratio_with_standard_error(nats, tokens)
    resampled = bootstrap_ratio(nats, tokens, num_resamples=2000)
    assert exact.value == pytest.approx(resampled.value, rel=1e-12)
    assert exact.standard_error == pytest.approx(resampled.standard_error, rel=0.08)


def test_linearised_ratio_of_equal_denominators_is_a_mean():
    """By hand: rows 1, 2, 3 over 1 each have mean 2 and standard error 1 / sqrt(3)."""
    assert ratio_with_standard_error([1, 2, 3], [1, 1, 1]) == pytest.approx((2, 3**-0.5))
    assert math.isnan(ratio_with_standard_error([1], [2]).standard_error)
    with pytest.raises(DataError, match="a ratio needs matching rows with a positive total"):
        ratio_with_standard_error([], [])
