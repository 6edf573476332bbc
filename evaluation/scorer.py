"""What a candidate scorer is worth: does it pick the truth more often than greedy decoding does?

A block has up to C distinct candidates, number 0 the greedy one. Picked is the largest of
l + alpha S, l the log-probability under the proposal and S = gamma s the score; alpha = inf is the
score alone, and of equal ones the first wins. (The convex form at a is this at a / (1 - a).)

    oracle@n   the truth is among the candidates          greedy@1   candidate 0 is the truth
    bon@1      the picked candidate is the truth
    gain       bon - greedy                               regret     oracle - bon
    flip       the picked one is not candidate 0: right if it is the truth, wrong if candidate 0
               was, so that gain = P(flip) (P(right | flip) - P(wrong | flip))

Rates are over blocks, intervals over rows or documents (`evaluation/grouped.py`). An alpha that was
chosen on the same blocks flatters the gain. Which order the score puts candidates in, and what its
softmax says: `evaluation/scorer_quality.py`.

Legend: M blocks, C candidates, R rounds of scoring.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from evaluation.grouped import Floats, Groups, Ints, Measure

Bools = NDArray[np.bool_]

# A bootstrap over fewer groups has intervals that are too narrow.
LEAST_GROUPS = 20
ALPHAS = (0.0, 0.05, 0.1, 0.3, 0.5, 1.0, 2.0, math.inf)


class ScoredBlocks(NamedTuple):
    """Candidates of held-out blocks, their scores, and how far from the truth they are.

    Attributes:
        log_q_MC: log-probability under the proposal, in nats, as decoding uses it.
        score_MC: gamma s, aggregated over rounds as decoding does.
        score_RMC: of every round.
        errors_MC: tokens that differ from the truth.
        valid_MC: candidates that exist; distinct, and always with candidate 0. What stands at the
            others is not looked at.
        entropy_M: of the draft's distributions, mean over its tokens, in nats.
        group_M: row or document of the block: what the bootstrap draws.
        truth_score_M: gamma s of the truth itself.
        truth_score_RM: of every round; None: not known.
    """

    log_q_MC: Floats
    score_MC: Floats
    score_RMC: Floats
    errors_MC: Ints
    valid_MC: Bools
    entropy_M: Floats
    group_M: Ints
    truth_score_M: Floats
    truth_score_RM: Floats | None = None

    @property
    def is_truth_MC(self) -> Bools:
        """Which candidate is the truth."""
        truth_MC: Bools = self.valid_MC & (self.errors_MC == 0)
        return truth_MC

    @property
    def truth_in_set_M(self) -> Bools:
        """Whether one of them is."""
        return np.logical_or.reduce(self.is_truth_MC, axis=-1)

    def round(self, number: int) -> "ScoredBlocks":
        """The same blocks, scored by one round alone."""
        truth_RM = self.truth_score_RM
        truth_M = np.full(len(self.valid_MC), np.nan) if truth_RM is None else truth_RM[number]
        return self._replace(score_MC=self.score_RMC[number], truth_score_M=truth_M)

    def among(self, chosen_M: Bools | Ints) -> "ScoredBlocks":
        """Some of the blocks."""
        truth_RM = self.truth_score_RM
        per_block = {
            name: getattr(self, name)[chosen_M] for name in self._fields if "_R" not in name
        }
        return ScoredBlocks(
            **per_block,
            score_RMC=self.score_RMC[:, chosen_M],
            truth_score_RM=None if truth_RM is None else truth_RM[:, chosen_M],
        )


def check_blocks(blocks: ScoredBlocks) -> None:
    """Refuse blocks that cannot be measured.

    Raises:
        DataError: none at all, shapes that do not match, a block without candidate 0, two
            candidates that are both the truth, or a number that is not finite; by block.
    """
    blocks_candidates = blocks.valid_MC.shape
    if len(blocks_candidates) != 2 or not blocks.valid_MC.size:
        raise DataError(f"scored blocks: valid_MC has shape {blocks_candidates}, want [M, C]")
    for name, part in zip(blocks._fields, blocks, strict=True):
        rounds = 1 if "_R" in name else 0
        wanted = blocks_candidates if name.endswith("C") else blocks_candidates[:1]
        if part is not None and part.shape[rounds:] != wanted:
            raise DataError(
                f"scored blocks: {name} has shape {part.shape}, want {wanted} at the end"
            )
    problems = {
        "candidate 0 is not valid": ~blocks.valid_MC[:, 0],
        "two candidates are the truth": blocks.is_truth_MC.sum(-1) > 1,
        "a number is not finite": ~_finite(blocks),
        "a negative number of errors": (blocks.valid_MC & (blocks.errors_MC < 0)).any(-1),
    }
    for problem, wrong_M in problems.items():
        if wrong_M.any():
            raise DataError(f"scored blocks: block {int(wrong_M.argmax())}: {problem}")


def _finite(blocks: ScoredBlocks) -> Bools:
    per_candidate = np.stack([blocks.log_q_MC, blocks.score_MC, *blocks.score_RMC])
    finite_MC = (np.isfinite(per_candidate) | ~blocks.valid_MC).all(0)
    truth_RM = np.empty((0, len(finite_MC)))
    if blocks.truth_score_RM is not None:
        truth_RM = blocks.truth_score_RM
    per_block = np.stack([blocks.entropy_M, blocks.truth_score_M, *truth_RM])
    finite_M: Bools = finite_MC.all(-1) & np.isfinite(per_block).all(0)
    return finite_M


class Selection(NamedTuple):
    """What picking with one alpha does; the module says what the entries are.

    `flips`, `right` and `wrong` are numbers of blocks; `gain_p` is two-sided.
    """

    alpha: float
    blocks: int
    oracle: Measure
    greedy: Measure
    bon: Measure
    gain: Measure
    gain_p: float | None
    regret: Measure
    flips: int
    right: int
    wrong: int
    flip_rate: Measure
    right_given_flip: Measure
    wrong_given_flip: Measure


def picked(blocks: ScoredBlocks, alpha: float) -> Ints:
    """[M] number of the candidate with the largest l + alpha S, of equal ones the first.

    Raises:
        DataError: an alpha below 0.
    """
    if not alpha >= 0:
        raise DataError(f"alpha={alpha}: allowed 0 <= alpha <= inf")
    if alpha == 0:
        value_MC = blocks.log_q_MC
    elif alpha == math.inf:
        value_MC = blocks.score_MC
    else:
        # Invalid slots may hold infinities of both signs.
        log_q_MC, score_MC = (np.where(blocks.valid_MC, x_MC, 0.0) for x_MC in blocks[:2])
        value_MC = log_q_MC + alpha * score_MC
    return np.where(blocks.valid_MC, value_MC, -np.inf).argmax(-1)


def selection(blocks: ScoredBlocks, alpha: float, groups: Groups) -> Selection:
    """Rates of picking with `alpha`."""
    pick_M = picked(blocks, alpha)
    bon_M = blocks.is_truth_MC[np.arange(len(pick_M)), pick_M]
    greedy_M, oracle_M, flip_M = blocks.is_truth_MC[:, 0], blocks.truth_in_set_M, pick_M != 0
    right_M, wrong_M = flip_M & bon_M, flip_M & greedy_M
    gain, gain_p = groups.difference(bon_M, greedy_M)
    return Selection(
        alpha=float(alpha),
        blocks=len(pick_M),
        oracle=groups.ratio(oracle_M),
        greedy=groups.ratio(greedy_M),
        bon=groups.ratio(bon_M),
        gain=gain,
        gain_p=gain_p,
        regret=groups.difference(oracle_M, bon_M)[0],
        flips=int(flip_M.sum()),
        right=int(right_M.sum()),
        wrong=int(wrong_M.sum()),
        flip_rate=groups.ratio(flip_M),
        right_given_flip=groups.ratio(right_M, flip_M),
        wrong_given_flip=groups.ratio(wrong_M, flip_M),
    )


def sweep(
    blocks: ScoredBlocks, groups: Groups, alphas: Sequence[float] = ALPHAS
) -> list[Selection]:
    """Every alpha on the same blocks and the same draws."""
    return [selection(blocks, alpha, groups) for alpha in alphas]


class Gate(NamedTuple):
    """Whether a scorer goes on to benchmarks: the whole interval of its gain lies above 0, and it
    rests on at least `LEAST_GROUPS` rows or documents."""

    ships: bool
    alpha: float
    gain: Measure
    p: float | None
    groups: int


def ship_gate(found: Selection, groups: Groups) -> Gate:
    """The gate at the alpha of a selection."""
    enough = groups.number >= LEAST_GROUPS
    ships = enough and found.gain.low is not None and found.gain.low > 0
    return Gate(ships, found.alpha, found.gain, found.gain_p, groups.number)


class Baselines(NamedTuple):
    """What no scorer is needed for.

    Attributes:
        random: bon@1 of a candidate drawn at random: mean of 1[truth in set] / candidates, exact.
        proposal: bon@1 by l alone.
        proposal_flips: blocks where l prefers another candidate than number 0. Where there are
            any, candidate 0 is not the proposal's best, and alpha = 0 is not greedy decoding.
    """

    random: Measure
    proposal: Measure
    proposal_flips: int


def baselines(blocks: ScoredBlocks, groups: Groups) -> Baselines:
    """Picking at random, and by the proposal."""
    by_proposal = selection(blocks, 0.0, groups)
    random = groups.ratio(blocks.truth_in_set_M / blocks.valid_MC.sum(-1))
    return Baselines(random, by_proposal.bon, by_proposal.flips)
