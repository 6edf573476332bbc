"""What a step of rollouts looks like: rewards by group, lengths, artifacts, and alerts on them.

The names are those of thinking mid-training's step metrics (arXiv 2601.21343), so that runs can be
laid beside published ones. A group is all samples of one prefix.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Row = Mapping[str, Any]
Metrics = Mapping[str, float]

TAGS = ("<think>", "</think>")
NEAR_ZERO_STD = 1e-5
# Phrases of an assistant, not of a text that goes on. Whole words: "as an aid" is a text.
_ASSISTANT = re.compile(r"\b(as an ai|i cannot|i'm unable)\b")
_REPEATED = re.compile(r"(.)\1{24}", re.DOTALL)
_FEW_LETTERS, _VISIBLE = 0.35, 40


@dataclass(frozen=True)
class Thresholds:
    """Beyond these a step is worth an alert.

    Attributes:
        memory_gib: least memory that is free.
        invalid: share of rewards without a judgement.
        artifact: share of rollouts with artifacts.
        near_zero: share of groups whose rewards do not differ.
        length_growth: of new tokens, against the baseline.
        near_zero_worsening: of `near_zero`, against the baseline.
    """

    memory_gib: float = 4.0
    invalid: float = 0.05
    artifact: float = 0.10
    near_zero: float = 0.50
    length_growth: float = 0.20
    near_zero_worsening: float = 0.20


def rollout_metrics(
    rows: Sequence[Row],
    baseline_tokens: float | None = None,
    tags: tuple[str, str] = TAGS,
) -> dict[str, float]:
    """Count the rollouts of a step, or of an arm.

    Args:
        rows: with `prefix_id`, `reward` (None: invalid, counted and otherwise left out), the texts
            `thought` and `suffix`, `thought_tokens`, `suffix_tokens`, `closed_autonomously`, and
            `boundary_ids`, the closing delimiter, whoever wrote it; empty only in a sample without
            a thought. A row that does not say had a thought.
        baseline_tokens: new tokens per rollout before training, for `response_length_growth`.
        tags: the delimiters, as they look in texts.

    Returns:
        Means and shares by name. The deviation of rewards is the population's. `correct` is a
        reward above 1/2. What has nothing to be a mean of (no valid reward, no correct rollout, no
        baseline) is left out. For rewards of 0 and 1

            near_zero_group_rate = all_zero_group_rate + all_one_group_rate + all_invalid_group_rate
            mixed_group_rate     = 1 - near_zero_group_rate
    """
    assert rows, "a step has rollouts"
    means = {
        "invalid_judge_rate": _mean(row["reward"] is None for row in rows),
        **reward_moments(rewards_of(rows)),
        **group_rates(list(by_prefix(rows).values())),
        "avg_thought_words": _mean(len(row["thought"].split()) for row in rows),
        "avg_suffix_words": _mean(len(row["suffix"].split()) for row in rows),
        **_lengths(rows, baseline_tokens),
        "artifact_rate": _mean(is_artifact(whole_text(row, tags), tags) for row in rows),
        "boundary_inserted_rate": _mean(bool(row.get("boundary_ids", (0,))) for row in rows),
        "autonomous_closed_think_rate": _mean(row["closed_autonomously"] for row in rows),
    }
    return {name: value for name, value in means.items() if value is not None}


def rewards_of(rows: Iterable[Row]) -> list[float]:
    """The valid rewards."""
    return [float(row["reward"]) for row in rows if row["reward"] is not None]


def by_prefix(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """The groups, in the order in which they begin."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["prefix_id"], []).append(row)
    return groups


def new_tokens(row: Row) -> int:
    """Sampled tokens; the boundary, inserted from outside, is none."""
    return row["thought_tokens"] + row["suffix_tokens"]


def is_correct(reward: float) -> bool:
    """A success, also where rewards are graded."""
    return reward > 0.5


def reward_moments(rewards: Sequence[float]) -> dict[str, float | None]:
    """Mean and population deviation; for 0 and 1 the latter is sqrt(p (1 - p))."""
    known = bool(rewards)
    return {
        "reward_mean": float(np.mean(rewards)) if known else None,
        "reward_std": float(np.std(rewards)) if known else None,
    }


