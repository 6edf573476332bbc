"""Thoughts are not graded; rows become counts, or a refusal that names what is missing."""

import pytest

from data.errors import DataError
from data.few_shot import Prompt
from evaluation.benchmark_run import Row
from evaluation.reasoning import Problem
from evaluation.reasoning_rows import (
    UNCLOSED,
    Thoughts,
    add_rows,
    choices_of,
    gather,
    remarks,
    samples_of,
)


@pytest.mark.parametrize(
    ("completion", "begun", "answer"),
    [
        (" It is 6.", False, " It is 6."),
        ("<think>2 + 4 = 7</think> It is 6.", False, " It is 6."),
        ("A <think>b</think> c <think>d</think> e", False, "A  c  e"),
        ("<think>no end: 6", False, None),
        ("It is 6. <think>or not", False, None),
        ("so 6</think> It is 6.", True, " It is 6."),
        ("so 6", True, None),
        ("so 6</think> It <think>is</think>is 6", True, " It is 6"),
        # The chat template opened it.
        ("so 6</think> It is 6.", False, " It is 6."),
        ("", False, ""),
        ("", True, None),
    ],
)  # fmt: skip
def test_what_stands_outside_thoughts(completion, begun, answer):
    assert Thoughts("<think>", "</think>", begun).answer(completion) == answer


def test_other_delimiters():
    assert Thoughts("[[", "]]").answer("a[[b]]c<think>d") == "ac<think>d"


def test_samples_stand_side_by_side_and_have_ids_of_their_own():
    asked = [Prompt({"id": "a/1", "x": 5}, "One?"), Prompt({"id": "b"}, "Two?")]
    found = samples_of(asked, 2, "<think>")
    assert [prompt.id for prompt in found] == ["a/1/0", "a/1/1", "b/0", "b/1"]
    assert [prompt.text for prompt in found] == ["One?<think>"] * 2 + ["Two?<think>"] * 2
    assert found[1].row["x"] == 5 and found[0].hash == found[1].hash != asked[0].hash


def test_choices():
    assert choices_of({"choices": "(A) x\n(B) y\n(C) z\nmore of z"}) == 3
    assert choices_of({"choices": "x"}) is None and choices_of({}) is None
    assert choices_of({"choices": "\n".join(f"({letter}) x" for letter in "ABCDEFGHIJ")}) == 10


def row(problem, sample, arm="a", benchmark="x", **more) -> Row:
    return {
        "arm": arm, "benchmark": benchmark, "id": problem, "sample_idx": sample, "gold": "6",
        "correct": sample == 0, "completion_tokens": 5 + sample, "prompt_sha": "p",
        "grader_version": "g", "choices": None,
    } | more  # fmt: skip


def collected(*rows):
    arms = {}
    add_rows(arms, ((f"f.jsonl:{n}", one) for n, one in enumerate(rows, start=1)))
    return arms


ALL = [row(problem, sample, arm) for arm in "ab" for problem in "pq" for sample in range(2)]


def test_counts_per_problem_in_an_order_that_arms_share():
    shuffled = [*ALL[:4], *reversed(ALL[4:7]), ALL[7] | {"correct": True}]
    counts, notes = gather(collected(*shuffled), ["x"])
    assert counts["a"]["x"].of == [Problem(1, 11), Problem(1, 11)] and notes == []
    assert counts["b"]["x"].of == [Problem(1, 11), Problem(2, 11)] and counts["b"]["x"].samples == 2


def test_the_order_of_rows_decides_nothing():
    """Resamples are of places: halves of two hosts, merged either way, have one interval."""
    rows = [row(f"p{n}", 0, correct=n % 3 == 0) for n in range(9)]
    counts = [gather(collected(*some), ["x"])[0] for some in (rows, rows[5:] + rows[:5])]
    assert counts[0] == counts[1]


def test_a_missing_sample_is_named():
    with pytest.raises(
        DataError,
        match=r"arm=b, benchmark=x: 1 of 4 samples \(id, sample_idx\) are missing: \('p', 1\); run",
    ):
        gather(collected(*ALL[:5], *ALL[6:]), ["x"])
    with pytest.raises(DataError, match=r"arm=b.*2 of 4 .*: \('q', 0\), \('q', 1\); run"):
        gather(collected(*ALL[:6]), ["x"])
    with pytest.raises(DataError, match=r"arm=a.*4 of 8 .*'p', 2\), \('p', 3\), \('q', 2\), \.\."):
        more = [row(problem, sample, "b") for problem in "pq" for sample in range(4)]
        gather(collected(*ALL[:4], *more), ["x"])
    with pytest.raises(DataError, match="arm=b: no rows of benchmark=y; allowed: arms that all"):
        gather(collected(*ALL, row("p", 0, benchmark="y")), ["x", "y"])


def test_rows_that_cannot_be_compared():
    with pytest.raises(DataError, match=r"f\.jsonl:9: a second row of arm=a.*id='p', sample_idx=1"):
        collected(*ALL, ALL[1])
    with pytest.raises(DataError, match=r"answer to 'q' is '6' in arm=a and '7' in arm=b"):
        gather(collected(*ALL[:6], *(one | {"gold": "7"} for one in ALL[6:])), ["x"])
    with pytest.raises(DataError, match=r"benchmark=x: graded by 2 graders \(g, h\); allowed: one"):
        gather(collected(*ALL[:7], ALL[7] | {"grader_version": "h"}), ["x"])
    with pytest.raises(DataError, match="benchmark=Macro: is the name of the average"):
        gather(collected(row("p", 0, benchmark="Macro")), ["Macro"])
    other = [one | {"prompt_sha": "r"} for one in ALL[4:]]
    _, notes = gather(collected(*ALL[:4], *other), ["x"])
    assert notes == ["x: 2 of 2 problems were asked in another way in b than in a"]


@pytest.mark.parametrize(
    ("field", "value", "allowed"),
    [
        ("correct", 1, "true, false"), ("sample_idx", True, "an integer >= 0"),
        ("completion_tokens", -1, "an integer >= 0"), ("id", "", "a text"),
        ("choices", 0, "an integer >= 1 or null"), ("grader_version", None, "a text"),
    ],
)  # fmt: skip
def test_a_row_of_other_types(field, value, allowed):
    with pytest.raises(DataError, match=rf"f\.jsonl:1: {field}=.*; allowed: {allowed}"):
        collected(row("p", 0, **{field: value}))


def test_remarks():
    rows = [
        row("p", 0, finish_reason="length", reason=UNCLOSED, completion="<think>"),
        row("p", 1, finish_reason="stop", reason="", completion="6", completion_tokens=0),
    ]
    assert remarks("x", rows, 9) == [
        "x: 1 problems; the complete benchmark has 9",
        "x: 1 of 2 completions were ended by the limit",
        "x: 1 of 2 completions end within a thought and have no answer",
        "x: 1 of 2 completions have a text but no count of tokens, so that the mean is too low",
    ]
    assert remarks("x", rows[:0], None) == []
