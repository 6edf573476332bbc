"""The reward gate: arms on the same held-out prefixes under the same judge (arXiv 2601.21343).

Published fields keep their names. Beside them stands what they are worth: samples of one prefix
depend on each other, and so do prefixes of one document. Intervals draw whole documents (prefixes,
where each is of its own), and a difference is paired by prefix.

Legend: M rollouts or prefixes, one number each.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from data.errors import DataError
from evaluation.grouped import Floats, Groups
from evaluation.held_out import document_of
from evaluation.rollout_metrics import (
    TAGS,
    Row,
    by_prefix,
    is_correct,
    rewards_of,
    rollout_metrics,
)
from evaluation.statistics import Interval, wilson_interval

TIE = 1e-9
SIGNIFICANT = 0.05
# What the published gate asked of its arms.
MAX_INVALID, MAX_NEAR_ZERO = 0.05, 0.50


@dataclass(frozen=True)
class GateArm:
    """One arm; None where nothing was judged.

    Attributes:
        documents, prefixes, samples: what prefixes are from, groups, and rollouts of all of them.
        valid, successes: rollouts with a judgement, and those of them above 1/2.
        reward_mean: of valid rewards.
        wilson: 95 % of it as a rate of independent samples, which they are not; None for rewards
            other than 0 and 1.
        interval: 95 % of it, drawing documents; None for a single one.
        reward_std: of all valid rewards, the population's.
        reward_min, reward_max: of them.
        invalid_rate: rollouts without a judgement.
        mixed_group_rate, near_zero_group_rate: prefixes whose rewards differ, or do not.
        any_success_group_rate, all_success_group_rate: prefixes with a success, or with no failure.
        mean_group_std: mean over prefixes of the population deviation.
        avg_total_new_tokens, avg_predicted_suffix_words, avg_thought_words: per rollout.
        closed_think_rate: rollouts with a boundary, inserted or not: 1 where it always is.
        autonomous_closed_think_rate: rollouts whose model wrote it itself.
        artifact_rate: rollouts that are no text.
    """

    documents: int
    prefixes: int
    samples: int
    valid: int
    successes: int
    reward_mean: float | None
    wilson: Interval | None
    interval: Interval | None
    reward_std: float | None
    reward_min: float | None
    reward_max: float | None
    invalid_rate: float
    mixed_group_rate: float
    near_zero_group_rate: float
    any_success_group_rate: float
    all_success_group_rate: float
    mean_group_std: float | None
    avg_total_new_tokens: float
    avg_predicted_suffix_words: float
    avg_thought_words: float
    closed_think_rate: float
    autonomous_closed_think_rate: float
    artifact_rate: float


@dataclass(frozen=True)
class GatePair:
    """Two arms on the prefixes that both have valid rewards of: right minus left.

    Attributes:
        left, right: names.
        mean_reward_delta: mean over prefixes of the difference of their mean rewards.
        interval: 95 % of it, drawing documents; None for a single one.
        p: two-sided, from the same draws, and no smaller than so few documents can show
            (`evaluation.grouped.least_p`); None for a single one.
        significant: the interval lies on one side of zero, and p is at most 0.05. Nothing is
            adjusted for the number of pairs.
        right_better_prefix_rate, left_better_prefix_rate, tie_prefix_rate: shares of prefixes.
        shared_prefixes: their number.
    """

    left: str
    right: str
    mean_reward_delta: float
    interval: Interval | None
    p: float | None
    significant: bool
    right_better_prefix_rate: float
    left_better_prefix_rate: float
    tie_prefix_rate: float
    shared_prefixes: int

    @property
    def name(self) -> str:
        """As published tables call it."""
        return f"{self.right}_minus_{self.left}"


@dataclass(frozen=True)
class Gate:
    """All arms, their pairs, and what follows; `absent` are those that go/no-go compares but that
    are not there."""

    arms: dict[str, GateArm]
    pairs: list[GatePair]
    go_no_go: dict[str, bool]
    absent: tuple[str, ...] = ()


def gate(
    rows: Mapping[str, Sequence[Row]],
    base: str = "think_base",
    phase3: str = "think_phase3",
    tags: tuple[str, str] = TAGS,
) -> Gate:
    """Everything about some arms.

    Args:
        rows: of every arm, as of `rollout_metrics`, with `prefix` and `reference`, and `document`
            where prefixes may have it in common.
        base, phase3: the arms that the go/no-go fields compare, if they are there.
        tags: the delimiters of thoughts, as they look in texts.

    Raises:
        DataError: an arm without rows, or two that saw different texts under one prefix id.
    """
    check_same_prefixes(rows)
    arms = {name: gate_arm(of_arm, tags) for name, of_arm in rows.items()}
    absent = tuple(name for name in dict.fromkeys((base, phase3)) if name not in arms)
    return Gate(arms, gate_pairs(rows), go_no_go(arms, base, phase3), absent)


def check_same_prefixes(rows: Mapping[str, Sequence[Row]]) -> None:
    """Raise DataError unless equal prefix ids mean equal texts in all arms."""
    seen: dict[str, tuple[str, tuple[str, str]]] = {}
    for name, of_arm in rows.items():
        if not of_arm:
            raise DataError(f"arm {name}: no rollouts; allowed: at least one")
        for row in of_arm:
            texts = row["prefix"], row["reference"]
            other, known = seen.setdefault(row["prefix_id"], (name, texts))
            if texts != known:
                raise DataError(
                    f"prefix {row['prefix_id']!r} is another text in arm {name} than in {other};"
                    " allowed: arms that were sampled from the same prefixes"
                )


def gate_arm(rows: Sequence[Row], tags: tuple[str, str] = TAGS) -> GateArm:
    """Count the rollouts of an arm."""
    groups = [rewards_of(group) for group in by_prefix(rows).values()]
    known = [rewards for rewards in groups if rewards]
    rewards = rewards_of(rows)
    about = rollout_metrics(rows, tags=tags)
    is_binary = set(rewards) <= {0.0, 1.0}
    successes = sum(map(is_correct, rewards))
    return GateArm(
        documents=len(set(documents_of(rows).values())),
        prefixes=len(groups),
        samples=len(rows),
        valid=len(rewards),
        successes=successes,
        reward_mean=about.get("reward_mean"),
        wilson=wilson_interval(successes, len(rewards)) if rewards and is_binary else None,
        interval=_mean_interval(rows),
        reward_std=about.get("reward_std"),
        reward_min=min(rewards, default=None),
        reward_max=max(rewards, default=None),
        invalid_rate=about["invalid_judge_rate"],
        mixed_group_rate=about["mixed_group_rate"],
        near_zero_group_rate=about["near_zero_group_rate"],
        any_success_group_rate=sum(any(map(is_correct, r)) for r in known) / len(groups),
        all_success_group_rate=sum(all(map(is_correct, r)) for r in known) / len(groups),
        mean_group_std=float(np.mean([np.std(r) for r in known])) if known else None,
        avg_total_new_tokens=about["avg_total_new_tokens"],
        avg_predicted_suffix_words=about["avg_suffix_words"],
        avg_thought_words=about["avg_thought_words"],
        closed_think_rate=about["boundary_inserted_rate"],
        autonomous_closed_think_rate=about["autonomous_closed_think_rate"],
        artifact_rate=about["artifact_rate"],
    )


def _mean_interval(rows: Sequence[Row]) -> Interval | None:
    """95 % of the mean of valid rewards, what belongs to a document drawn together."""
    valid = [row for row in rows if row["reward"] is not None]
    if not valid:
        return None
    groups = groups_of([document_of(row, "prefix_id") for row in valid])
    return interval_of(groups.ratio(np.array([float(row["reward"]) for row in valid])))


def groups_of(names: Sequence[str]) -> Groups:
    """Blocks with the same name are drawn together."""
    _, group_M = np.unique(names, return_inverse=True)
    return Groups(group_M)


def documents_of(rows: Sequence[Row]) -> dict[str, str]:
    """What tells the documents of prefixes apart, by prefix; one row that knows it is enough."""
    known_last = sorted(rows, key=lambda row: row.get("document") is not None)
    return {row["prefix_id"]: document_of(row, "prefix_id") for row in known_last}


def interval_of(measure: tuple[float | None, float | None, float | None, float]) -> Interval | None:
    """The ends of a measure; None where there is one group."""
    _, low, high, _ = measure
    return None if low is None or high is None else Interval(low, high)


def prefix_means(rows: Sequence[Row]) -> dict[str, float]:
    """Mean valid reward by prefix; those without one are left out."""
    groups = {prefix_id: rewards_of(group) for prefix_id, group in by_prefix(rows).items()}
    return {prefix_id: float(np.mean(rewards)) for prefix_id, rewards in groups.items() if rewards}


def gate_pairs(rows: Mapping[str, Sequence[Row]]) -> list[GatePair]:
    """All pairs with prefixes in common, of names in alphabetical order, as they are published."""
    means = {name: prefix_means(rows[name]) for name in sorted(rows)}
    documents = documents_of([row for name in means for row in rows[name]])
    pairs = (
        gate_pair(left, means[left], right, means[right], documents)
        for left, right in combinations(means, 2)
    )
    return [pair for pair in pairs if pair is not None]


def gate_pair(
    left: str,
    left_means: Mapping[str, float],
    right: str,
    right_means: Mapping[str, float],
    documents: Mapping[str, str] | None = None,
) -> GatePair | None:
    """Right minus left by prefix; None if they share none.

    `documents` are those of prefixes, as of `documents_of`; None: each has its own.
    """
    shared = sorted(left_means.keys() & right_means.keys())
    if not shared:
        return None
    left_M, right_M = (np.array([means[p] for p in shared]) for means in (left_means, right_means))
    names = shared if documents is None else [documents[prefix] for prefix in shared]
    measure, p = groups_of(names).difference(right_M, left_M)
    interval = interval_of(measure)
    is_apart = interval is not None and (interval.low > 0 or interval.high < 0)
    difference_M: Floats = right_M - left_M
    return GatePair(
        left=left,
        right=right,
        mean_reward_delta=float(difference_M.mean()),
        interval=interval,
        p=p,
        significant=is_apart and p is not None and p <= SIGNIFICANT,
        right_better_prefix_rate=float(np.mean(difference_M >= TIE)),
        left_better_prefix_rate=float(np.mean(difference_M <= -TIE)),
        tie_prefix_rate=float(np.mean(np.abs(difference_M) < TIE)),
        shared_prefixes=len(shared),
    )


def go_no_go(arms: Mapping[str, GateArm], base: str, phase3: str) -> dict[str, bool]:
    """The published fields; those that compare two arms only if both are there.

    They look at values alone: `GatePair.significant` says whether a difference is one.
    """
    fields = {
        "reward_validity_ok": all(arm.invalid_rate <= MAX_INVALID for arm in arms.values()),
        "variance_ok": all(arm.near_zero_group_rate <= MAX_NEAR_ZERO for arm in arms.values()),
    }
    if base not in arms or phase3 not in arms:
        return fields
    old, new = arms[base], arms[phase3]
    return fields | {
        "phase3_more_reward_separable": _is_above(new.mean_group_std, old.mean_group_std)
        or new.mixed_group_rate > old.mixed_group_rate,
        "phase3_higher_mean_reward": _is_above(new.reward_mean, old.reward_mean),
    }


def _is_above(new: float | None, old: float | None) -> bool:
    return new is not None and old is not None and new > old
