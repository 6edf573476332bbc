"""The held-out win rate, from verdicts alone: a published number, biased judges, bad rows."""

import random

import pytest

from data.errors import DataError
from evaluation.continuation_quality import measure, shown_pairs, verdict_row
from evaluation.statistics import wilson_interval
from rewards.continuation import Pair
from tests.rewards.judging import Biased, Longer


def row(pair, order, winner, reason=""):
    return {"pair": str(pair), "order": order, "winner": winner, "reason": reason}


def judged(judge, pairs, protocol, seed=0):
    shown = [one for pair in pairs for one in shown_pairs(pair, protocol, seed)]
    said = judge.compare([pair for _, pair in shown])
    return [
        verdict_row(order, pair, verdict.winner, verdict.reason)
        for (order, pair), verdict in zip(shown, said, strict=True)
    ]


def test_the_published_win_rate():
    """81 of 128 in one random order each: .6328, [.547, .711], p = .0034 (2026-04-27)."""
    draw = random.Random(0)
    rows = []
    for pair in range(128):
        order = draw.choice(["forward", "backward"])
        ours = {"forward": "first", "backward": "second"}[order]
        theirs = {"forward": "second", "backward": "first"}[order]
        rows.append(row(pair, order, ours if pair < 81 else theirs))
    draw.shuffle(rows)
    found = measure(rows, "seed_random_swap")
    assert (found.win, found.loss, found.tie, found.valid) == (81, 47, 0, 128)
    assert round(found.win_rate, 4) == 0.6328 and round(found.p, 4) == 0.0034
    assert (round(found.low, 3), round(found.high, 3)) == (0.547, 0.711)
    assert found.order_flip_rate is None and "order_flip_rate" not in found.metrics()


def test_both_orders_by_hand():
    rows = [
        row(1, "forward", "first"), row(1, "backward", "second"),  # win
        row(2, "forward", "second"), row(2, "backward", "first"),  # loss
        row(3, "forward", "first"), row(3, "backward", "first"),  # flip: tie
        row(4, "backward", "tie"), row(4, "forward", "tie"),  # tie
        row(5, "forward", None, "no answer: HTTP 500"), row(5, "backward", "first"),
        row(6, "forward", "first"), row(6, "backward", "second"),  # win
    ]  # fmt: skip
    found = measure(rows, "both_orders")
    assert (found.win, found.loss, found.tie) == (2, 1, 2)
    assert (found.pairs, found.valid, found.invalid) == (6, 5, 1)
    assert found.win_rate == 3 / 5 and found.invalid_rate == pytest.approx(1 / 6)
    assert (found.low, found.high) == wilson_interval(3, 5)
    assert found.p == 1.0, "two against one"
    assert found.order_flip_rate == 1 / 5
    assert found.first_position_rate == 6 / 9
    assert found.reasons == {"no answer": 1}


def test_half_a_success_is_between_its_neighbours():
    rows = [row(1, "forward", "first"), row(1, "backward", "first"), *(
        row(n, order, winner) for n in (2, 3)
        for order, winner in (("forward", "first"), ("backward", "second"))
    )]  # fmt: skip
    found = measure(rows, "both_orders")
    assert found.win_rate == 2.5 / 3
    assert wilson_interval(2, 3).low < found.low < wilson_interval(3, 3).low
    assert wilson_interval(2, 3).high < found.high < wilson_interval(3, 3).high


PAIRS = [Pair(f"p{n}", "prefix", "x" * (1 + n % 5), "yyy") for n in range(200)]


def test_bias_of_position_is_measured_and_removed():
    found = measure(judged(Biased(), PAIRS, "both_orders"), "both_orders")
    assert found.win_rate == 0.5 and found.tie == 200 and found.p == 1.0
    assert (found.first_position_rate, found.order_flip_rate) == (1.0, 1.0)
    noise = measure(judged(Biased(), PAIRS, "seed_random_swap", seed=3), "seed_random_swap")
    assert noise.first_position_rate == 1.0 and noise.tie == 0
    # Two hundred coins, whose number of heads depends on the seed.
    assert 0.35 < noise.win_rate < 0.65
    again = measure(judged(Biased(), PAIRS, "seed_random_swap", seed=4), "seed_random_swap")
    assert again.win_rate != noise.win_rate


