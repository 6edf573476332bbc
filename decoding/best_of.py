"""Best of n: several candidates for every block, ranked by what the model and a scorer say of them.

After the greedy chain of a block (`decoding.chain`):

    1. a proposal draws n candidates from the chain's last distributions q; the first is greedy's
    2. round r = 1 .. R: a pass over all candidates, as hard tokens, gives their hidden states, and
       from these the scores gamma s^(r)
    3. between two rounds the swapped places of every candidate are held, the others refined given
       them; the greedy candidate stays as it is, and repetitions are crossed out
    4. the largest  l + alpha S  wins (or of Gumbel-perturbed values, a sample), l = log q of the
       final tokens, S = the mean of the rounds (`perround`) or the last round (`lastround`)

`select_each` (arXiv 2606.08357, Alg. 3) ranks candidates after every pass of the chain instead, and
the chain goes on from the winner. All l are taken under the greedy chain's own q, whatever its
candidates became, so that with alpha = 0 the greedy block wins and best-of-n is greedy refinement,
token for token. Rounds, and l being that of one q, are a reading: the source has no code.

Legend: X blocks, C candidates, Y = X C, S places of a block, D features, V vocabulary, R rounds.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from decoding.candidates import BeamBayes, Candidates, Proposal
from decoding.chain import BlockRunner, Refined, Refinement, chosen, predict_places
from objectives.keyed import keyed_uniform
from objectives.pairing import additive_weight, decode_score
from objectives.refinement import Prediction, allowed_log_probabilities, predict

AGGREGATIONS = ("select_each", "perround", "lastround")
PICKS = ("argmax", "gumbel")
_PROPOSE, _PICK = 0x0E, 0x0F  # streams of keyed numbers
_BLOCKS = 512  # blocks whose logits are alive at a time


class Round(NamedTuple):
    """Candidates that were looked at once.

    Attributes:
        tokens_XCS: their tokens; candidate 0 is the chain's own.
        log_q_XC: of these tokens under the chain's distributions, -inf where crossed out.
        valid_XC: distinct candidates.
        hidden_XCSD: what the backbone makes of them.
        repeated_X: candidates that repeated another one, of `draws`.
        draws: how many there were.
        new_X: blocks whose round this is; the others had ended, and show their last one. None: all.
    """

    tokens_XCS: Tensor
    log_q_XC: Tensor
    valid_XC: Tensor
    hidden_XCSD: Tensor
    repeated_X: Tensor
    draws: int
    new_X: Tensor | None = None

    def of(self, new_X: Bool[Tensor, " X"], before: "Round") -> "Round":
        """This round for the blocks that were still running, `before` for the finished ones."""
        return Round(
            chosen(new_X, self.tokens_XCS, before.tokens_XCS),
            chosen(new_X, self.log_q_XC, before.log_q_XC),
            chosen(new_X, self.valid_XC, before.valid_XC),
            chosen(new_X, self.hidden_XCSD, before.hidden_XCSD),
            chosen(new_X, self.repeated_X, before.repeated_X),
            self.draws,
            new_X,
        )


@runtime_checkable
class Scores(Protocol):
    """Ranks candidates of the same block."""

    def __call__(
        self, hidden_XCSD: Tensor, tokens_XCS: Tensor, written_XS: Tensor
    ) -> Float[Tensor, "X C"]:
        """gamma s of every candidate; `written_XS` are the places that were not given."""
        ...


class Choice(NamedTuple):
    """What won.

    Attributes:
        token_XS: the winner's tokens.
        number_X: its number; 0 is greedy's.
        rounds: every round that was scored.
        score_RXC: gamma s of every round.
        aggregate_XC: S.
        passes: passes over candidates, that is, on top of the chain's.
        flipped_X: whether another candidate than the greedy one won, in any of the choices.
        seen_X: candidates that were looked at, over all rounds.
    """

    token_XS: Tensor
    number_X: Tensor
    rounds: list[Round]
    score_RXC: Tensor
    aggregate_XC: Tensor
    passes: int
    flipped_X: Tensor
    seen_X: Tensor


@dataclass(frozen=True)
class BestOf:
    """How a block is chosen among candidates: the section `bon` of a configuration.

    Attributes:
        count: n, candidates of a block, greedy's included.
        proposal: where they come from.
        score_agg: select_each | perround | lastround.
        rounds: R; `select_each` has one after every pass of the chain instead.
        alpha: weight of the scores.
        form: additive, l + alpha S | convex, (1 - alpha) l + alpha S | scorer_only, S.
        pick: argmax | gumbel.
        gumbel_temperature: of `gumbel`.
        seed: of sampled candidates and picks.

    Raises:
        ValueError: a value that is not allowed.
    """

    count: int = 4
    proposal: Proposal = field(default_factory=BeamBayes)
    score_agg: str = "lastround"
    rounds: int = 1
    alpha: float | int = 0.1
    form: str = "additive"
    pick: str = "argmax"
    gumbel_temperature: float | int = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        checks = {
            "count": (self.count >= 2, "an integer >= 2"),
            "score_agg": (self.score_agg in AGGREGATIONS, ", ".join(AGGREGATIONS)),
            "rounds": (self.rounds >= 1, "an integer >= 1"),
            "pick": (self.pick in PICKS, ", ".join(PICKS)),
            "gumbel_temperature": (self.gumbel_temperature > 0.0, "a number in (0, inf)"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"bon.{name}={getattr(self, name)}: allowed {allowed}")
        additive_weight(self.alpha, self.form)  # says what is wrong with them
        if self.score_agg == "select_each" and self.rounds > 1:
            raise ValueError(
                f"bon.rounds={self.rounds}: allowed with bon.score_agg=select_each 1, a round after"
                " every pass"
            )

    def choose(
        self,
        runner: BlockRunner,
        refinement: Refinement,
        token_XS: Int[Tensor, "X S"],
        given_XS: Bool[Tensor, "X S"],
        row_X: Int[Tensor, " X"],
        scores: Scores,
    ) -> tuple[Refined, Choice]:
        """Refine blocks and choose among candidates; `row_X` are the blocks' keys."""
        if self.score_agg == "select_each":
            return self._select_each(runner, refinement, token_XS, given_XS, row_X, scores)
        refined = refinement.refine(runner, token_XS, given_XS)
        found = list(self.rounds_of(runner, refined, row_X))
        score_RXC = torch.stack([scores(r.hidden_XCSD, r.tokens_XCS, ~given_XS) for r in found])
        aggregate_XC = self.aggregate(score_RXC)
        number_X = self.winner(found[-1], aggregate_XC, row_X)
        token_XS = taken(found[-1].tokens_XCS, number_X)
        choice = Choice(
            token_XS, number_X, found, score_RXC, aggregate_XC, len(found), number_X > 0,
            _seen(found),
        )  # fmt: skip
        return refined, choice

    def rounds_of(
        self, runner: BlockRunner, refined: Refined, row_X: Int[Tensor, " X"]
    ) -> Iterator[Round]:
        """Candidates of finished chains, round after round; they do not depend on any score."""
        drawn = self._drawn(runner, refined, row_X)
        tokens_XCS, valid_XC, log_q_XC = drawn.tokens_MCS, drawn.valid_MC, drawn.log_q_MC
        swapped_XCS = tokens_XCS != refined.token_XS[:, None]
        # The greedy candidate, first or not there at all, has nothing that was swapped.
        greedy_XC1 = ~swapped_XCS.any(-1, keepdim=True)
        held_XCS = swapped_XCS | refined.fixed_XS[:, None] | greedy_XC1
        repeated_X = drawn.duplicates_M
        if repeated_X is None:
            repeated_X = torch.zeros_like(row_X)
        draws = drawn.draws
        for number in range(self.rounds):
            hidden_XCSD = self._look(runner, tokens_XCS)
            yield Round(tokens_XCS, log_q_XC, valid_XC, hidden_XCSD, repeated_X, draws)
            if number + 1 == self.rounds:
                return
            said_XCS = predict_places(runner, hidden_XCSD.flatten(0, 1)).token_P
            tokens_XCS = tokens_XCS.where(held_XCS, said_XCS.view(tokens_XCS.shape))
            again_XC = repeats(tokens_XCS, valid_XC)
            repeated_X, draws = (again_XC & valid_XC).sum(-1), tokens_XCS.shape[1]
            valid_XC = valid_XC & ~again_XC
            log_q_XC = self.log_q_of(runner, refined, tokens_XCS)
            log_q_XC = log_q_XC.masked_fill(~valid_XC, -torch.inf)

    def propose(
        self, log_p_XSV: Tensor, fixed_XS: Tensor, token_XS: Tensor, row_X: Tensor, number: int
    ) -> Candidates:
        """n candidates, the first of which is the greedy one."""
        key = (self.seed, _PROPOSE, number)
        return self.proposal(log_p_XSV, fixed_XS, token_XS, self.count, key, row_X)

    def aggregate(self, score_RXC: Float[Tensor, "R X C"]) -> Float[Tensor, "X C"]:
        """S."""
        return score_RXC.mean(0) if self.score_agg == "perround" else score_RXC[-1]

    def winner(
        self,
        candidates: Round,
        aggregate_XC: Float[Tensor, "X C"],
        row_X: Int[Tensor, " X"],
        number: int = 0,
    ) -> Int[Tensor, " X"]:
        """The number of the best candidate; of equal ones the first. `number` is the choice's: each
        draws anew."""
        value_XC = decode_score(candidates.log_q_XC, aggregate_XC, self.alpha, self.form)
        if self.pick == "gumbel":
            uniform_XC = keyed_uniform((self.seed, _PICK, number), row_X, value_XC.shape[1])
            noise_XC = -(-(uniform_XC.clamp(min=2.0**-25)).log()).log()
            value_XC = value_XC + self.gumbel_temperature * noise_XC
        return value_XC.masked_fill(~candidates.valid_XC, -torch.inf).argmax(-1)

    def _look(self, runner: BlockRunner, tokens_XCS: Tensor) -> Tensor:
        copies = tokens_XCS.shape[1]
        hidden_YSD = runner.run(runner.table_VD[tokens_XCS.flatten(0, 1)], copies)
        return hidden_YSD.unflatten(0, (-1, copies))

    def _drawn(self, runner: BlockRunner, refined: Refined, row_X: Tensor) -> Candidates:
        """Candidates of all blocks, a part of the logits at a time."""
        parts = [
            self.propose(log_p_YSV, refined.fixed_XS[part], refined.token_XS[part], row_X[part], 0)
            for part, log_p_YSV in _distributions(runner, refined)
        ]
        return _joined(parts)

    def log_q_of(
        self, runner: BlockRunner, refined: Refined, tokens_XCS: Int[Tensor, "X C S"]
    ) -> Float[Tensor, "X C"]:
        """log q of any blocks under the chains' distributions, at the proposal's temperature."""
        parts = []
        for part, log_p_YSV in _distributions(runner, refined):
            tempered_YSV = (log_p_YSV / self.proposal.temperature).log_softmax(-1)
            # [Y, S, C] because every candidate has one token for each place.
            log_q_YSC = tempered_YSV.gather(-1, tokens_XCS[part].transpose(1, 2))
            parts.append(log_q_YSC.masked_fill(refined.fixed_XS[part][..., None], 0.0).sum(1))
        return torch.cat(parts)

    def _select_each(
        self,
        runner: BlockRunner,
        refinement: Refinement,
        token_XS: Tensor,
        given_XS: Tensor,
        row_X: Tensor,
        scores: Scores,
    ) -> tuple[Refined, Choice]:
        """A round after every pass; the chain goes on from its winner."""
        state = refinement.start(runner, token_XS, given_XS)
        passes_X = torch.zeros_like(row_X)
        found: list[Round] = []
        values: list[Tensor] = []
        last: list[Tensor] | None = None
        number_X, chosen_XS = torch.zeros_like(row_X), state.token_XS
        flipped_X = torch.zeros_like(row_X, dtype=torch.bool)
        for number in range(refinement.iterations):
            running_X = ~state.committed_XS.all(-1)
            if number and not bool(running_X.any()):
                break
            fixed_XS = refinement.held(state, given_XS)
            hidden_XSD = runner.run(state.inputs_XSD)
            drawn, log_p_XCS, said = self._proposed(
                runner, refinement.soft_inputs.top, hidden_XSD, fixed_XS, state.token_XS, row_X,
                number,
            )  # fmt: skip
            repeated_X = (
                torch.zeros_like(row_X) if drawn.duplicates_M is None else drawn.duplicates_M
            )
            seen_XCSD = self._look(runner, drawn.tokens_MCS)
            here = Round(
                drawn.tokens_MCS, drawn.log_q_MC, drawn.valid_MC, seen_XCSD, repeated_X, drawn.draws
            )
            score_XC = scores(seen_XCSD, drawn.tokens_MCS, ~given_XS)
            if found:
                here = here.of(running_X, found[-1])
                score_XC = chosen(running_X, score_XC, values[-1])
            won_X = self.winner(here, score_XC, row_X, number)
            won_XS = taken(drawn.tokens_MCS, won_X)
            prediction = _as_if_said(said, won_XS, taken(log_p_XCS, won_X).exp())
            flipped_X |= running_X & (won_X > 0)
            now = [hidden_XSD, fixed_XS, prediction.confidence_P, prediction.entropy_P]
            if last is not None:
                now = [chosen(running_X, a, b) for a, b in zip(now, last, strict=True)]
            last = now
            number_X = won_X.where(running_X, number_X)
            after = refinement.advance(runner, state, prediction, given_XS)
            state = after.of(running_X, state)
            chosen_XS = won_XS.where(running_X[:, None], chosen_XS)
            passes_X += running_X
            found.append(here)
            values.append(score_XC)
        assert last is not None, "at least one pass"
        hidden_XSD, fixed_XS, confidence_XS, entropy_XS = last
        refined = Refined(chosen_XS, hidden_XSD, fixed_XS, passes_X, confidence_XS, entropy_XS)
        score_RXC = torch.stack(values)
        return refined, Choice(
            chosen_XS, number_X, found, score_RXC, score_RXC[-1], len(found), flipped_X,
            _seen(found),
        )  # fmt: skip

    def _proposed(
        self, runner: BlockRunner, top: int, hidden_XSD: Tensor, fixed_XS: Tensor, token_XS: Tensor,
        row_X: Tensor, number: int,
    ) -> tuple[Candidates, Tensor, Prediction]:  # fmt: skip
        """Candidates of a pass, log p [X, C, S] of their tokens, and what the pass itself says; a
        part of the logits at a time."""
        drawn, log_p, said = [], [], []
        for start in range(0, len(hidden_XSD), _BLOCKS):
            part = slice(start, start + _BLOCKS)
            logits_YSV = runner.logits(hidden_XSD[part])
            log_p_YSV = allowed_log_probabilities(logits_YSV, runner.forbidden_V)
            drawn.append(
                self.propose(log_p_YSV, fixed_XS[part], token_XS[part], row_X[part], number)
            )
            log_p.append(log_p_YSV.gather(-1, drawn[-1].tokens_MCS.mT).mT)
            said.append(predict(logits_YSV, runner.forbidden_V, top))
        prediction = Prediction(*(torch.cat(column) for column in zip(*said, strict=True)))
        return _joined(drawn), torch.cat(log_p), prediction


