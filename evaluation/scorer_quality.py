"""The order a score gives to candidates, and whether its softmax means what it says.

Order, against the number of wrong tokens:

    pairwise   of two candidates of a block with different numbers of errors, how often the one with
               fewer scores higher; equal scores count a half
    tau        Kendall's tau-b (1945) of score and -errors over all pairs of a block, pooled:
               sum sign(ds) sign(de) / sqrt(sum sign(ds)^2 sum sign(de)^2)
    rank1, mrr of the truth among itself and the candidates that are wrong; equal scores are drawn
               by lot, on average, so a constant score is at chance

Calibration of p_j = softmax(S)_j over the candidates of a block. The event is "candidate j is the
truth, given that the truth is among the candidates", so blocks with the truth among at least two
candidates count, and every candidate of theirs is one observation (p, y):

    ece        sum over 15 equal bins of |sum of p - y in the bin| / observations; it is never 0 by
               chance, and larger with fewer observations (Guo et al. 2017, arXiv 1706.04599)
    brier      mean of (p - y)^2
    auroc      P(p of a truth > p of another) over all pairs of observations, equal ones a half

Legend: M blocks, C candidates, O observations, B bins, D resamples.
"""

import math
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from evaluation.grouped import Floats, Groups, Ints, Measure, quotient
from evaluation.scorer import Bools, ScoredBlocks
from evaluation.statistics import Interval, wilson_interval

BINS = 15


class Ordering(NamedTuple):
    """How well the score orders: over pairs, or over blocks with a wrong candidate.

    `chance_rank1` and `chance_mrr` are those of a score that knows nothing, on the same blocks.
    """

    pairwise: Measure
    tau: Measure
    rank1: Measure
    mrr: Measure
    chance_rank1: float | None
    chance_mrr: float | None


def ordering(blocks: ScoredBlocks, groups: Groups) -> Ordering:
    """Order among the candidates, and of the truth before the wrong ones."""
    agree_M, by_score_M, by_errors_M, right_M = _pairs(blocks)
    sums = groups.sums(np.stack([agree_M, by_score_M, by_errors_M], axis=-1))
    tau_D = _tau(groups.times_DG @ sums)
    tau = groups.measure(float(_tau(sums.sum(0))), tau_D, float(by_errors_M.sum()))
    rival_MC = blocks.valid_MC & (blocks.errors_MC > 0)
    ranked_M = rival_MC.any(-1) & np.isfinite(blocks.truth_score_M)
    truth_M1 = blocks.truth_score_M[:, None]
    better_M = (rival_MC & (blocks.score_MC > truth_M1)).sum(-1)
    equal_M = (rival_MC & (blocks.score_MC == truth_M1)).sum(-1)
    rivals_M = rival_MC.sum(-1)
    first_M, reciprocal_M = expected_rank(better_M, equal_M)
    lone_M, lone_reciprocal_M = expected_rank(np.zeros_like(rivals_M), rivals_M)
    return Ordering(
        pairwise=groups.ratio(right_M, by_errors_M),
        tau=tau,
        rank1=groups.ratio(first_M * ranked_M, ranked_M),
        mrr=groups.ratio(reciprocal_M * ranked_M, ranked_M),
        chance_rank1=groups.ratio(lone_M * ranked_M, ranked_M).value,
        chance_mrr=groups.ratio(lone_reciprocal_M * ranked_M, ranked_M).value,
    )


def _pairs(blocks: ScoredBlocks) -> tuple[Floats, Floats, Floats, Floats]:
    """[M] sums over pairs: signs' product, pairs that differ in score, in errors, pairwise hits."""
    here = np.triu(blocks.valid_MC[:, :, None] & blocks.valid_MC[:, None], k=1)
    score_MC = np.where(blocks.valid_MC, blocks.score_MC, 0.0)
    score = np.sign(score_MC[:, :, None] - score_MC[:, None]) * here
    errors = -np.sign(blocks.errors_MC[:, :, None] - blocks.errors_MC[:, None]) * here
    agree_M, by_score_M, by_errors_M = (
        x.sum((-2, -1)).astype(np.float64) for x in (score * errors, score**2, errors**2)
    )
    return agree_M, by_score_M, by_errors_M, (agree_M + by_errors_M) / 2


def _tau(sums: Floats) -> Floats:
    """tau-b of [..., 3] sums; nan where no pair differs in either."""
    agree, by_score, by_errors = np.moveaxis(sums, -1, 0)
    return quotient(agree, np.sqrt(by_score * by_errors))


def expected_rank(better: Ints, equal: Ints) -> tuple[Floats, Floats]:
    """P(first) and the mean of 1 / rank behind `better`, with lots drawn among `equal` others."""
    most = int((better + equal).max(initial=0)) + 1
    harmonic = np.concatenate([[0.0], np.cumsum(1 / np.arange(1, most + 1))])
    reciprocal = (harmonic[better + equal + 1] - harmonic[better]) / (equal + 1)
    return (better == 0) / (equal + 1), reciprocal


class Bin(NamedTuple):
    """Observations with p in [low, high): how many, their mean p, and how often it is the truth.

    The interval is Wilson's, which takes observations for independent; None in an empty bin.
    """

    low: float
    high: float
    observations: int
    mean: float | None
    rate: float | None
    interval: Interval | None


class Calibration(NamedTuple):
    """Of softmax(S); `decidable` blocks have the truth among at least two candidates."""

    decidable: int
    ece: Measure
    brier: Measure
    auroc: Measure
    bins: list[Bin]


