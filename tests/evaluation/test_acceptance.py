"""Acceptance numbers of answers written by hand."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from evaluation.acceptance import Answer, measure, per_prompt, read_answer
from evaluation.statistics import wilson_interval


def answer(name, accepted, *, last=None, drafted=15, **more):
    """An answer whose cycles committed these numbers of tokens."""
    row = {
        "id": name, "benchmark": "gsm8k", "tokens": 1 + sum(accepted), "cycles": len(accepted),
        "accepted": list(accepted), "drafted": drafted, "finish": "stop", "degenerate": False,
        "last_uncut": last or (accepted[-1] if accepted else None),
    }  # fmt: skip
    return read_answer(row | more, "here")


def test_pooled_is_not_macro():
    """An easy short answer and a hard long one: (16 + 12) / (1 + 12) and (16 / 1 + 12 / 12) / 2."""
    found = measure([answer("easy", [16]), answer("hard", [1] * 12)])
    assert found.tau == pytest.approx(28 / 13) and found.tau_macro == pytest.approx(8.5)
    assert found.tau_served == pytest.approx(30 / 13)
    assert (found.prompts, found.answers, found.tokens, found.cycles) == (2, 2, 30, 13)
    assert found.tau_low == pytest.approx(1.0) and found.tau_high == pytest.approx(16.0)


def test_published_pooled_ratio():
    """39253 tokens in 6428 cycles are 6.107 (z-lab dflash issue 119, gsm8k)."""
    one = dataclasses.replace(answer("a", []), tokens=39254, cycles=6428, accepted=None)
    assert measure([one]).tau == pytest.approx(6.107, abs=5e-4)


def test_positions_and_histogram():
    """Cycles of 1, 3, 3 and 4 tokens with K = 3: 0, 2, 2 and 3 drafts accepted."""
    found = measure([answer("a", [1, 3], drafted=3), answer("b", [3, 4], drafted=3)])
    assert found.ceiling == 4 and found.histogram == [1, 0, 2, 1]
    assert [(s.reached, s.accepted) for s in found.slots] == [(4, 3), (3, 3), (3, 1)]
    assert [s.conditional for s in found.slots] == pytest.approx([3 / 4, 1.0, 1 / 3])
    assert [s.cumulative for s in found.slots] == pytest.approx([3 / 4, 3 / 4, 1 / 4])
    ends = [(s.conditional_low, s.conditional_high) for s in found.slots]
    assert ends == [wilson_interval(3, 4), wilson_interval(3, 3), wilson_interval(1, 3)]
    assert 1 + sum(s.cumulative for s in found.slots) == pytest.approx(found.tau)


def test_what_is_behind_a_cut_is_not_known():
    """A last cycle cut from 4 to 2 tokens shows two accepted drafts and nothing of the third."""
    found = measure([answer("a", [1, 2], last=4, drafted=3)])
    assert [(s.reached, s.accepted) for s in found.slots] == [(2, 1), (1, 1), (0, 0)]
    assert found.slots[2].conditional is found.slots[2].cumulative is None
    assert found.histogram == [1, 0, 0, 1]
    assert (found.tau, found.tau_uncut) == (1.5, 2.5)


def test_answers_without_a_cycle_are_counted_and_in_no_rate():
    found = measure([answer("a", []), answer("b", [2, 2])])
    assert (found.without_cycles, found.answers, found.tau, found.tau_macro) == (1, 2, 2.0, 2.0)
    assert measure([answer("a", [])]).tau is None


def test_loops_are_counted_and_can_be_left_out():
    looping = answer("loop", [16] * 8, degenerate=True, finish="length")
    found = measure([looping, answer("a", [2] * 8)])
    assert found.tau == 9.0 and found.tau_without_degenerate == 2.0
    assert found.degenerate == found.capped == 1
    assert found.degenerate_low < 0.5 < found.degenerate_high


def test_turns_of_a_prompt_are_resampled_together():
    turns = [answer("a", [3], turn=0), answer("a", [1, 2], turn=1), answer("b", [5])]
    assert per_prompt(turns) == {("gsm8k", "a"): (6, 3), ("gsm8k", "b"): (5, 1)}
    found = measure(turns)
    assert (found.prompts, found.answers) == (2, 3)
    assert found.tau_macro == pytest.approx((3 + 1.5 + 5) / 3)
    assert (found.tau_low, found.tau_high) == (2.0, 5.0)
    assert measure(turns[:2]).tau_low is None, "one prompt has no interval"


def test_interval_covers_like_the_spread_of_independent_samples():
    """The bootstrap's interval has about the width of the sampling distribution itself."""
    rng = np.random.default_rng(0)

    def sample():
        lengths = [rng.integers(1, 17, size=rng.integers(1, 9)).tolist() for _ in range(60)]
        return [answer(str(place), row) for place, row in enumerate(lengths)]

    spread = np.std([measure(sample(), resamples=2).tau for _ in range(200)])
    found = measure(sample())
    assert (found.tau_high - found.tau_low) / (2 * 1.96) == pytest.approx(spread, rel=0.3)
    assert found.tau_low < found.tau < found.tau_high
    answers = sample()
    assert measure(answers, seed=3) == measure(answers, seed=3)
    assert measure(answers, seed=3) != measure(answers, seed=4)


@given(
    st.integers(1, 15).flatmap(
        lambda drafted: st.tuples(
            st.just(drafted),
            st.lists(st.lists(st.integers(1, drafted + 1), max_size=9), min_size=1, max_size=6),
        )
    )
)
def test_tau_is_between_1_and_the_block(drafted_and_rows):
    drafted, rows = drafted_and_rows
    found = measure([answer(str(i), row, drafted=drafted) for i, row in enumerate(rows)], 10)
    cycles = sum(map(len, rows))
    assert found.cycles == cycles == sum(found.histogram) == found.slots[0].reached
    if cycles:
        assert 1 <= found.tau <= found.ceiling == drafted + 1
        assert 1 + sum(slot.cumulative for slot in found.slots) == pytest.approx(found.tau)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": 10}, "10 tokens in 2 cycles; a cycle gives 1 to 4, the prefill 1"),
        ({"tokens": 6}, "accepted lengths do not sum to 5 in 2 cycles"),
        ({"accepted": [5, 1]}, "do not sum to 4"),
        ({"accepted": [0, 4]}, r"outside 1 \.\. 4"),
        ({"last_uncut": 1}, r"last_uncut=1: allowed 2 \.\. 4"),
        ({"last_uncut": None}, "last_uncut=None"),
        ({"drafted": 0}, "must be at least 1"),
        ({"cycles": "many"}, r"not a row of acceptance\.jsonl"),
        ({"accepted": 3}, r"not a row of acceptance\.jsonl"),
    ],
)
def test_rows_that_contradict_themselves_are_refused(change, message):
    row = {
        "id": "a", "benchmark": "b", "tokens": 5, "cycles": 2, "accepted": [2, 2], "drafted": 3,
        "last_uncut": 3, "finish": "stop", "degenerate": False,
    }  # fmt: skip
    assert isinstance(read_answer(row, "file:1"), Answer)
    with pytest.raises(DataError, match=f"file:1: .*{message}"):
        read_answer(row | change, "file:1")


def test_no_answers_and_two_drafts_are_refused():
    with pytest.raises(DataError, match="at least 1 answer"):
        measure([])
    with pytest.raises(DataError, match=r"\[3, 15\] drafted tokens"):
        measure([answer("a", [1]), answer("b", [1], drafted=3)])