def _distributions(runner: BlockRunner, refined: Refined) -> Iterator[tuple[slice, Tensor]]:
    """[Y, S, V] log-probabilities of some blocks after the others, of every block's last pass."""
    for start in range(0, len(refined.hidden_XSD), _BLOCKS):
        part = slice(start, start + _BLOCKS)
        logits_YSV = runner.logits(refined.hidden_XSD[part])
        yield part, allowed_log_probabilities(logits_YSV, runner.forbidden_V)


def _joined(parts: Sequence[Candidates]) -> Candidates:
    """Candidates of all blocks."""
    repeated = [p.duplicates_M for p in parts]
    return Candidates(
        torch.cat([p.tokens_MCS for p in parts]),
        torch.cat([p.log_q_MC for p in parts]),
        torch.cat([p.valid_MC for p in parts]),
        None if repeated[0] is None else torch.cat([r for r in repeated if r is not None]),
        parts[0].draws,
    )


def _seen(rounds: Sequence[Round]) -> Int[Tensor, " X"]:
    """Candidates of every block that were looked at, over the rounds that were its own."""
    counts = [
        r.valid_XC.sum(-1) if r.new_X is None else r.valid_XC.sum(-1) * r.new_X for r in rounds
    ]
    return torch.stack(counts).sum(0)


