"""Pairwise quality of continuations on held-out prefixes, rebuilt from the verdicts alone.

A row is one verdict: the pair it is about, the order in which it was shown, and the winner.
`forward` shows the model's continuation first, `backward` that of its opponent.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from evaluation.grouped import Groups
from evaluation.held_out import document_of
from evaluation.statistics import mcnemar_p, wilson_interval
from rewards.continuation import Pair
from rewards.judge_prompts import category
from rewards.orders import (
    first_position_rate,
    is_turned_first,
    mirrored,
    order_flip_rate,
    settle,
    turned,
)

FORWARD, BACKWARD = "forward", "backward"
BOTH_ORDERS, SEED_RANDOM_SWAP = "both_orders", "seed_random_swap"
PROTOCOLS = (BOTH_ORDERS, SEED_RANDOM_SWAP)
_SCORES = {"first": 1.0, "tie": 0.5, "second": 0.0}
_WINNERS = ("first", "second", "tie", None)
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Quality:
    """How a model's continuations fare against others.

    Attributes:
        protocol: how often, and in which order, pairs were shown.
        pairs: compared.
        documents: that these are from.
        valid: of them, with an outcome.
        invalid: without one.
        win, loss, tie: outcomes for the model.
        win_rate: (win + tie / 2) / valid; None without a valid pair, as are the next three.
        low, high: its 95 % interval (Wilson), a tie as half a success; where valid pairs are of
            fewer documents a bootstrap that draws these, as pairs of one depend on each other (of
            documents that are all alike Wilson's, a trial each).
        p: two-sided exact sign test of win against loss, ties left out; there from the same draws.
        order_flip_rate: contradictions among pairs with two valid verdicts; None where there are
            none, and where pairs are shown once.
        first_position_rate: what was shown first among verdicts for one of two.
        invalid_rate: invalid / pairs.
        reasons: invalid verdicts by kind.
    """

    protocol: str
    pairs: int
    documents: int
    valid: int
    invalid: int
    win: int
    loss: int
    tie: int
    win_rate: float | None
    low: float | None
    high: float | None
    p: float | None
    order_flip_rate: float | None
    first_position_rate: float | None
    invalid_rate: float
    reasons: Mapping[str, int]

    def metrics(self) -> dict[str, float]:
        """The numbers that are known, by name."""
        plain = asdict(self)
        del plain["protocol"], plain["reasons"]
        return {name: value for name, value in plain.items() if value is not None}


def shown_pairs(pair: Pair, protocol: str, seed: int) -> list[tuple[str, Pair]]:
    """How a pair (the model's continuation first) is shown to the judge: orders and pairs.

    Raises:
        ValueError: no such protocol.
    """
    if protocol == BOTH_ORDERS:
        return [(FORWARD, pair), (BACKWARD, turned(pair))]
    if protocol == SEED_RANDOM_SWAP:
        swap = is_turned_first(seed, pair.id)
        return [(BACKWARD, turned(pair)) if swap else (FORWARD, pair)]
    raise ValueError(f"protocol={protocol}: allowed {', '.join(PROTOCOLS)}")


def verdict_row(order: str, shown: Pair, winner: str | None, reason: str) -> dict[str, Any]:
    """A verdict as a row; its texts are there to be read, the count needs none of them."""
    return {
        "id": f"{shown.id}/{order}", "pair": shown.id, "order": order, "prefix": shown.prefix,
        "first": shown.first, "second": shown.second, "reference": shown.reference,
        "winner": winner, "reason": reason,
    }  # fmt: skip


def measure(rows: Iterable[Row], protocol: str) -> Quality:
    """Count verdicts.

    Args:
        rows: with `pair`, `order`, `winner` ("first", "second", "tie" or None, as shown) and, of
            those without one, `reason`; and `document`, where pairs may have it in common.
        protocol: "both_orders": only verdicts that agree decide, others are ties; or
            "seed_random_swap": every pair has one.

    Raises:
        DataError: no rows, or a pair that was not shown as the protocol says.
    """
    pairs = _by_pair(rows, protocol)
    outcomes = [outcome(verdicts) for verdicts in pairs.values()]
    win, loss, tie = (outcomes.count(name) for name in ("first", "second", "tie"))
    valid = win + loss + tie
    documents = [document_of(next(iter(one.values())), "pair") for one in pairs.values()]
    said = [row for verdicts in pairs.values() for row in verdicts.values()]
    both = [(one[FORWARD]["winner"], one[BACKWARD]["winner"]) for one in pairs.values()
            if len(one) == 2]  # fmt: skip
    failed = (row for row in said if row["winner"] is None)
    return Quality(
        protocol=protocol,
        pairs=len(pairs),
        documents=len(set(documents)),
        valid=valid,
        invalid=len(pairs) - valid,
        win=win,
        loss=loss,
        tie=tie,
        order_flip_rate=order_flip_rate(both),
        first_position_rate=first_position_rate([row["winner"] for row in said]),
        invalid_rate=1 - valid / len(pairs),
        reasons=Counter(category(row.get("reason", "")) for row in failed),
        **_win_rate(outcomes, documents)._asdict(),
    )


class _Rate(NamedTuple):
    win_rate: float | None = None
    low: float | None = None
    high: float | None = None
    p: float | None = None


def _win_rate(outcomes: Sequence[str | None], documents: Sequence[str]) -> _Rate:
    """Of valid outcomes; those of one document are drawn together."""
    valid = [(one, name) for one, name in zip(outcomes, documents, strict=True) if one is not None]
    if not valid:
        return _Rate()
    score_M = np.array([_SCORES[one] for one, _ in valid])
    names, group_M = np.unique([name for _, name in valid], return_inverse=True)
    if len(names) == len(valid):
        interval = wilson_interval(float(score_M.sum()), len(valid))
        sign_p = mcnemar_p(outcomes.count("first"), outcomes.count("second"))
        return _Rate(float(score_M.mean()), *interval, sign_p)
    groups = Groups(group_M)
    rate, (_, p) = groups.ratio(score_M), groups.difference(score_M, 1 - score_M)
    low, high = rate.low, rate.high
    if low is not None and high is not None and math.isclose(low, high):
        # Draws of documents that are all alike have no width, however few there are.
        low, high = wilson_interval(float(score_M.mean()) * len(names), len(names))
    return _Rate(rate.value, low, high, p)


def outcome(verdicts: Mapping[str, Row]) -> str | None:
    """What a pair's verdicts by order say: "first" is the model's continuation."""
    if len(verdicts) == 2:
        return settle(verdicts[FORWARD]["winner"], verdicts[BACKWARD]["winner"])
    ((order, row),) = verdicts.items()
    return row["winner"] if order == FORWARD else mirrored(row["winner"])


def _by_pair(rows: Iterable[Row], protocol: str) -> dict[str, dict[str, Row]]:
    """Verdicts by pair and order."""
    pairs: dict[str, dict[str, Row]] = {}
    for row in rows:
        where = f"verdict on {row.get('pair')!r}"
        if row.get("order") not in (FORWARD, BACKWARD) or row.get("winner", "") not in _WINNERS:
            raise DataError(
                f"{where}: order={row.get('order')!r}, winner={row.get('winner')!r}; allowed:"
                " forward or backward, and first, second, tie or null"
            )
        of_pair = pairs.setdefault(row["pair"], {})
        if row["order"] in of_pair:
            raise DataError(f"{where}: a second one of order={row['order']}")
        of_pair[row["order"]] = row
    if not pairs:
        raise DataError("a win rate needs at least 1 verdict, got 0")
    _check_orders(pairs, protocol)
    return pairs


def _check_orders(pairs: Mapping[str, Sequence[str] | Mapping[str, Row]], protocol: str) -> None:
    if protocol not in PROTOCOLS:
        raise DataError(f"protocol={protocol}: allowed {', '.join(PROTOCOLS)}")
    wanted = 2 if protocol == BOTH_ORDERS else 1
    for pair, orders in pairs.items():
        if len(orders) != wanted:
            raise DataError(
                f"verdicts on {pair!r}: shown in {len(orders)} orders; protocol={protocol} has"
                f" {wanted}"
            )
