"""Bias of position: measured, removed by two orders, and noise in one order that is drawn."""

import pytest

from rewards.continuation import Pair, Preference
from rewards.orders import (
    compare_both_orders,
    compare_in_drawn_order,
    is_turned_first,
    mirrored,
    settle,
    turned,
)
from tests.rewards.judging import Biased, Longer

PAIRS = [Pair(f"p{n}", "prefix", "x" * (n % 3 + 1), "yy") for n in range(60)]


class Listed:
    """Says what it is told to, in order."""

    def __init__(self, *winners):
        self.winners = winners

    def compare(self, pairs):
        assert len(pairs) == len(self.winners)
        return [Preference(w, "" if w else "why") for w in self.winners]


def test_a_judge_that_looks_at_the_position_alone_decides_nothing():
    judge = Biased()
    found = compare_both_orders(judge, PAIRS)
    assert judge.asked == 2 * len(PAIRS)
    assert {one.winner for one in found.outcomes} == {"tie"}
    assert (found.first_position_rate, found.order_flip_rate, found.invalid_rate) == (1.0, 1.0, 0.0)


def test_a_judge_that_looks_at_the_texts_alone_is_believed():
    found = compare_both_orders(Longer(), PAIRS)
    expected = ["second", "tie", "first"] * 20
    assert [one.winner for one in found.outcomes] == expected
    assert (found.first_position_rate, found.order_flip_rate) == (0.5, 0.0)


def test_in_one_drawn_order_the_bias_is_noise():
    first = compare_in_drawn_order(Biased(), PAIRS, seed=1)
    wins = [one.winner for one in first].count("first")
    # Sixty fair coins: outside of these ends once in 3000.
    assert 16 <= wins <= 44
    swapped = [is_turned_first(1, pair.id) for pair in PAIRS]
    assert wins == swapped.count(False)
    assert compare_in_drawn_order(Biased(), PAIRS, seed=1) == first
    assert compare_in_drawn_order(Biased(), PAIRS, seed=2) != first
    fair = [one.winner for one in compare_in_drawn_order(Longer(), PAIRS, seed=1)]
    assert fair == ["second", "tie", "first"] * 20


@pytest.mark.parametrize(
    ("forward", "backward", "outcome"),
    [
        ("first", "second", "first"),
        ("second", "first", "second"),
        ("tie", "tie", "tie"),
        ("first", "first", "tie"),
        ("second", "second", "tie"),
        ("tie", "first", "tie"),
        ("second", "tie", "tie"),
        (None, "first", None),
        ("first", None, None),
        (None, None, None),
    ],
)
def test_two_verdicts_make_an_outcome(forward, backward, outcome):
    assert settle(forward, backward) == outcome


def test_rates_count_what_is_valid():
    pairs = PAIRS[:4]
    # Forward: A, none, tie, A. Backward, as shown: B's place, A, tie, B.
    said = ["first", None, "tie", "first", "first", "first", "tie", "second"]
    found = compare_both_orders(Listed(*said), pairs)
    assert [one.winner for one in found.outcomes] == ["tie", None, "tie", "first"]
    assert found.outcomes[1].reason == "why"
    assert found.order_flip_rate == 1 / 3 and found.invalid_rate == 1 / 4
    assert found.first_position_rate == 4 / 5
    empty = compare_both_orders(Listed(), [])
    assert (empty.order_flip_rate, empty.first_position_rate, empty.invalid_rate) == (None,) * 3


def test_turning_twice_is_nothing():
    assert turned(turned(PAIRS[0])) == PAIRS[0] and turned(PAIRS[0]).first == PAIRS[0].second
    assert [mirrored(mirrored(w)) for w in ("first", "second", "tie", None)] == [
        "first", "second", "tie", None,
    ]  # fmt: skip
