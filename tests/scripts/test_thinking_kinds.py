"""Kinds of thoughts on sums, and what they bring."""

import json

import pytest

from data.errors import DataError
from data.worked_sums import idle, worked
from scripts.thinking.kinds import kind_of, kinds_of, write_kinds


@pytest.mark.parametrize(("thought", "kind"), [
    ("3 terms to add up", "idle"), ("5 terms to add up", "idle"),
    ("8 + 3 = 11, 11 - 2 = 9", "right"), (" 8 + 3 = 11, 11 - 2 = 9 ", "right"),
    ("8 + 3 = 11", "wrong"), ("8 + 3 = 10, 10 - 2 = 8", "wrong"), ("8 + 3", "other"), ("", "other"),
])  # fmt: skip
def test_a_thought_has_one_kind(thought, kind):
    assert kind_of("8 + 3 - 2 =", thought) == kind


def test_what_is_learned_from_has_a_kind_of_its_own():
    assert kind_of("8 + 3 - 2 =", idle("8 + 3 - 2")) == "idle"
    assert kind_of("8 + 3 - 2 =", worked("8 + 3 - 2")) == "right"


def test_a_prefix_without_a_sum_is_refused():
    with pytest.raises(DataError, match=r"prefix 'eight': no sum; allowed"):
        kind_of("eight", "")


def row(prefix, thought, reward, document=None):
    return {"prefix_id": prefix, "document": document, "prefix": "1 + 2 =", "thought": thought,
            "reward": reward}  # fmt: skip


def test_shares_are_of_all_and_rewards_of_the_judged():
    rows = [
        row("a", "1 + 2 = 3", 1.0), row("a", "1 + 2 = 3", None), row("a", "1 + 2 = 3", 0.0),
        row("b", "2 terms to add up", 1.0), row("b", "1 + 2 = 4", 0.0),
    ]  # fmt: skip
    idle_, right, wrong = kinds_of("arm", rows)
    assert (idle_.kind, right.kind, wrong.kind) == ("idle", "right", "wrong")
    assert (right.samples, right.share.value, right.reward.value) == (3, 0.6, 0.5)
    assert (idle_.share.value, idle_.reward.value, wrong.reward.value) == (0.2, 1.0, 0.0)
    # Two documents: a resample has both, or one twice.
    assert (right.share.low, right.share.high) == (0.0, 1.0)
    of_one = kinds_of("arm", [one | {"document": 7} for one in rows])
    assert of_one[1].share.low is None


def test_the_files(tmp_path):
    with pytest.raises(DataError, match=r"no arms/\*\.jsonl"):
        write_kinds(tmp_path, tmp_path / "out")
    (tmp_path / "arms").mkdir()
    more = {"k": 0, "reference": "3", "suffix": "3", "thought_tokens": 1, "suffix_tokens": 1,
            "boundary_ids": [7], "closed_autonomously": True}  # fmt: skip
    rows = [row("a", "1 + 2 = 3", 1.0) | more, row("b", "1 + 2 = 4", 0.0) | more]
    text = "".join(json.dumps(one) + "\n" for one in rows)
    (tmp_path / "arms" / "think.jsonl").write_text(text)
    write_kinds(tmp_path, tmp_path / "out")
    said = (tmp_path / "out" / "thought_kinds.md").read_text()
    assert "| think | right | 1 | 0.500 | [0.000, 1.000] | 1.000 | [1.000, 1.000] |" in said
    found = json.loads((tmp_path / "out" / "thought_kinds.json").read_text())
    assert [one["kind"] for one in found] == ["right", "wrong"]
