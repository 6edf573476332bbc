"""What decoding adds to a score, and whether that fits the way the score was trained.

A candidate c has a log-probability l = log q(c) under the proposal and a score gamma s; picked is
the largest of

    additive     l + alpha gamma s                (arXiv 2606.08357)
    convex       (1 - alpha) l + alpha gamma s    in the order of additive with alpha / (1 - alpha)
    scorer_only  gamma s                          the limit of both: alpha = inf, alpha = 1

alpha = 0 is the proposal's own order, so that candidate 0 wins: greedy decoding.

To pick the most probable candidate, log p0 has to come out, up to a constant of the context.
`objectives/contrastive.py` says what gamma s becomes; hence

    trained with                     gamma s       log p0              refused
    ranking, binary; q_T             log p0/q_T    log q_T + gamma s   a, b, c
    ranking_corrected; q_T           log p0        gamma s             d
    ranking; deterministic beam      log p0 on it  gamma s             c
    ranking_corrected; such a beam   log p0 q                          e
    binary; such a beam              logit p0                          e

    a  scorer_only: a ratio is large where q_T is small, whatever p0 is there.
    b  l at another temperature: log q_T' + gamma s keeps log q_T' - log q_T. From l at T = 1 and
       samples at T the right sum is l / T + gamma s.
    c  candidates of another proposal. What a beam never offered was a truth without ever being a
       negative, and its score has no bound; a scorer of samples is fitted where q_T puts its mass.
    d  additive or convex: q has been divided out already, and is counted again.
    e  always: what is sure to be proposed has no density q to divide by. log q of the beam would
       come out as a factor of p0, and not log p0/q_T, which `binary` is meant to give.

All of this is of candidates as they are drawn. With `bon.rounds` above 1 those of later rounds are
refined, and no draws of q: `ranking` on samples is then no exact ratio, the other two are refused.

Nothing is refused at alpha = 0. The weight stays free where l + alpha s is right: 1 is exact for
a perfect scorer; a weak one deserves less. With masked copies or distinct draws gamma s lies
between log p0/q_T and log p0, and deserves more. So alpha has to be swept on held-out blocks for
every checkpoint, and a value found with one proposal says nothing about another. A beam does not
depend on T, which only rescales its l: T is compared for samples alone.
"""

import math
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

FORMS = ("additive", "convex", "scorer_only")
# What a score becomes, up to a constant of the context.
RATIO, TARGET = "log p0 - log q", "log p0"
# Proposals, and whether what they offer is certain, so that no candidate has a density.
DETERMINISTIC = {"softmax_sampling": False, "beam_bayes": True, "beam_exact": True}


class ProposalLaw(NamedTuple):
    """Where candidates come from, and the l that decoding adds.

    name: in `DETERMINISTIC`, or any other with `deterministic` given.
    temperature: T of q_T, in drawing and in l.
    deterministic: whether it proposes the same every time; None: as listed.
    """

    name: str
    temperature: float | int = 1.0
    deterministic: bool | None = None


class Learns(NamedTuple):
    """What gamma s of a loss becomes: RATIO or TARGET.

    sampled: with negatives drawn from the proposal.
    beam: with those of a deterministic beam; None: refused.
    """

    sampled: str
    beam: str | None


LEARNS = {
    "ranking": Learns(RATIO, TARGET),
    "ranking_corrected": Learns(TARGET, None),
    "binary": Learns(RATIO, None),
}


def additive_weight(alpha: float | int, form: str) -> float:
    """The alpha of `additive` that orders candidates in the same way; inf: by the score alone.

    Raises:
        ValueError: a form that is not listed, or alpha outside [0, inf] (convex: [0, 1]).
    """
    if form not in FORMS:
        raise ValueError(f"bon.form={form}: allowed {', '.join(FORMS)}")
    if form == "scorer_only":
        return math.inf
    most = 1 if form == "convex" else math.inf
    if not 0 <= alpha <= most:
        raise ValueError(f"bon.alpha={alpha}: allowed 0 <= alpha <= {most} with bon.form={form}")
    if form == "convex":
        return math.inf if alpha == 1 else alpha / (1 - alpha)
    return float(alpha)


