"""Whether an arm's suffixes use its thoughts: rewards behind its own and behind other thoughts.

    own      the thought that the model wrote for this prefix
    blank    no thought
    generic  one sentence for all
    swapped  a thought of the same model for another prefix
    teacher  a thought that was given with the data

A model that uses its thoughts is worse with `swapped` and `blank` than with `own`. Differences are
paired by prefix, and their intervals draw documents, each with all of its prefixes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from evaluation.benchmark_report import markdown
from evaluation.gate import (
    GatePair,
    documents_of,
    gate_pair,
    groups_of,
    interval_of,
    prefix_means,
)
from evaluation.gate_report import between, digits
from evaluation.gate_run import OWN
from evaluation.rollout_metrics import Row, by_prefix, is_correct, rewards_of
from evaluation.statistics import Interval

HEADER = [
    "Arm", "Thought", "Judged", "Prefixes", "Reward Mean", "95 % by prefix", "Own Minus This",
    "95 % of Delta", "p", "Significant", "Oracle@k", "95 % of Oracle", "k", "Invalid Rate",
    "Suffix Words",
]  # fmt: skip


@dataclass(frozen=True)
class ProbeRow:
    """One arm behind thoughts of one kind; None where nothing was judged.

    Attributes:
        arm, condition: names.
        valid: judged rollouts.
        prefixes: with one at least.
        reward_mean: mean over prefixes of their mean reward.
        interval: 95 % of it.
        own_minus: `own` minus this one; None of `own` itself.
        oracle: share of prefixes with a success among their k samples.
        oracle_interval: 95 % of it.
        k: samples per prefix.
        invalid_rate: rollouts without a judgement.
        avg_suffix_words: per rollout.
    """

    arm: str
    condition: str
    valid: int
    prefixes: int
    reward_mean: float | None
    interval: Interval | None
    own_minus: GatePair | None
    oracle: float | None
    oracle_interval: Interval | None
    k: int
    invalid_rate: float
    avg_suffix_words: float


def thought_probe(rows: Mapping[str, Mapping[str, Sequence[Row]]]) -> list[ProbeRow]:
    """The table: rows by arm and condition, those of `own` among them."""
    return [
        _probe_row(arm, condition, of_condition, conditions[OWN])
        for arm, conditions in rows.items()
        for condition, of_condition in conditions.items()
    ]


def _probe_row(arm: str, condition: str, rows: Sequence[Row], own: Sequence[Row]) -> ProbeRow:
    means, documents = prefix_means(rows), documents_of([*rows, *own])
    groups = [rewards_of(group) for group in by_prefix(rows).values()]
    best = [float(any(map(is_correct, rewards))) for rewards in groups if rewards]
    names = [documents[prefix] for prefix in means]
    reward_mean, interval = _mean(list(means.values()), names)
    oracle, oracle_interval = _mean(best, names)
    pair = None
    if condition != OWN:
        pair = gate_pair(condition, means, OWN, prefix_means(own), documents)
    return ProbeRow(
        arm=arm,
        condition=condition,
        valid=len(rewards_of(rows)),
        prefixes=len(means),
        reward_mean=reward_mean,
        interval=interval,
        own_minus=pair,
        oracle=oracle,
        oracle_interval=oracle_interval,
        k=max(len(group) for group in by_prefix(rows).values()),
        invalid_rate=1 - len(rewards_of(rows)) / len(rows),
        avg_suffix_words=sum(len(row["suffix"].split()) for row in rows) / len(rows),
    )


def _mean(
    values: Sequence[float], documents: Sequence[str]
) -> tuple[float | None, Interval | None]:
    """Of one number per prefix."""
    if not values:
        return None, None
    measure = groups_of(documents).ratio(np.array(values))
    return measure.value, interval_of(measure)


def probe_cells(rows: Sequence[ProbeRow]) -> tuple[list[str], list[list[str]]]:
    """Header and rows."""
    return HEADER, [
        [
            row.arm, row.condition, str(row.valid), str(row.prefixes), digits(row.reward_mean),
            between(row.interval), *_pair_cells(row.own_minus), digits(row.oracle, 4),
            between(row.oracle_interval), str(row.k), digits(row.invalid_rate, 4),
            digits(row.avg_suffix_words, 2),
        ]
        for row in rows
    ]  # fmt: skip


def _pair_cells(pair: GatePair | None) -> list[str]:
    if pair is None:
        return ["-"] * 4
    p = "-" if pair.p is None else f"{pair.p:.2g}"
    significant = "true" if pair.significant else "false"
    return [digits(pair.mean_reward_delta), between(pair.interval), p, significant]


def probe_markdown(rows: Sequence[ProbeRow]) -> str:
    """The table as Markdown, and how to read it."""
    return (
        f"# Use of thoughts\n\n{markdown(*probe_cells(rows))}\n"
        "- Means are over prefixes, and differences paired by them; intervals draw documents, each"
        " with its prefixes, and of fewer than some twenty documents are too narrow.\n"
        "- Oracle@k: prefixes with a success among k samples. Nothing is adjusted for the number"
        " of comparisons.\n"
    )


def plain_probe(rows: Sequence[ProbeRow]) -> dict[str, Any]:
    """The table as JSON."""
    ends = lambda interval: None if interval is None else interval._asdict()  # noqa: E731
    listed = []
    for row in rows:
        pair = row.own_minus
        own_minus = None if pair is None else asdict(pair) | {"interval": ends(pair.interval)}
        listed.append(
            asdict(row) | {
                "interval": ends(row.interval), "oracle_interval": ends(row.oracle_interval),
                "own_minus": own_minus,
            }
        )  # fmt: skip
    return {"rows": listed}
