"""Differences of rates against published values, simulation, and what must hold of them."""

import math
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from evaluation.rate_differences import (
    Pairs,
    paired_difference_of_rates,
    two_rate_z,
    unpaired_difference_of_rates,
)
from evaluation.statistics import mcnemar_p

COUNTS = st.integers(0, 60)


@pytest.mark.parametrize(
    ("only_first", "only_second", "p"),
    [
        (7, 1, 2 * (1 + 8) / 2**8),
        (1, 7, 2 * (1 + 8) / 2**8),
        (5, 0, 2 / 2**5),
        (10, 3, 2 * (1 + 13 + 78 + 286) / 2**13),
        (3, 3, 1.0),
        (4, 3, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemar_by_hand(only_first, only_second, p):
    assert mcnemar_p(only_first, only_second) == pytest.approx(p, rel=1e-12)


def test_mcnemar_is_the_share_of_coins_that_are_as_uneven():
    for b, c in [(2, 7), (6, 4), (9, 0)]:
        tosses = [abs(2 * sum(coins) - (b + c)) for coins in product((0, 1), repeat=b + c)]
        share = sum(toss >= abs(b - c) for toss in tosses) / len(tosses)
        assert mcnemar_p(b, c) == pytest.approx(share, rel=1e-12)


def test_mcnemar_of_many_pairs_is_normal():
    b, c = 2600, 2400
    z = (abs(b - c) - 1) / math.sqrt(b + c)
    assert mcnemar_p(b, c) == pytest.approx(math.erfc(z / math.sqrt(2)), rel=0.01)
    assert 0.0 < mcnemar_p(700, 300) < 1e-30
    with pytest.raises(DataError, match="got -1 and 2"):
        mcnemar_p(-1, 2)


@pytest.mark.parametrize(
    ("pairs", "low", "high"),
    # Newcombe (1998), Statistics in Medicine 17:2635, method 10.
    [((36, 12, 2, 0), 0.0569, 0.3404)],
)
def test_paired_interval_equals_published_values(pairs, low, high):
    found = paired_difference_of_rates(Pairs(*pairs))
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


def test_unpaired_interval_equals_published_values():
    """Newcombe (1998), Statistics in Medicine 17:873, table II, method 10."""
    found = unpaired_difference_of_rates(56, 70, 48, 80)
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    found = unpaired_difference_of_rates(9, 10, 3, 10)
    assert (found.low, found.high) == pytest.approx((0.1705, 0.8090), abs=5e-5)


def test_z_by_hand():
    """Rates 0.6 and 0.4 of 100: together 0.5, variance 0.25 * 0.02."""
    assert two_rate_z(60, 100, 40, 100) == pytest.approx(0.2 / math.sqrt(0.005))
    assert unpaired_difference_of_rates(60, 100, 40, 100).p == pytest.approx(0.004678, abs=1e-6)
    assert two_rate_z(5, 5, 7, 7) == two_rate_z(0, 5, 0, 7) == 0.0


@given(both=COUNTS, first=COUNTS, second=COUNTS, neither=COUNTS)
def test_what_holds_of_every_difference(both, first, second, neither):
    pairs = Pairs(both, first, second, neither)
    if not sum(pairs):
        return
    found = paired_difference_of_rates(pairs)
    assert found.value == pytest.approx((first - second) / sum(pairs))
    assert -1 - 1e-12 <= found.low <= found.value <= found.high <= 1 + 1e-12
    swapped = paired_difference_of_rates(Pairs(both, second, first, neither))
    assert (swapped.low, swapped.high) == pytest.approx((-found.high, -found.low), abs=1e-12)
    assert swapped.p == found.p
    total = sum(pairs)
    unpaired = unpaired_difference_of_rates(both + first, total, both + second, total)
    # Items that are hard for both make the paired interval no wider.
    if both * neither >= first * second:
        assert found.high - found.low <= unpaired.high - unpaired.low + 1e-12


def test_the_paired_interval_covers_what_it_says():
    """2,000 draws of 200 items with rates 0.8 and 0.7 that go together."""
    rng = np.random.Generator(np.random.Philox(key=3))
    shares = [0.65, 0.15, 0.05, 0.15]
    draws = rng.multinomial(200, shares, 2000)
    found = [paired_difference_of_rates(Pairs(*map(int, draw))) for draw in draws]
    covered = np.mean([one.low <= 0.10 <= one.high for one in found])
    assert 0.935 < covered < 0.975


@pytest.mark.parametrize("pairs", [(0, 0, 0, 0), (1, -1, 2, 0)])
def test_impossible_pairs(pairs):
    with pytest.raises(DataError, match="a difference needs pairs"):
        paired_difference_of_rates(Pairs(*pairs))
