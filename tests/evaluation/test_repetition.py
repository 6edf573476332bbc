"""The rate of repeated 4-grams: the published formula, word for word, and by hand."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluation.repetition import RepetitionRate, repetition_rate


def published(tokens, n=4):
    """Sum of count - 1 over the n-grams that occur more than once, over all n-grams."""
    counts = Counter(tuple(tokens[at : at + n]) for at in range(len(tokens) - n + 1))
    return sum(count - 1 for count in counts.values() if count > 1) / sum(counts.values())


@given(st.lists(st.integers(0, 2), min_size=4, max_size=60))
def test_the_rate_of_one_text_is_the_published_one(tokens):
    assert repetition_rate([tokens]).rate == pytest.approx(published(tokens))


def test_the_mean_is_over_texts():
    # abcdabcd: five 4-grams, abcd twice; eeeee: two, both the same; abc has none.
    found = repetition_rate(["abcdabcd", "eeeee", "abc"])
    assert found.rate == pytest.approx((1 / 5 + 1 / 2) / 2)
    assert found.standard_error == pytest.approx(0.15) and (found.texts, found.too_short) == (2, 1)
    # What two texts share is no repetition.
    assert repetition_rate(["abcde", "abcde"]).rate == 0.0
    assert repetition_rate(["abc"]) == RepetitionRate(None, None, 0, 1)
