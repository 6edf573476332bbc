"""The measurement of a scorer: all blocks, every alpha, round and entropy; and its metrics.

Legend: M blocks.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from evaluation.grouped import RESAMPLES, Groups, Measure
from evaluation.scorer import (
    ALPHAS,
    Baselines,
    Bools,
    Gate,
    ScoredBlocks,
    Selection,
    baselines,
    check_blocks,
    selection,
    ship_gate,
    sweep,
)
from evaluation.scorer_quality import Calibration, Ordering, calibration, ordering

BUCKETS = 4


class Part(NamedTuple):
    """Everything about some of the blocks, or about one round of scoring."""

    name: str
    selection: Selection
    ordering: Ordering
    calibration: Calibration


class ScorerEvaluation(NamedTuple):
    """A measured scorer.

    Attributes:
        whole: all blocks.
        sweep: picking with every alpha.
        gate: whether it ships.
        baselines: what no scorer is needed for.
        rounds: by round of scoring, the candidates as they ended up.
        buckets: by entropy of the draft, quantiles.
    """

    whole: Part
    sweep: list[Selection]
    gate: Gate
    baselines: Baselines
    rounds: list[Part]
    buckets: list[Part]


def evaluate(
    blocks: ScoredBlocks,
    alpha: float,
    alphas: Sequence[float] = ALPHAS,
    buckets: int = BUCKETS,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> ScorerEvaluation:
    """Measure a scorer on held-out blocks.

    Args:
        blocks: candidates with their scores.
        alpha: weight with which it is to be used.
        alphas: of the sweep.
        buckets: of entropy, with about as many blocks each.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: blocks that cannot be measured.
    """
    check_blocks(blocks)
    groups = Groups(blocks.group_M, resamples, seed)
    whole = _part("all", blocks, alpha, groups)
    rounds = [
        _part(f"round {number + 1}", blocks.round(number), alpha, groups)
        for number in range(len(blocks.score_RMC))
    ]
    parts = []
    for name, chosen_M in entropy_buckets(blocks, buckets):
        some = blocks.among(chosen_M)
        parts.append(_part(name, some, alpha, Groups(some.group_M, resamples, seed)))
    return ScorerEvaluation(
        whole,
        sweep(blocks, groups, alphas),
        ship_gate(whole.selection, groups),
        baselines(blocks, groups),
        rounds,
        parts,
    )


def _part(name: str, blocks: ScoredBlocks, alpha: float, groups: Groups) -> Part:
    return Part(
        name,
        selection(blocks, alpha, groups),
        ordering(blocks, groups),
        calibration(blocks, groups),
    )


def entropy_buckets(blocks: ScoredBlocks, buckets: int) -> Iterator[tuple[str, Bools]]:
    """Name and mask of every bucket with a block; equal entropies share one."""
    inner = np.quantile(blocks.entropy_M, np.linspace(0, 1, buckets + 1)[1:-1])
    place_M = np.searchsorted(inner, blocks.entropy_M, side="left")
    for place in np.unique(place_M):
        chosen_M = place_M == place
        inside = blocks.entropy_M[chosen_M]
        yield f"entropy {inside.min():.3g} to {inside.max():.3g}", chosen_M


def alpha_name(alpha: float) -> str:
    """As in tables and keys: 0.05, 1, inf."""
    return f"{alpha:g}"


def metrics_of(found: ScorerEvaluation) -> dict[str, float]:
    """Scalars for summary.json; what has no value is left out.

    `oracle`, `gain`, `gain_low`, ... of all blocks, `round_1/...`, `entropy_1/...` (the least
    first) of parts, `alpha_0.1/...` of the sweep, `baseline/...`, and `ships` 0 or 1.
    """
    metrics: dict[str, float] = {"ships": float(found.gate.ships), "groups": found.gate.groups}
    metrics |= _part_metrics(found.whole, "")
    for kind, parts in (("round", found.rounds), ("entropy", found.buckets)):
        for number, part in enumerate(parts, start=1):
            metrics |= _part_metrics(part, f"{kind}_{number}/")
    for one in found.sweep:
        metrics |= scalars(one, f"alpha_{alpha_name(one.alpha)}/")
    return metrics | scalars(found.baselines, "baseline/")


def _part_metrics(part: Part, prefix: str) -> dict[str, float]:
    parts = (part.selection, part.ordering, part.calibration)
    return {key: value for one in parts for key, value in scalars(one, prefix).items()}


def scalars(found: tuple, prefix: str) -> dict[str, float]:
    """The numbers of a NamedTuple under its names, a measure with `_low` and `_high`."""
    metrics: dict[str, float] = {}
    for name, value in zip(found._fields, found, strict=True):  # type: ignore[attr-defined]
        key = prefix + name
        if isinstance(value, Measure):
            ends = {key: value.value, f"{key}_low": value.low, f"{key}_high": value.high}
            metrics |= {end: number for end, number in ends.items() if number is not None}
        elif isinstance(value, int | float) and math.isfinite(value):
            metrics[key] = value
    return metrics
