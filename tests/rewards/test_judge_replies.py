"""Reading the answer out of what a judge wrote."""

import pytest

from rewards.judge_replies import last_object, read_answer

ALLOWED = {"A", "B", "1", "0", "0.5"}


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ('{"w": "A"}', "A"),
        ('  {"w" : " B "}\n', "B"),
        ('First I thought {"w": "A"}, but no: {"w": "B"}.', "B"),
        ('```json\n{"w": "A", "why": {"w": "B"}}\n```', "A"),
        ('{"w": 1}', "1"),
        ('{"w": 1.0}', "1"),
        ('{"w": 0.5}', "0.5"),
        ('{{{{ {"w": "A"} }', "A"),
        ('{"a": ' * 5000 + '{"w": "B"}', "B"),
    ],
    ids=["plain", "spaces", "last", "fenced", "integer", "float", "fraction", "braces", "deep"],
)
def test_answers(text, answer):
    assert read_answer(text, "w", ALLOWED) == (answer, "")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no JSON object: nothing was written"),
        ("The winner is A", "no JSON object: The winner is A"),
        ('{"w": "A"', 'no JSON object: {"w": "A"'),
        ('["A"]', 'no JSON object: ["A"]'),
        ('{"w": "A"} {"v": 2}', 'no w in the answer: {"v": 2}'),
        ('{"w": "C"}', 'not an allowed answer: "C"'),
        ('{"w": true}', "not an allowed answer: true"),
        ('{"w": null}', "not an allowed answer: null"),
        ('{"w": ["A"]}', 'not an allowed answer: ["A"]'),
        ('{"w": NaN}', "not an allowed answer: NaN"),
        ('{"w": 1e999}', "not an allowed answer: Infinity"),
    ],
    ids=[
        "empty",
        "words",
        "half",
        "list",
        "field",
        "other",
        "true",
        "null",
        "nested",
        "nan",
        "inf",
    ],
)
def test_anything_else_is_invalid(text, reason):
    assert read_answer(text, "w", ALLOWED) == (None, reason)


def test_reading_ends_however_long_the_text():
    assert last_object("{" * 1_000_000) is None