def softmax_scores(blocks: ScoredBlocks) -> Floats:
    """[M, C] softmax of S over the candidates of a block; 0 at the others."""
    score_MC = np.where(blocks.valid_MC, blocks.score_MC, -np.inf)
    weight_MC = np.exp(score_MC - score_MC.max(-1, keepdims=True))
    return weight_MC / weight_MC.sum(-1, keepdims=True)


def calibration(blocks: ScoredBlocks, groups: Groups, bins: int = BINS) -> Calibration:
    """ECE, Brier score, AUROC and the bins of a reliability diagram."""
    used_M = blocks.truth_in_set_M & (blocks.valid_MC.sum(-1) > 1)
    seen_MC = blocks.valid_MC & used_M[:, None]
    p_MC, y_MC = softmax_scores(blocks), blocks.is_truth_MC.astype(np.float64)
    place_MC = np.minimum((p_MC * bins).astype(np.int64), bins - 1)
    gap_MC = np.where(seen_MC, p_MC - y_MC, 0.0)
    seen_M = seen_MC.sum(-1)
    return Calibration(
        decidable=int(used_M.sum()),
        ece=_ece(gap_MC, place_MC, seen_M, bins, groups),
        brier=groups.ratio((gap_MC**2).sum(-1), seen_M),
        auroc=_auroc(p_MC, seen_MC, blocks.is_truth_MC, groups),
        bins=[_bin(p_MC, y_MC, seen_MC & (place_MC == b), b, bins) for b in range(bins)],
    )


def _ece(gap_MC: Floats, place_MC: Ints, seen_M: Ints, bins: int, groups: Groups) -> Measure:
    gap_MB = np.stack([(gap_MC * (place_MC == b)).sum(-1) for b in range(bins)], axis=-1)
    sums = groups.sums(np.concatenate([gap_MB, seen_M[:, None]], axis=-1).astype(np.float64))

    def value(totals: Floats) -> Floats:
        """Of [..., B + 1] sums."""
        return quotient(np.abs(totals[..., :-1]).sum(-1), totals[..., -1])

    found = value(sums.sum(0))
    return groups.measure(float(found), value(groups.times_DG @ sums), float(seen_M.sum()))


def _auroc(p_MC: Floats, seen_MC: Bools, truth_MC: Bools, groups: Groups) -> Measure:
    block_O = np.broadcast_to(np.arange(len(p_MC))[:, None], p_MC.shape)[seen_MC]
    levels, level_O = np.unique(p_MC[seen_MC], return_inverse=True)
    truth_O = truth_MC[seen_MC]

    def value(times_M: Floats) -> float:
        """With every block counted as often as said."""
        times_O = times_M[block_O]
        hits = np.bincount(level_O, times_O * truth_O, len(levels))
        misses = np.bincount(level_O, times_O * ~truth_O, len(levels))
        pairs = hits.sum() * misses.sum()
        below = np.cumsum(misses) - misses / 2
        return float((hits * below).sum() / pairs) if pairs else math.nan

    draws = (value(groups.times_of_blocks(d)) for d in range(len(groups.times_DG)))
    return groups.measure(value(np.ones(len(p_MC))), np.array(list(draws)), float(len(block_O)))


def _bin(p_MC: Floats, y_MC: Floats, here_MC: Bools, number: int, bins: int) -> Bin:
    ends, count = (number / bins, (number + 1) / bins), int(here_MC.sum())
    if not count:
        return Bin(*ends, 0, None, None, None)
    truths = int(y_MC[here_MC].sum())
    mean = float(p_MC[here_MC].mean())
    return Bin(*ends, count, mean, truths / count, wilson_interval(truths, count))


class LeakProbe(NamedTuple):
    """How often slot 0 comes first although nothing in it deserves that.

    Attributes:
        sets: with at least two valid slots.
        first: in how many slot 0 came first; equal scores by their share.
        rate, interval: of these, Wilson's 95 %.
        chance: mean of 1 / valid slots.
        at_chance: whether the interval holds it. If not, the score knows the slot by how it is fed
            (say, hard tokens against soft ones) and not by what it says.
    """

    sets: int
    first: float
    rate: float
    interval: Interval
    chance: float
    at_chance: bool


def leak_probe(score_MC: Floats, valid_MC: Bools) -> LeakProbe:
    """Of sets in which slot 0, where the truth is in training, holds one candidate more.

    The n + 1 slots have to be draws that could change places: slot 0 a further candidate, or one of
    them taken out of its slot, which is then not valid.

    Args:
        score_MC: of all slots.
        valid_MC: slots that hold a candidate.

    Raises:
        DataError: no set with two valid slots, slot 0 among them.
    """
    used_M = valid_MC[:, 0] & (valid_MC.sum(-1) > 1)
    if not used_M.any():
        raise DataError("a leak probe needs at least 1 set with 2 valid slots, slot 0 one of them")
    score_MC, valid_MC = score_MC[used_M], valid_MC[used_M]
    rivals_MC, own_M1 = valid_MC[:, 1:], score_MC[:, :1]
    better_M = (rivals_MC & (score_MC[:, 1:] > own_M1)).sum(-1)
    equal_M = (rivals_MC & (score_MC[:, 1:] == own_M1)).sum(-1)
    sets, first = len(score_MC), float(expected_rank(better_M, equal_M)[0].sum())
    interval = wilson_interval(round(first), sets)
    chance = float((1 / valid_MC.sum(-1)).mean())
    at_chance = interval.low <= chance <= interval.high
    return LeakProbe(sets, first, first / sets, interval, chance, at_chance)
