"""Scores of the candidates of a pool: a tournament before a pairwise judge, a reward each, or both.

    pairwise    score(c) = mean outcome of c against those it met: 1 won, 1/2 tied, 0 lost
    pointwise   score(c) = what a reward says of c (safety, factuality, a checked answer)
    both        score(c) = the sum (safety + quality, factuality + quality; arXiv 2601.21343)

A full tournament over N candidates has N (N - 1) / 2 comparisons, and against a pivot N - 1; in
both orders twice as many questions are asked. A verdict that is invalid counts for neither.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch

from objectives.preference import tournament_scores
from rewards.continuation import Case, ContinuationReward, Pair, PairwiseJudge
from rewards.orders import compare_both_orders, compare_in_drawn_order, mirrored

BOTH, ONE = ORDERS = ("both", "one")
_OUTCOMES = {"first": 1.0, "tie": 0.5, "second": 0.0, None: math.nan}
Match = tuple[int, int]


@dataclass(frozen=True)
class Pool:
    """Candidates for what follows a prefix.

    Attributes:
        id: of the pool; orders that are drawn depend on it.
        prefix: the text before them.
        reference: how it goes on in truth, for judges that read it.
        candidates: their texts; the first one is the pivot.
    """

    id: str
    prefix: str
    reference: str
    candidates: Sequence[str]


@dataclass(frozen=True)
class Scored:
    """What became of a pool.

    Attributes:
        scores: one per candidate; nan: nothing valid was said of it.
        asked: comparisons or judgements that were asked for.
        invalid: those of them without a valid outcome.
        settled: comparisons with two valid verdicts, one in each order.
        flips: those of them whose verdicts contradict each other.
    """

    scores: list[float]
    asked: int
    invalid: int
    settled: int = 0
    flips: int = 0


class PoolScorer(Protocol):
    """Gives the candidates of pools their scores."""

    def score(self, pools: Sequence[Pool]) -> list[Scored]:
        """One result per pool, in order.

        Raises:
            ValueError: a judge that cannot be reached, or too much of what it says is invalid.
        """
        ...


def _everyone(candidates: int) -> list[Match]:
    return [(a, b) for a in range(candidates) for b in range(a + 1, candidates)]


def _with_the_first(candidates: int) -> list[Match]:
    return [(0, other) for other in range(1, candidates)]


MATCHES: dict[str, Callable[[int], list[Match]]] = {"full": _everyone, "pivot": _with_the_first}


class Tournament:
    """Candidates meet before a pairwise judge; all pools are asked about together.

    Candidates of the same text are equal without being asked about, and no outcome is counted of
    them but the tie.

    Args:
        judge: compares two.
        matches: who meets whom, a name in `MATCHES`: "full" everyone everyone else, "pivot"
            everyone the first candidate alone.
        orders: "both" asks (A, B) and (B, A), and verdicts that contradict each other are a tie;
            "one" asks in an order that is drawn by seed and pair.
        seed: of these draws.

    Raises:
        ValueError: a name that is not listed.
    """

    def __init__(
        self, judge: PairwiseJudge, matches: str = "full", orders: str = BOTH, seed: int = 0
    ) -> None:
        for name, value, allowed in (
            ("tournament", matches, tuple(MATCHES)), ("orders", orders, ORDERS)
        ):  # fmt: skip
            if value not in allowed:
                raise ValueError(f"{name}={value}: allowed {', '.join(allowed)}")
        self.judge, self.matches, self.orders, self.seed = judge, matches, orders, seed

    def score(self, pools: Sequence[Pool]) -> list[Scored]:
        """Mean outcomes, in [0, 1]."""
        meetings = [MATCHES[self.matches](len(pool.candidates)) for pool in pools]
        pairs = [
            Pair(f"{pool.id}/{a}/{b}", pool.prefix, pool.candidates[a], pool.candidates[b],
                 pool.reference)
            for pool, matches in zip(pools, meetings, strict=True)
            for a, b in matches
            if pool.candidates[a] != pool.candidates[b]
        ]  # fmt: skip
        said = iter(self._ask(pairs))
        found = []
        for pool, matches in zip(pools, meetings, strict=True):
            same = [pool.candidates[a] == pool.candidates[b] for a, b in matches]
            verdicts = [("tie", None) if equal else next(said) for equal in same]
            asked = [verdict for verdict, equal in zip(verdicts, same, strict=True) if not equal]
            scores = _mean_outcomes(
                matches, [winner for winner, _ in verdicts], len(pool.candidates)
            )
            flips = [flipped for _, flipped in asked if flipped is not None]
            invalid = sum(winner is None for winner, _ in asked)
            found.append(Scored(scores, len(asked), invalid, len(flips), sum(flips)))
        return found

    def _ask(self, pairs: Sequence[Pair]) -> list[tuple[str | None, bool | None]]:
        """The winner of every pair, and whether its order decided; None: that is not known."""
        if self.orders == ONE:
            said = compare_in_drawn_order(self.judge, pairs, self.seed)
            return [(one.winner, None) for one in said]
        both = compare_both_orders(self.judge, pairs)
        turns = zip(both.outcomes, both.forward, both.backward, strict=True)
        return [
            (one.winner, None if one.winner is None else there.winner != mirrored(back.winner))
            for one, there, back in turns
        ]


def _mean_outcomes(
    matches: Sequence[Match], winners: Sequence[str | None], candidates: int
) -> list[float]:
    first_M = torch.tensor([a for a, _ in matches], dtype=torch.long)
    second_M = torch.tensor([b for _, b in matches], dtype=torch.long)
    win_M = torch.tensor([_OUTCOMES[winner] for winner in winners], dtype=torch.float64)
    return tournament_scores(first_M, second_M, win_M, candidates).tolist()


class Pointwise:
    """A reward for every candidate by itself.

    Args:
        reward: scores one.
    """

    def __init__(self, reward: ContinuationReward) -> None:
        self.reward = reward

    def score(self, pools: Sequence[Pool]) -> list[Scored]:
        """Rewards as they are."""
        said = iter(
            self.reward.judge(
                [
                    Case(f"{pool.id}/{n}", pool.prefix, pool.reference, text)
                    for pool in pools
                    for n, text in enumerate(pool.candidates)
                ]
            )
        )
        found = []
        for pool in pools:
            scores = [next(said).score for _ in pool.candidates]
            known = [math.nan if score is None else float(score) for score in scores]
            found.append(Scored(known, len(scores), scores.count(None)))
        return found


class Summed:
    """The sum of several scores; nan as soon as one of them is."""

    def __init__(self, parts: Sequence[PoolScorer]) -> None:
        self.parts = parts

    def score(self, pools: Sequence[Pool]) -> list[Scored]:
        """Sums of scores and of counts."""
        total, *others = [part.score(pools) for part in self.parts]
        for scored in others:
            total = [_added(one, other) for one, other in zip(total, scored, strict=True)]
        return total


def _added(one: Scored, other: Scored) -> Scored:
    counts = {
        name: getattr(one, name) + getattr(other, name)
        for name in ("asked", "invalid", "settled", "flips")
    }
    scores = [a + b for a, b in zip(one.scores, other.scores, strict=True)]
    return replace(one, scores=scores, **counts)
