"""Which texts count as looping: hand examples, a slow reference, and what must pass."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from evaluation.degeneration import (
    Loop,
    LoopRule,
    find_loop,
    is_degenerate,
    repeated_share,
)

SENTENCE = "the answer follows from the sum of the first and the second part"
PLAIN = tuple(SENTENCE.split())
SMALL = LoopRule(repeats=3, span=6, least_ngrams=1000)


@pytest.mark.parametrize(
    ("tokens", "loop"),
    [
        ([5, 6, 7] + [1] * 32, Loop(1, 32)),
        ([5, 6, 7] + [1] * 31, None),
        ([9] + [1, 2, 3] * 11, Loop(3, 33)),
        ([9] + [1, 2, 3] * 10 + [1, 2], Loop(3, 32)),
        ([9] + [1, 2, 3] * 10 + [1], None),
        (list(range(20)) * 4, Loop(20, 80)),
        (list(range(20)) * 4 + [99], Loop(20, 80)),
        (list(range(16)) * 4 + [99, 98], None),
        ([7, *list(range(20)) * 3], None),
        ([], None),
        ([1], None),
        ([*PLAIN, *["so", "it", "is"] * 20], Loop(3, 60)),
    ],
)
def test_loops_by_hand(tokens, loop):
    assert find_loop(tokens) == loop
    assert is_degenerate(tokens) == (loop is not None)


def test_the_smallest_period_is_named():
    assert find_loop([1, 1, 2] * 20).period == 3
    assert find_loop([4] * 40).period == 1


def test_share_of_repeated_ngrams_by_hand():
    # ab bc cd da ab: four distinct ones of five
    assert repeated_share(list("abcdab"), 2) == pytest.approx(0.2)
    assert repeated_share(list("abcd"), 2) == 0.0
    assert repeated_share(list("a"), 2) == 0.0


def counted(steps):
    """A loop that counts: no exact period."""
    return [word for step in range(steps) for word in ["Step", str(step), *PLAIN]]


def test_a_loop_that_counts_is_found_by_its_ngrams():
    text = counted(20)
    assert find_loop(text) is None and is_degenerate(text)
    # New only once: the 9 5-grams inside PLAIN (of 20 steps), and its last four words with "Step"
    # (of 19).
    assert repeated_share(text, 5) == pytest.approx((19 * 9 + 18) / (20 * 15 - 4))


def test_a_short_text_is_not_judged_by_its_ngrams():
    assert not is_degenerate(counted(4))


@pytest.mark.parametrize(
    "text",
    [
        "| --- | --- | --- | --- | --- |",
        "10 ^ 12 = 1 0 0 0 0 0 0 0 0 0 0 0 0",
        " ".join(f"{n} times 7 is {7 * n}" for n in range(30)),
        "Yes .",
    ],
)
def test_what_answers_rightly_repeat(text):
    assert not is_degenerate(text.split())


def slow_loop(tokens):
    """The definition of SMALL, copy by copy."""
    for ending in (tokens, tokens[:-1]):
        for period in range(1, len(ending) + 1):
            span = period
            while span < len(ending) and ending[-span - 1] == ending[period - span - 1]:
                span += 1
            if span >= 3 * period and span >= 6:
                return Loop(period, span)
    return None


TOKENS = st.lists(st.integers(0, 2), max_size=30)


@given(TOKENS)
def test_equals_the_slow_reference(tokens):
    assert find_loop(tokens, SMALL) == slow_loop(tokens)


@given(TOKENS, st.lists(st.integers(0, 5), min_size=1, max_size=10), st.integers(4, 9))
def test_whatever_precedes_a_loop_it_is_found(before, period, copies):
    assert find_loop(before + period * copies * 8) is not None


@given(st.lists(st.integers(), unique=True, max_size=200))
def test_text_without_repetition_is_never_degenerate(tokens):
    assert not is_degenerate(tokens)
    assert repeated_share(tokens, 3) == 0.0


@pytest.mark.parametrize(
    "options", [{"repeats": 1}, {"span": 0}, {"ngram": 0}, {"repeated_share": 0.0}]
)
def test_impossible_rules(options):
    with pytest.raises(DataError, match=rf"{next(iter(options))}=.*allowed"):
        LoopRule(**options)
