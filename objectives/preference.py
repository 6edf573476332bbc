"""Preference among candidates: tournament scores, which pairs are learned from, DPO and RF-NLL.

Every candidate of a pool meets the others before a judge; its score is the mean of its outcomes.
The loss then needs few of them: the best and the worst (self-improving pretraining, arXiv
2601.21343: all pairs are judged, one is trained on), or more pairs by choice.

    DPO     -log sigmoid(beta [(log pi(w) - log ref(w)) - (log pi(l) - log ref(l))])
    RF-NLL  -log pi(best)

log pi of a continuation is the sum over its tokens: a mean would let DPO win by length.

Legend: N candidates or pairs, M comparisons, P scored tokens. Log-probabilities in nats.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from objectives.contrastive import exact
from objectives.keyed import keyed_phase

# Scores that agree to so many digits are equal: sums of components differ in the last bits.
_DIGITS = 6


class PreferenceTerms(NamedTuple):
    """Of every pair.

    loss_N: -log sigmoid(margin), with its gradient.
    margin_N: beta times the difference of the implicit rewards, detached; above 0 the policy
        prefers the winner by more than the reference does.
    """

    loss_N: Float[Tensor, " N"]
    margin_N: Float[Tensor, " N"]


def dpo_loss(
    chosen_logp_N: Float[Tensor, " N"],
    rejected_logp_N: Float[Tensor, " N"],
    chosen_reference_N: Float[Tensor, " N"],
    rejected_reference_N: Float[Tensor, " N"],
    beta: float | int,
) -> PreferenceTerms:
    """Direct preference optimisation (arXiv 2305.18290, eq. 7); the batch is the mean over pairs.

    d loss / d log pi(w) = -beta sigmoid(-margin), and the opposite for log pi(l): ln 2 and
    -beta / 2 where the policy is the reference.

    Args:
        chosen_logp_N: log pi(w), summed over tokens; rejected_logp_N the same of l.
        chosen_reference_N: log ref(w); rejected_reference_N of l. No gradient.
        beta: how strongly the reference holds.
    """
    policy_N = exact(chosen_logp_N) - exact(rejected_logp_N)
    reference_N = exact(chosen_reference_N.detach()) - exact(rejected_reference_N.detach())
    margin_N = beta * (policy_N - reference_N)
    return PreferenceTerms(F.softplus(-margin_N), margin_N.detach())


class LikelihoodTerms(NamedTuple):
    """loss: the sum of -log p, with its gradient; weight: the number of tokens."""

    loss: Float[Tensor, ""]
    weight: Float[Tensor, ""]


def filtered_likelihood(logp_P: Float[Tensor, " P"]) -> LikelihoodTerms:
    """RF-NLL: -sum log p over the tokens of the best candidate of each pool.

    The loss of a global batch is the sum of the sums / the number of all tokens, so that long
    candidates weigh as in plain pretraining.
    """
    logp_P = exact(logp_P)
    return LikelihoodTerms(-logp_P.sum(), logp_P.new_tensor(float(len(logp_P))))


def tournament_scores(
    first_M: Int[Tensor, " M"],
    second_M: Int[Tensor, " M"],
    win_M: Float[Tensor, " M"],
    candidates: int,
) -> Float[Tensor, " N"]:
    """Mean outcome of every candidate: wins / (N - 1) if it met each of the others once.

    Pools may be scored together if their candidates have numbers of their own.

    Args:
        first_M: number of the candidate that `win_M` speaks of; second_M of its opponent.
        win_M: 1 if the first has won, 0 if the second has, 0.5 for a tie; nan: no valid verdict,
            which counts for neither and lowers nobody's score.
        candidates: N.

    Returns:
        Scores in [0, 1]; nan for a candidate without a valid comparison.
    """
    valid_M = (~win_M.isnan()).double()
    won_M = win_M.double().nan_to_num(0.0)
    total_N = torch.zeros(candidates, dtype=torch.float64, device=win_M.device)
    met_N = total_N.index_add(0, first_M, valid_M).index_add(0, second_M, valid_M)
    total_N = total_N.index_add(0, first_M, won_M).index_add(0, second_M, valid_M - won_M)
    return total_N / met_N


def _ranked(score_N: Tensor, key: Sequence[int]) -> list[tuple[float, int]]:
    """(score, candidate), best first, without nan; equal scores in an order rotated by the key.

    The rotation is among those that are equal, so that each is as likely as the others to lead.
    """
    groups: dict[float, list[int]] = {}
    for candidate, score in enumerate(score_N.tolist()):
        if not math.isnan(score):
            groups.setdefault(round(score, _DIGITS), []).append(candidate)
    ranked: list[tuple[float, int]] = []
    for place, score in enumerate(sorted(groups, reverse=True)):
        tied = groups[score]
        turn = int(keyed_phase((*key, place)) * len(tied)) if len(tied) > 1 else 0
        ranked.extend((score, candidate) for candidate in tied[turn:] + tied[:turn])
    return ranked


def _best_worst(places: int, k: int) -> list[tuple[int, int]]:
    return _top_bottom(places, 1)


def _top_bottom(places: int, k: int) -> list[tuple[int, int]]:
    return [(place, places - 1 - place) for place in range(min(k, places // 2))]


def _all_pairs(places: int, k: int) -> list[tuple[int, int]]:
    return [(above, below) for above in range(places) for below in range(above + 1, places)]


PAIRINGS: dict[str, Callable[[int, int], list[tuple[int, int]]]] = {
    "best_worst": _best_worst,
    "all_pairs": _all_pairs,
    "top_k_bottom_k": _top_bottom,
}


def choose_pairs(
    score_N: Float[Tensor, " N"],
    pairing: str = "best_worst",
    *,
    k: int = 1,
    key: Sequence[int],
) -> list[tuple[int, int]]:
    """(winner, loser) of the pairs to learn from, those whose scores differ.

    best_worst takes the best and the worst; top_k_bottom_k the i-th best with the i-th worst, i = 1
    .. k, so that no candidate is in two pairs; all_pairs takes every two.

    Args:
        score_N: scores; nan: the candidate is left out.
        pairing: a name in `PAIRINGS`.
        k: of `top_k_bottom_k` alone.
        key: what the choice among equals is for, e.g. (seed, step, prefix).

    Raises:
        ValueError: a name that is not listed, or k below 1.
    """
    if pairing not in PAIRINGS:
        raise ValueError(f"pairing={pairing}: allowed {', '.join(PAIRINGS)}")
    if k < 1:
        raise ValueError(f"k={k}: allowed k >= 1")
    ranked = _ranked(score_N, key)
    places = PAIRINGS[pairing](len(ranked), k)
    chosen = [(ranked[above], ranked[below]) for above, below in places]
    return [(winner, loser) for (high, winner), (low, loser) in chosen if high > low]


def best_candidate(score_N: Float[Tensor, " N"], key: Sequence[int]) -> int | None:
    """The candidate with the highest score, one of the equal ones by key; None if all are nan."""
    ranked = _ranked(score_N, key)
    return ranked[0][1] if ranked else None
