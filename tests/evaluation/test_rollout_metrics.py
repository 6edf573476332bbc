"""Metrics of rollouts against hand counts, and what must hold of them for any rewards."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evaluation.rollout_metrics import Thresholds, alerts, is_artifact, rollout_metrics

REWARDS = st.sampled_from([0.0, 1.0, None])


def row(prefix_id="a", k=0, reward=0.0, thought="so it goes", suffix="on and on", **more):
    """A rollout of 3 and 4 tokens."""
    return {
        "prefix_id": prefix_id, "k": k, "reward": reward, "thought": thought, "suffix": suffix,
        "thought_tokens": 3, "suffix_tokens": 4, "closed_autonomously": False, **more,
    }  # fmt: skip


def groups(*rewards_of_prefixes):
    """Rollouts with these rewards, a group each."""
    return [
        row(f"p{place}", k, reward)
        for place, rewards in enumerate(rewards_of_prefixes)
        for k, reward in enumerate(rewards)
    ]


def test_hand_counts():
    rows = [
        row("a", 0, 1.0, thought="one two", suffix="x y z", suffix_tokens=8, boundary_ids=[5]),
        row("a", 1, 0.0, closed_autonomously=True, boundary_ids=[5]),
        row("b", 0, 0.0, boundary_ids=[]),
        row("b", 1, None, suffix="\ufffd", boundary_ids=[5]),
    ]
    found = rollout_metrics(rows, baseline_tokens=10.0)
    wanted = {
        "reward_mean": 1 / 3,
        "reward_std": math.sqrt(2 / 9),
        "invalid_judge_rate": 1 / 4,
        "near_zero_group_rate": 1 / 2,
        "mixed_group_rate": 1 / 2,
        "all_zero_group_rate": 1 / 2,
        "all_one_group_rate": 0.0,
        "all_invalid_group_rate": 0.0,
        "avg_thought_words": 11 / 4,
        "avg_suffix_words": 10 / 4,
        "avg_total_new_tokens": (11 + 7 + 7 + 7) / 4,
        "avg_total_new_tokens_correct": 11.0,
        "avg_total_new_tokens_incorrect": 7.0,
        "response_length_growth": 8 / 10 - 1,
        "artifact_rate": 1 / 4,
        "boundary_inserted_rate": 3 / 4,
        "autonomous_closed_think_rate": 1 / 4,
    }
    assert found == pytest.approx(wanted)


def test_what_has_no_mean_is_left_out():
    found = rollout_metrics(groups([None, None]))
    missing = ("reward_mean", "reward_std", "avg_total_new_tokens_correct",
               "avg_total_new_tokens_incorrect", "response_length_growth")  # fmt: skip
    assert not set(missing) & set(found)
    assert found["invalid_judge_rate"] == found["all_invalid_group_rate"] == 1.0
    assert found["near_zero_group_rate"] == 1.0 and found["mixed_group_rate"] == 0.0


def test_graded_rewards_that_agree_are_near_zero_but_neither_all_zero_nor_all_one():
    found = rollout_metrics(groups([0.5, 0.5], [0.25, 0.75]))
    assert found["near_zero_group_rate"] == found["mixed_group_rate"] == 0.5
    assert found["all_zero_group_rate"] == found["all_one_group_rate"] == 0.0
    assert found["avg_total_new_tokens_correct"] == 7.0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(REWARDS, min_size=1, max_size=5), min_size=1, max_size=6), st.randoms())
def test_invariants_of_rewards_of_zero_and_one(rewards, random):
    rows = groups(*rewards)
    found = rollout_metrics(rows)
    constant = sum(found[f"all_{kind}_group_rate"] for kind in ("zero", "one", "invalid"))
    assert found["near_zero_group_rate"] == pytest.approx(constant)
    assert found["mixed_group_rate"] == pytest.approx(1 - found["near_zero_group_rate"])
    assert all(0 <= value <= 1 for name, value in found.items() if name.endswith("_rate"))
    if "reward_mean" in found:
        p = found["reward_mean"]
        assert found["reward_std"] == pytest.approx(math.sqrt(p * (1 - p)), abs=1e-12)
    random.shuffle(rows)
    assert rollout_metrics(rows) == pytest.approx(found)


@pytest.mark.parametrize("text", [
    "a broken \ufffd character",
    "<think>a</think>b<think>",
    "As an AI, I go on",
    "well, I cannot say",
    "I\u2019m unable to",
    "=" * 25,
    "x\n" + "\n" * 24,
    "1234567890 " * 4,
])  # fmt: skip
def test_artifacts(text):
    assert is_artifact(text)


@pytest.mark.parametrize("text", [
    "",
    "<think>a</think>b",
    "as an aid to the reader; Fuji cannot be seen",
    "=" * 24,
    "1234567890 " * 3 + "123456789",
    "abc4567890 " * 3 + "abcde67890",
])  # fmt: skip
def test_texts(text):
    assert not is_artifact(text)


def test_delimiters_may_be_others():
    rows = [row(suffix="a [t]")]
    assert rollout_metrics(rows)["artifact_rate"] == 0.0
    assert rollout_metrics(rows, tags=("[t]", "[/t]"))["artifact_rate"] == 1.0


# A step with nothing wrong, at the very limits.
CALM = {
    "invalid_judge_rate": 0.05, "artifact_rate": 0.10, "near_zero_group_rate": 0.50,
    "response_length_growth": 0.20, "all_zero_group_rate": 0.5, "all_one_group_rate": 0.0,
    "available_mem_gib": 4.0,
}  # fmt: skip


def test_no_alert_at_the_limits():
    assert alerts(CALM, baseline={**CALM, "near_zero_group_rate": 0.30}, previous=CALM) == []


@pytest.mark.parametrize(("name", "value"), [
    ("invalid_judge_rate", 0.06), ("artifact_rate", 0.132031), ("near_zero_group_rate", 0.51),
    ("response_length_growth", 0.21), ("available_mem_gib", 3.9),
])  # fmt: skip
def test_an_alert_beyond_each_limit(name, value):
    (said,) = alerts({**CALM, name: value})
    assert said.startswith(f"{name}={value:.2f}")


def test_alert_of_groups_that_got_worse():
    (said,) = alerts(CALM, baseline={**CALM, "near_zero_group_rate": 0.29})
    assert said.startswith("near_zero_group_rate=0.5000: 0.2900 before")


def test_alert_of_a_collapse_takes_two_steps():
    limits = Thresholds(near_zero=1.0)
    zero, one = ({**CALM, f"all_{kind}_group_rate": 1.0} for kind in ("zero", "one"))
    assert alerts(zero, thresholds=limits) == alerts(zero, previous=CALM, thresholds=limits) == []
    assert len(alerts(zero, previous=one, thresholds=limits)) == 1


def test_thresholds_can_be_set():
    assert alerts(CALM, thresholds=Thresholds(artifact=0.05)) == [
        "artifact_rate=0.1000: above 0.05"
    ]
