"""Schedules rise to their peak, fall from it, and stay at the floor, whatever the step."""

from functools import partial

import pytest
from hypothesis import given
from hypothesis import strategies as st

from objectives.schedules import constant_warmup, cosine_warmup, linear_warmup

FALLING = (cosine_warmup, linear_warmup)


@given(st.integers(1, 200), st.integers(0, 250), st.floats(0, 1))
def test_up_then_down_then_level(total, warmup, floor):
    """Also with a warm-up longer than the run, and for steps beyond its end."""
    schedules = [partial(constant_warmup, warmup_steps=warmup)]
    schedules += [partial(f, warmup_steps=warmup, floor=floor) for f in FALLING]
    for schedule in schedules:
        factors = [schedule(step, total) for step in range(total + 50)]
        peak = factors.index(max(factors))
        assert factors[: peak + 1] == sorted(factors[: peak + 1])
        assert factors[peak:] == sorted(factors[peak:], reverse=True)
        assert factors[0] > 0 and factors[peak] <= 1


@pytest.mark.parametrize("schedule", FALLING)
def test_floor_at_the_end_and_beyond(schedule):
    schedule = partial(schedule, warmup_steps=10, floor=0.1)
    assert schedule(9, 100) == schedule(10, 100) == 1.0
    assert schedule(99, 100) > 0.1
    for step in (100, 101, 1000, 10**9):
        assert schedule(step, 100) == pytest.approx(0.1)


def test_values_by_hand():
    assert [constant_warmup(s, 9, warmup_steps=4) for s in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert linear_warmup(55, 100, warmup_steps=10) == pytest.approx(0.5)
    assert cosine_warmup(55, 100, warmup_steps=10) == pytest.approx(0.5)
    assert cosine_warmup(25, 100, warmup_steps=0) == pytest.approx(0.5 + 0.5**1.5)
    assert constant_warmup(0, 1, warmup_steps=0) == 1