def group_rates(groups: Sequence[Sequence[Row]]) -> dict[str, float]:
    """Shares of groups by what their valid rewards are; near zero is a deviation under 1e-5."""
    valid = [rewards_of(group) for group in groups]
    return {
        "near_zero_group_rate": _share(not r or np.std(r) < NEAR_ZERO_STD for r in valid),
        "mixed_group_rate": _share(bool(r) and max(r) - min(r) > 0 for r in valid),
        "all_zero_group_rate": _share(bool(r) and max(r) == min(r) == 0 for r in valid),
        "all_one_group_rate": _share(bool(r) and max(r) == min(r) == 1 for r in valid),
        "all_invalid_group_rate": _share(not r for r in valid),
    }


def _lengths(rows: Sequence[Row], baseline_tokens: float | None) -> dict[str, float | None]:
    """New tokens of all rollouts, of the correct and of the incorrect ones, and their growth."""
    judged = [row for row in rows if row["reward"] is not None]
    correct = [new_tokens(row) for row in judged if is_correct(row["reward"])]
    incorrect = [new_tokens(row) for row in judged if not is_correct(row["reward"])]
    mean = _mean(map(new_tokens, rows))
    assert mean is not None and (baseline_tokens is None or baseline_tokens > 0)
    growth = None if baseline_tokens is None else mean / baseline_tokens - 1
    return {
        "avg_total_new_tokens": mean,
        "avg_total_new_tokens_correct": _mean(correct),
        "avg_total_new_tokens_incorrect": _mean(incorrect),
        "response_length_growth": growth,
    }


def whole_text(row: Row, tags: tuple[str, str] = TAGS) -> str:
    """Thought and suffix between the delimiters that stand around the thought."""
    opening, closing = tags
    return f"{opening}{row['thought']}{closing}{row['suffix']}"


def is_artifact(text: str, tags: tuple[str, str] = TAGS) -> bool:
    """Whether a text is no text: any of

    - U+FFFD, the mark of bytes that are no character;
    - more than two delimiters of thoughts;
    - an assistant's phrase ("as an AI", "I cannot", "I'm unable");
    - a character 25 times in a row;
    - under 35 % letters, of at least 40 visible characters without the delimiters.
    """
    bare = text
    for tag in tags:
        bare = bare.replace(tag, " ")
    visible = [character for character in bare if not character.isspace()]
    letters = sum(map(str.isalpha, visible))
    return (
        "\ufffd" in text
        or sum(map(text.count, tags)) > 2
        or _ASSISTANT.search(text.lower().replace("\u2019", "'")) is not None
        or _REPEATED.search(text) is not None
        or (len(visible) >= _VISIBLE and letters < _FEW_LETTERS * len(visible))
    )


def alerts(
    metrics: Metrics,
    baseline: Metrics | None = None,
    previous: Metrics | None = None,
    thresholds: Thresholds | None = None,
) -> list[str]:
    """What is wrong with a step, a line each; nothing for numbers that are not there.

    Args:
        metrics: of the step; `available_mem_gib` is looked at as well.
        baseline: before training, for what must not get worse.
        previous: of the step before, for a collapse: all groups of 0, or all of 1, twice.
        thresholds: None: the defaults.
    """
    limits = thresholds or Thresholds()
    above = {
        "invalid_judge_rate": limits.invalid,
        "artifact_rate": limits.artifact,
        "near_zero_group_rate": limits.near_zero,
        "response_length_growth": limits.length_growth,
    }
    found = [
        f"{name}={metrics[name]:.4f}: above {limit:g}"
        for name, limit in above.items()
        if metrics.get(name, limit) > limit
    ]
    memory = metrics.get("available_mem_gib", limits.memory_gib)
    if memory < limits.memory_gib:
        found.append(f"available_mem_gib={memory:.2f}: under {limits.memory_gib:g}")
    found += _worsened(metrics, baseline or {}, limits.near_zero_worsening)
    if previous is not None and _is_collapsed(metrics) and _is_collapsed(previous):
        found.append("reward_collapsed: every group all 0, or all 1, in two steps running")
    return found


def _worsened(metrics: Metrics, baseline: Metrics, limit: float) -> list[str]:
    name = "near_zero_group_rate"
    if name not in baseline or metrics[name] - baseline[name] <= limit:
        return []
    before = f"{baseline[name]:.4f} before training"
    return [f"{name}={metrics[name]:.4f}: {before}, more than {limit:g} worse"]


def _is_collapsed(metrics: Metrics) -> bool:
    return 1.0 in (metrics["all_zero_group_rate"], metrics["all_one_group_rate"])


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


def _share(flags: Iterable[Any]) -> float:
    listed = [bool(flag) for flag in flags]
    return sum(listed) / len(listed)