def decode_score(
    log_q: Float[Tensor, "*S"],
    score: Float[Tensor, "*S"],
    alpha: float | int = 1.0,
    form: str = "additive",
) -> Float[Tensor, "*S"]:
    """l and gamma s as one value per candidate; alpha = 0 is l and alpha = inf gamma s, bit by bit.

    Raises:
        ValueError: as `additive_weight`.
    """
    weight = additive_weight(alpha, form)
    if weight == 0:
        return log_q
    if weight == math.inf:
        return score
    return log_q + alpha * score if form == "additive" else (1 - alpha) * log_q + alpha * score


def check_pairing(
    loss: str,
    trained: ProposalLaw,
    decoded: ProposalLaw,
    alpha: float | int = 1.0,
    form: str = "additive",
    learns: Learns | None = None,
) -> None:
    """Refuse a scorer whose training and decoding contradict each other (table above).

    Args:
        loss: its loss.
        trained: where its negatives came from.
        decoded: where the candidates come from and which l is added.
        alpha: weight of the score; 0 is greedy decoding, which nothing contradicts.
        form: how l and score are combined.
        learns: of a loss that is not in `LEARNS`.

    Raises:
        ValueError: a contradiction, or an option out of range.
    """
    found = learns or LEARNS.get(loss)
    if found is None:
        raise ValueError(f"nce/loss={loss}: allowed {', '.join(LEARNS)}, or say what it learns")
    sampled = not _is_deterministic("nce.trained_with", trained)
    _is_deterministic("bon/proposal", decoded)
    weight = additive_weight(alpha, form)
    optimum = found.sampled if sampled else found.beam
    if optimum is None:
        raise ValueError(
            f"nce/loss={loss} with bon/proposal={trained.name}: a deterministic beam has no density"
            " q to compare with; allowed: nce/loss=ranking, or bon/proposal=softmax_sampling"
        )
    if weight == 0:
        return
    if sampled and optimum == TARGET:
        _check_score_alone(loss, weight, alpha, form)
        return
    if decoded.name != trained.name:
        raise ValueError(
            f"bon/proposal={decoded.name}: the scorer was trained on {trained.name} and its score"
            f" is fitted to those candidates alone; allowed: {trained.name}"
        )
    if sampled:
        _check_ratio(loss, trained, decoded, weight)


def _check_score_alone(loss: str, weight: float, alpha: float | int, form: str) -> None:
    if weight != math.inf:
        raise ValueError(
            f"bon.form={form} with bon.alpha={alpha}: nce/loss={loss} has divided by q already, so"
            " adding log q counts it again; allowed: bon.form=scorer_only"
        )


def _check_ratio(loss: str, trained: ProposalLaw, decoded: ProposalLaw, weight: float) -> None:
    if weight == math.inf:
        raise ValueError(
            f"bon.form=scorer_only (or an alpha that equals it): nce/loss={loss} on samples learns"
            " log p0 - log q, large where q is small; allowed: additive or convex with log q in it"
        )
    if decoded.temperature != trained.temperature:
        raise ValueError(
            f"bon.proposal.temperature={decoded.temperature}: the scorer was trained against"
            f" samples at T={trained.temperature} and completes log q of that T alone; allowed:"
            f" {trained.temperature}"
        )


def _is_deterministic(key: str, proposal: ProposalLaw) -> bool:
    name, temperature, deterministic = proposal
    if not 0 < temperature < math.inf:
        raise ValueError(f"{key}={name} at temperature={temperature}: allowed a number above 0")
    if deterministic is not None:
        return deterministic
    if name not in DETERMINISTIC:
        raise ValueError(f"{key}={name}: allowed {', '.join(DETERMINISTIC)}")
    return DETERMINISTIC[name]
