"""What a step of preference learning looks like: pools, who is chosen, how judges do, and alerts.

The names are those of self-improving pretraining's step metrics (arXiv 2601.21343), so that runs
can be laid beside published ones. A pool is the candidates of one prefix.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.samples import distinct_n
from rewards.candidates import ORIGINAL, ROLLOUT, SOURCES

Row = Mapping[str, Any]


def pool_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Count the pools of a step.

    Args:
        rows: one per pool, with `candidates` (each with its `source`, `score`, None if there is no
            valid one, and `ids`), `lessons` (numbers of the candidates that are learned from: the
            one to prefer, then, if there is one, the one to avoid), the counts `asked`, `invalid`,
            `settled` and `flips` of `rewards.tournament.Scored`, and `kl` (nats per token; None:
            not measured).

    Returns:
        Means and shares by name. Scores are averaged over candidates, and top, bottom and spread
        (top - bottom) over pools; the shares of sources are over lessons. What has nothing to be a
        mean of is left out.
    """
    assert rows, "a step has pools"
    everyone = [one for row in rows for one in row["candidates"]]
    valid = [_scores(row["candidates"]) for row in rows]
    kept = sum(bool(row["lessons"]) for row in rows)
    asked, settled = (sum(row[name] for row in rows) for name in ("asked", "settled"))
    means = {
        "total_prefixes": float(len(rows)),
        "kept_prefixes": float(kept),
        "kept_rate": kept / len(rows),
        **_shares("chosen", [row["candidates"][one[0]] for row in rows for one in row["lessons"]]),
        **_shares("rejected", [row["candidates"][one[1]] for row in rows
                               for one in row["lessons"] if len(one) > 1]),
        **{f"{source}_mean_score": _mean(_scores(_of(source, everyone))) for source in SOURCES},
        "pool_top_score_mean": _mean(max(scores) for scores in valid if scores),
        "pool_bottom_score_mean": _mean(min(scores) for scores in valid if scores),
        "pool_spread_mean": _mean(max(scores) - min(scores) for scores in valid if scores),
        "judge_invalid_rate": sum(row["invalid"] for row in rows) / asked if asked else None,
        "order_flip_rate": sum(row["flips"] for row in rows) / settled if settled else None,
        "kl": _mean(row["kl"] for row in rows if row["kl"] is not None),
        **_diversity(_of(ROLLOUT, everyone)),
    }  # fmt: skip
    return {name: value for name, value in means.items() if value is not None}


def _of(source: str, candidates: Iterable[Row]) -> list[Row]:
    return [one for one in candidates if one["source"] == source]


def _scores(candidates: Iterable[Row]) -> list[float]:
    return [one["score"] for one in candidates if one["score"] is not None]


def _shares(role: str, chosen: Sequence[Row]) -> dict[str, float | None]:
    """Where those in a role come from."""
    return {
        f"{role}_is_{source}_rate": _mean(one["source"] == source for one in chosen)
        for source in SOURCES
    }


def _diversity(rollouts: Sequence[Row]) -> dict[str, float | None]:
    """Lengths, and different n-grams of tokens among all of them."""
    ids = [one["ids"] for one in rollouts]
    return {
        "rollout_tokens": _mean(map(len, ids)),
        **{f"distinct_{n}": None if math.isnan(found := distinct_n(ids, n)) else found
           for n in (2, 3)},
    }  # fmt: skip


def _mean(values: Iterable[float]) -> float | None:
    listed = list(values)
    return sum(listed) / len(listed) if listed else None


@dataclass(frozen=True)
class Thresholds:
    """Beyond these a step is worth an alert.

    Attributes:
        spread: least difference of the best and the worst of a pool, once `spread_after` steps are
            done: smaller ones teach little.
        rollouts: least share of rollouts among what is preferred, after `rollouts_after` steps.
        gap: how far the originals may lead the rollouts, after `gap_after` steps.
        memory_gib: least memory that is free.
    """

    spread: float = 0.3
    spread_after: int = 50
    rollouts: float = 0.40
    rollouts_after: int = 200
    gap: float = 0.4
    gap_after: int = 500
    memory_gib: float = 4.0


def preference_alerts(
    metrics: Mapping[str, float], step: int, thresholds: Thresholds | None = None
) -> list[str]:
    """What is wrong with a step, a line each; nothing for numbers that are not there.

    Args:
        metrics: of the step; `available_mem_gib` is looked at as well.
        step: its number, from 1.
        thresholds: None: the defaults.
    """
    limits = thresholds or Thresholds()
    least = {
        "pool_spread_mean": (limits.spread, limits.spread_after),
        "chosen_is_rollout_rate": (limits.rollouts, limits.rollouts_after),
        "available_mem_gib": (limits.memory_gib, 0),
    }
    found = [
        f"{name}={metrics[name]:.4f}: under {limit:g}"
        for name, (limit, after) in least.items()
        if step > after and metrics.get(name, limit) < limit
    ]
    means = [metrics.get(f"{source}_mean_score") for source in (ORIGINAL, ROLLOUT)]
    if step > limits.gap_after and None not in means:
        gap = means[0] - means[1]  # type: ignore[operator]
        if gap > limits.gap:
            found.append(f"original_minus_rollout={gap:.4f}: above {limits.gap:g}")
    return found