@pytest.mark.parametrize("protocol", ["both_orders", "seed_random_swap"])
def test_a_fair_judge_says_the_same_under_both_protocols(protocol):
    found = measure(judged(Longer(), PAIRS, protocol), protocol)
    assert (found.win, found.loss, found.tie) == (80, 80, 40)
    assert found.win_rate == 0.5


def test_without_a_valid_verdict_there_is_no_rate():
    found = measure([row(1, "forward", None, "no answer: x")], "seed_random_swap")
    assert found.metrics() == {
        "pairs": 1, "documents": 1, "valid": 0, "invalid": 1, "win": 0, "loss": 0, "tie": 0,
        "invalid_rate": 1.0,
    }  # fmt: skip


def of_documents(documents):
    """Three pairs of each document, which are alike: won if its number is even, else lost."""
    return [
        row(f"{document}-{part}", "forward", "second" if document % 2 else "first")
        | {"document": document}
        for document in range(documents) for part in range(3)
    ]  # fmt: skip


def test_pairs_of_one_document_are_drawn_together():
    rows = of_documents(20)
    found = measure(rows, "seed_random_swap")
    alone = measure([{**one, "document": None} for one in rows], "seed_random_swap")
    assert (found.pairs, found.documents, alone.documents) == (60, 20, 60)
    assert found.win_rate == alone.win_rate == 0.5
    assert (alone.low, alone.high) == wilson_interval(30, 60)
    # A bootstrap of twenty coins, not sixty: 1.96 sqrt(1/4 / 20) = 0.219 to both sides.
    assert found.high - found.win_rate == pytest.approx(0.219, abs=0.035)
    assert found.low < alone.low and alone.high < found.high


def test_few_documents_prove_little_however_many_pairs_they_have():
    rows = [one | {"winner": "first"} for one in of_documents(4)]
    found = measure(rows, "seed_random_swap")
    alone = measure([{**one, "document": None} for one in rows], "seed_random_swap")
    assert alone.p == 2 / 2**12 and found.p == 2 / 2**4
    # Every draw of these documents is the same.
    assert (found.low, found.high) == wilson_interval(4, 4)
    single = measure(rows[:3], "seed_random_swap")
    assert (single.win_rate, single.low, single.high, single.p) == (1.0, None, None, None)
    assert "low" not in single.metrics()


def test_a_document_for_every_pair_changes_nothing():
    rows = of_documents(20)[::3]
    known = measure(rows, "seed_random_swap")
    assert known == measure([{**one, "document": None} for one in rows], "seed_random_swap")
    assert (known.low, known.high) == wilson_interval(10, 20)


@pytest.mark.parametrize(
    ("rows", "protocol", "reason"),
    [
        ([], "both_orders", "at least 1 verdict"),
        ([row(1, "forward", "first")], "both_orders", "'1': shown in 1 orders; .* has 2"),
        ([row(1, o, "tie") for o in ("forward", "backward")], "seed_random_swap", "has 1"),
        ([row(1, "forward", "first")] * 2, "seed_random_swap", "a second one of order=forward"),
        ([row(1, "forward", "A")], "seed_random_swap", "winner='A'; allowed"),
        ([row(1, "up", "tie")], "seed_random_swap", "order='up'"),
        ([{"pair": "1", "order": "forward"}], "seed_random_swap", "winner=None; allowed"),
        ([row(1, "forward", "tie")], "once", "protocol=once: allowed both_orders, seed_random"),
    ],
    ids=["none", "one order", "two orders", "twice", "winner", "order", "no winner", "protocol"],
)
def test_bad_rows(rows, protocol, reason):
    with pytest.raises(DataError, match=reason):
        measure(rows, protocol)
    with pytest.raises(ValueError, match="protocol=once"):
        shown_pairs(PAIRS[0], "once", 0)
