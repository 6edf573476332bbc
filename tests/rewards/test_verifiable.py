"""Rewards that are looked up in the true continuation."""

import time

import pytest

from rewards.continuation import Case, Judgement, Pair
from rewards.exact import ExactGrader
from rewards.verdict import Verdict
from rewards.verifiable import VerifiablePairwise, VerifiableReward, same_answer


def judged(candidate, reference, **options):
    (found,) = VerifiableReward(**options).judge([Case("1", "prefix", reference, candidate)])
    return found


@pytest.mark.parametrize(
    ("candidate", "reference", "score"),
    [
        (" 42\nNext question", " 42", 1.0),
        ("42.0", "42", 1.0),
        ("1,000", "1000", 1.0),
        ("+7", "7.", 1.0),
        ("-.5", "-0.50", 1.0),
        ("a  cat ", "a cat", 1.0),
        ("A cat", "a cat", 0.0),
        ("43", "42", 0.0),
        ("4 2", "42", 0.0),
        ("10,00", "1000", 0.0),
        ("42 apples", "42", 0.0),
        ("\n42", "42", 0.0),
    ],
)
def test_answers_are_compared_as_texts_or_numbers(candidate, reference, score):
    assert judged(candidate, reference).score == score


def test_no_answer_scores_nothing_but_no_right_answer_is_invalid():
    assert judged(" \nx", "42") == Judgement(0.0, "the candidate has no answer")
    assert judged("42", "\n42") == Judgement(None, "the reference has no answer")


def test_a_pattern_finds_the_last_answer():
    pattern = {"pattern": r"answer is (-?\d+)"}
    reference = "The answer is 3. No: the answer is 5."
    assert judged("the answer is 5", reference, **pattern).score == 1.0
    assert judged("the answer is 3", reference, **pattern).score == 0.0
    assert judged("5", reference, **pattern) == Judgement(0.0, "the candidate has no answer")
    assert judged("x7y", "7", pattern=r"\d").score == 1.0, "without a group all of it"
    with pytest.raises(ValueError, match=r"pattern='\(': .*; allowed: a regular expression"):
        VerifiableReward("(")


class Last:
    """Compares last letters, and says why."""

    def grade(self, item, text):
        return Verdict(item["answer"][-1] == text[-1], text, item["id"])

    def fingerprint(self):
        return {"grader": "last"}


def test_a_grader_compares_in_its_own_way():
    assert judged("ab\n", "cb", grader=Last()) == Judgement(1.0, "1")
    assert judged("1.0", "1", grader=ExactGrader()).score == 0.0
    assert VerifiableReward(grader=Last()).identity()["grader"] == {"grader": "last"}


class Undecided(Last):
    """Has no time for an answer that begins with a power."""

    def grade(self, item, text):
        if text.startswith("9**"):
            return Verdict(False, text, "timed out after 5 s", decided=False)
        return super().grade(item, text)


def test_what_a_grader_cannot_compare_is_invalid():
    assert judged("9**9", "9", grader=Undecided()) == Judgement(None, "timed out after 5 s")
    assert judged("8", "9", grader=Undecided()).score == 0.0
    judge = VerifiablePairwise(grader=Undecided())
    assert judge.compare([Pair("1", "", "9**9", "9", "9")])[0].winner is None


def test_pairs_are_decided_by_the_right_answer():
    judge = VerifiablePairwise()
    rows = [("4", "5", "4"), ("5", "4", "4"), ("4", "4.0", "4"), ("6", "5", "4"), ("4", "5", "")]
    pairs = [Pair(str(n), "", *row) for n, row in enumerate(rows)]
    winners = [one.winner for one in judge.compare(pairs)]
    assert winners == ["first", "second", "tie", "tie", None]


def test_it_is_fast():
    cases = [Case(str(n), "p" * 500, f" {n}\n", f" {n + n % 2}\nmore") for n in range(5000)]
    started = time.process_time()
    found = VerifiableReward(r"\d+").judge(cases)
    assert time.process_time() - started < 1.0
    assert sum(one.score for one in found) == 2500


def test_equality_is_symmetric():
    for one, other in (("1e3", "1000"), ("", ""), ("1,00", "100"), ("1", "1.00")):
        assert same_answer(one, other) == same_answer(other, one)
    assert not same_answer("1e3", "1000")
