"""Comparing in both orders, because a judge may prefer what it reads first."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data.fingerprint import unit_hash
from rewards.continuation import Pair, PairwiseJudge, Preference

_MIRRORED = {"first": "second", "second": "first", "tie": "tie", None: None}


def turned(pair: Pair) -> Pair:
    """The same candidates, shown the other way round."""
    return replace(pair, first=pair.second, second=pair.first)


def mirrored(winner: str | None) -> str | None:
    """A verdict on a turned pair as one on the pair."""
    return _MIRRORED[winner]


def settle(forward: str | None, backward: str | None) -> str | None:
    """The winner of a pair by two verdicts, each as it was shown.

    What both say counts; where they contradict each other it is a tie; without both of them there
    is no valid verdict.
    """
    again = mirrored(backward)
    if forward is None or again is None:
        return None
    return forward if forward == again else "tie"


def is_turned_first(seed: int, pair_id: str) -> bool:
    """Which order a pair is shown in where it is shown in one alone: heads or tails by its id."""
    return unit_hash(f"order/{seed}/{pair_id}") < 0.5


@dataclass(frozen=True)
class BothOrders:
    """Pairs that were shown in both orders.

    Attributes:
        outcomes: which candidate of every pair is better.
        forward: what was said of the pair.
        backward: what was said of the turned pair, as it was shown.
    """

    outcomes: list[Preference]
    forward: list[Preference]
    backward: list[Preference]

    @property
    def order_flip_rate(self) -> float | None:
        """Share of contradictions among pairs with two valid verdicts; None: there are none."""
        return order_flip_rate(
            [(a.winner, b.winner) for a, b in zip(self.forward, self.backward, strict=True)]
        )

    @property
    def first_position_rate(self) -> float | None:
        """Share of what was shown first among verdicts for one of two; None: there are none."""
        return first_position_rate([one.winner for one in (*self.forward, *self.backward)])

    @property
    def invalid_rate(self) -> float | None:
        """Share of pairs without a valid outcome; None without pairs."""
        return invalid_rate([one.winner for one in self.outcomes])


def compare_both_orders(judge: PairwiseJudge, pairs: Sequence[Pair]) -> BothOrders:
    """Ask about every pair twice, (A, B) and (B, A); only consistent verdicts decide.

    A judge that always prefers the same position then says "tie" everywhere. An outcome's winner
    is "first" or "second" of the pair as it was given.

    Raises:
        ValueError: a judge that cannot be reached, or too much of what it says is invalid.
    """
    said = judge.compare([*pairs, *map(turned, pairs)])
    forward, backward = said[: len(pairs)], said[len(pairs) :]
    outcomes = [
        Preference(settle(one.winner, other.winner), one.reason or other.reason)
        for one, other in zip(forward, backward, strict=True)
    ]
    return BothOrders(outcomes, forward, backward)


def compare_in_drawn_order(
    judge: PairwiseJudge, pairs: Sequence[Pair], seed: int
) -> list[Preference]:
    """Ask about every pair once, in an order drawn by seed and id; winners are those of the pair.

    Half the calls; a judge's bias becomes noise in place of ties.
    """
    swapped = [is_turned_first(seed, pair.id) for pair in pairs]
    shown = [turned(one) if swap else one for one, swap in zip(pairs, swapped, strict=True)]
    said = judge.compare(shown)
    return [
        Preference(mirrored(one.winner), one.reason) if swap else one
        for one, swap in zip(said, swapped, strict=True)
    ]


def order_flip_rate(verdicts: Sequence[tuple[str | None, str | None]]) -> float | None:
    """Of pairs with two valid verdicts (each as shown), those that contradict each other."""
    valid = [(a, mirrored(b)) for a, b in verdicts if a is not None and b is not None]
    return _share(sum(a != b for a, b in valid), len(valid))


def first_position_rate(winners: Sequence[str | None]) -> float | None:
    """Of verdicts for one of two, as shown, those for the one shown first."""
    decided = [winner for winner in winners if winner in ("first", "second")]
    return _share(decided.count("first"), len(decided))


def invalid_rate(winners: Sequence[str | None]) -> float | None:
    """The share without a valid verdict."""
    return _share(list(winners).count(None), len(winners))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
