"""Sums worked out by rule, against Python's own arithmetic."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.annotation import Passage
from data.thoughts import Delimiters, Limits, segments_of, strip_thoughts
from data.worked_sums import WorkedSums, sums_of, worked

THINK = Delimiters()
QUESTION = (
    "Question: State the final answer to the following arithmetic problem: {} =\nAnswer: {}\n"
)


def annotate(text, **options):
    (found,) = WorkedSums(THINK, Limits(), **options).annotate([Passage("a", "s", text)])
    return found


def test_the_thought_stands_before_the_answer():
    text = QUESTION.format("12 + 7 - 3", 16)
    found = annotate(text).augmented
    assert found.endswith("3 =\nAnswer: <think>12 + 7 = 19, 19 - 3 = 16</think> 16\n")
    assert strip_thoughts(found, THINK) == text


@given(st.lists(st.integers(0, 999), min_size=2, max_size=6), st.integers(0, 63), st.booleans())
@settings(max_examples=40, deadline=None)
def test_partial_sums_are_right(numbers, signs, spaced):
    chain = str(numbers[0])
    for place, number in enumerate(numbers[1:]):
        sign = "+-"[signs >> place & 1]
        chain += f" {sign} {number}" if spaced else f"{sign}{number}"
    steps = worked(chain).split(", ")
    assert len(steps) == len(numbers) - 1
    total = numbers[0]
    for step in steps:
        left, result = step.split(" = ")
        first, sign, second = re.fullmatch(r"(-?\d+) ([+-]) (\d+)", left).groups()
        assert int(first) == total
        total = int(result)
        assert total == int(first) + int(sign + second)
    assert total == sum(int(term) for term in re.findall(r"[+-]?\d+", chain.replace(" ", "")))
    text = QUESTION.format(chain, total)
    found = annotate(text).augmented
    assert (
        strip_thoughts(found, THINK) == text and f"<think>{worked(chain)}</think> {total}" in found
    )


def test_every_sum_has_its_answer():
    text = "1 + 2 =\nA: 3\n4 - 5 =\n6 + 7 = \nA: 13\nA: 14"
    thoughts = [s.text for s in segments_of(annotate(text, marker="A:").augmented, THINK)[1::2]]
    assert thoughts == ["1 + 2 = 3", "6 + 7 = 13"]


@pytest.mark.parametrize(
    ("text", "chains"),
    [
        ("Add. 1+2 =, then: -3 - 4=", ["1+2", "-3 - 4"]),
        ("of 2020: 12 + 7 =", ["12 + 7"]),
        ("2 * 3 + 4 = 10", []),
        ("3 + 4 * 2 = 11", []),
        ("(3 + 4) - 2 = 5", []),
        ("1.5 + 2 = .5 + 2 = 3", []),
        ("x2 + 3 = 2x + 3 = x + 2 + 3 = x -2 + 3 = x - 2 + 3 =", []),
        ("12 = 12", []),
    ],
)
def test_only_whole_sums_are_sums(text, chains):
    assert [chain for _, chain in sums_of(text)] == chains
    assert all(text[begin:].startswith(chain) for begin, chain in sums_of(text))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Answer: 3", "no_sum"),
        ("2 * 3 + 4 = Answer: 10", "no_sum"),
        ("Answer: 1 + 2 = 3", "no_place_for_answer"),
        ("<think> 1 + 2 = Answer: 3", "delimiter_in_text"),
    ],
)
def test_what_has_no_sum_to_work_out(text, reason):
    found = annotate(text)
    assert found.augmented is None and found.reason == reason


def test_a_share_of_thoughts_is_idle():
    texts = [f"{a} + {b} =\nAnswer: {a + b}\n" for a in range(20) for b in range(10)]
    passages = [Passage(str(n), f"sha{n}", text) for n, text in enumerate(texts)]
    found = [one.augmented for one in WorkedSums(THINK, Limits(), idle=0.3).annotate(passages)]
    idle = ["<think>2 terms to add up</think>" in text for text in found]
    assert 0.2 < sum(idle) / len(idle) < 0.4
    worked_out = [one.augmented for one in WorkedSums(THINK, Limits()).annotate(passages)]
    assert [text for text, is_idle in zip(found, idle, strict=True) if not is_idle] == [
        text for text, is_idle in zip(worked_out, idle, strict=True) if not is_idle
    ]
    assert [strip_thoughts(text, THINK) for text in found] == texts
    with pytest.raises(ValueError, match=r"idle=1\.5"):
        WorkedSums(THINK, Limits(), idle=1.5)
