"""Scores of pools: hand numbers, and judges that answer by a rule."""

import math

import pytest

from rewards.continuation import Judgement, Preference
from rewards.tournament import Pointwise, Pool, Summed, Tournament

POOL = Pool("0/7", "a prefix", "a reference", ["bb", "a", "cccc", "dd"])


class Ruled:
    """Says what a function of the two texts says, and keeps what it was asked."""

    def __init__(self, rule):
        self.rule, self.asked = rule, []

    def compare(self, pairs):
        self.asked += pairs
        return [Preference(self.rule(one.first, one.second)) for one in pairs]

    def identity(self):
        return {}


def longer(first, second):
    """The longer text wins."""
    if len(first) == len(second):
        return "tie"
    return "first" if len(first) > len(second) else "second"


class Lengths:
    """Rewards the length; nothing to say of one of its texts."""

    def judge(self, cases):
        return [Judgement(None if one.candidate == "dd" else len(one.candidate)) for one in cases]

    def identity(self):
        return {}


@pytest.mark.parametrize("orders", ["both", "one"])
def test_mean_outcomes(orders):
    """bb beats a, ties with dd, loses against cccc: 1.5 of 3."""
    judge = Ruled(longer)
    (scored,) = Tournament(judge, "full", orders).score([POOL])
    assert scored.scores == pytest.approx([0.5, 0.0, 1.0, 0.5])
    assert (scored.asked, scored.invalid, scored.flips) == (6, 0, 0)
    assert scored.settled == (6 if orders == "both" else 0)
    assert len(judge.asked) == (12 if orders == "both" else 6)
    shown = {(one.first, one.second) for one in judge.asked}
    assert orders == "one" or {(b, a) for a, b in shown} == shown
    assert {(one.prefix, one.reference) for one in judge.asked} == {("a prefix", "a reference")}


def test_questions_of_a_published_pool():
    """17 candidates, 136 comparisons, 16 with a pivot (arXiv 2601.21343)."""
    pool = Pool("0", "", "", [str(n) for n in range(17)])
    for matches, asked in (("full", 136), ("pivot", 16)):
        judge = Ruled(longer)
        assert Tournament(judge, matches, "one").score([pool])[0].asked == asked
        assert len(judge.asked) == asked


def test_pivot():
    """Everyone meets bb alone: a and b lose, cccc wins, dd ties; bb has 2.5 of 4."""
    pool = Pool("0", "", "", ["bb", "a", "cccc", "dd", "b"])
    (scored,) = Tournament(Ruled(longer), "pivot").score([pool])
    assert scored.scores == pytest.approx([0.625, 0.0, 1.0, 0.5, 0.0])


def test_a_judge_that_prefers_a_place_says_nothing_in_both_orders():
    (scored,) = Tournament(Ruled(lambda *_: "first")).score([POOL])
    assert scored.scores == [0.5] * 4
    assert (scored.settled, scored.flips, scored.invalid) == (6, 6, 0)


def test_drawn_orders_are_those_of_seed_and_pool():
    """A judge of places then gives scores that differ, the same ones every time."""
    found = [
        Tournament(Ruled(lambda *_: "first"), "full", "one", seed).score([POOL])[0].scores
        for seed in (1, 1, 2, 3)
    ]
    assert found[0] == found[1] and len({*map(tuple, found)}) > 1
    assert all(sum(scores) == pytest.approx(2.0) for scores in found)


def test_invalid_verdicts_lower_nobody():
    """Without the three verdicts on cccc the others have two comparisons each, and it has none."""
    judge = Ruled(lambda a, b: None if "cccc" in (a, b) else longer(a, b))
    (scored,) = Tournament(judge).score([POOL])
    assert scored.scores[:2] == pytest.approx([0.75, 0.0]) and scored.scores[3] == 0.75
    assert math.isnan(scored.scores[2])
    assert (scored.asked, scored.invalid, scored.settled) == (6, 3, 3)


def test_the_same_text_is_not_asked_about():
    judge = Ruled(longer)
    pools = [Pool("0", "", "", ["a", "a", "bb"]), Pool("1", "", "", ["c", "c", "c"])]
    first, second = Tournament(judge, orders="one").score(pools)
    assert first.scores == pytest.approx([0.25, 0.25, 1.0]) and first.asked == 2
    assert second.scores == [0.5] * 3 and second.asked == 0
    assert [one.id.split("/")[0] for one in judge.asked] == ["0", "0"]


def test_rewards_and_sums():
    reward = Pointwise(Lengths())
    (alone,) = reward.score([POOL])
    assert alone.scores[:3] == [2.0, 1.0, 4.0] and math.isnan(alone.scores[3])
    assert (alone.asked, alone.invalid, alone.settled) == (4, 1, 0)
    both = Summed([Tournament(Ruled(longer)), reward])
    first, second = both.score([POOL, Pool("1", "", "", ["a", "bbb"])])
    assert first.scores[:3] == pytest.approx([2.5, 1.0, 5.0]) and math.isnan(first.scores[3])
    assert (first.asked, first.invalid, first.settled) == (10, 1, 6)
    assert second.scores == pytest.approx([1.0, 4.0])


def test_names_are_checked():
    for options in ({"matches": "swiss"}, {"orders": "three"}):
        with pytest.raises(ValueError, match=r"=(swiss|three): allowed"):
            Tournament(Ruled(longer), **options)