def _as_if_said(prediction: Prediction, token_XS: Tensor, confidence_XS: Tensor) -> Prediction:
    """The prediction of a pass that would have said these tokens, with their own probabilities."""
    said = prediction._replace(token_P=token_XS, confidence_P=confidence_XS)
    top = prediction.top_token_PT.shape[-1]
    if not top:
        return said
    # They come first in the list of the most probable ones, each token once.
    token_XST = torch.cat([token_XS[..., None], prediction.top_token_PT], -1)
    p_XST = torch.cat([confidence_XS[..., None], prediction.top_probability_PT], -1)
    again_XST = token_XST == token_XS[..., None]
    again_XST[..., 0] = False
    kept_XST = again_XST.int().argsort(dim=-1, stable=True)[..., :top]
    return said._replace(
        top_token_PT=token_XST.gather(-1, kept_XST), top_probability_PT=p_XST.gather(-1, kept_XST)
    )


def taken(of_XCS: Shaped[Tensor, "X C S"], number_X: Int[Tensor, " X"]) -> Shaped[Tensor, "X S"]:
    """The tokens, or what else a place has, of one candidate of every block."""
    return of_XCS[torch.arange(len(number_X), device=number_X.device), number_X]


def repeats(tokens_XCS: Int[Tensor, "X C S"], valid_XC: Bool[Tensor, "X C"]) -> Bool[Tensor, "X C"]:
    """Whether a candidate is equal to one before it that is valid."""
    equal_XCC = (tokens_XCS[:, :, None] == tokens_XCS[:, None]).all(-1)
    return (equal_XCC & valid_XC[:, None]).tril(diagonal=-1).any(-1)
