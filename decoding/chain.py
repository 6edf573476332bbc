"""Refinement of blocks, pass by pass, the same in training, in scoring and in decoding.

    1. every place that is not given begins as BLANK
    2. a pass predicts all places: token c, probability a
    3. the commit rule says which of them are final, the soft inputs what the next pass reads
    4. until all are committed, or `iterations` passes are made; what is left is taken as it is

Source: arXiv 2606.08357, Alg. 2. Legend: X blocks, Y = X W with W copies of each, S places of a
block, D features, V vocabulary.
"""

from dataclasses import dataclass, field
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoding.commit import CommitRule, PrefixThreshold
from decoding.soft_inputs import SoftInputs, UncommittedSoft
from objectives.refinement import Prediction, predict

_LOGIT_ROWS = 2048  # rows of fp32 logits alive at a time


@runtime_checkable
class BlockRunner(Protocol):
    """Shows blocks to a model behind the text that it has read."""

    @property
    def table_VD(self) -> Tensor:
        """The embeddings."""
        ...

    @property
    def blank_id(self) -> int:
        """The token that stands for "not known yet"."""
        ...

    @property
    def forbidden_V(self) -> Tensor:
        """Tokens that are never written."""
        ...

    def run(self, inputs_YSD: Tensor, copies: int = 1) -> Tensor:
        """[Y, S, D] hidden states of blocks; the W copies of a block stand side by side."""
        ...

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """[*P, V] what the head makes of hidden states."""
        ...


class ChainState(NamedTuple):
    """Blocks between two passes.

    Attributes:
        token_XS: the tokens of every place; BLANK where none is known.
        committed_XS: places that are final, unless the rule takes them back.
        inputs_XSD: what the next pass reads.
    """

    token_XS: Tensor
    committed_XS: Tensor
    inputs_XSD: Tensor

    def of(self, running_X: Bool[Tensor, " X"], before: "ChainState") -> "ChainState":
        """This state for the blocks that were still running, `before` for the finished ones."""
        return ChainState(*(chosen(running_X, a, b) for a, b in zip(self, before, strict=True)))


class Refined(NamedTuple):
    """Blocks after their chain.

    Attributes:
        token_XS: what refinement says.
        hidden_XSD: of every block's last pass, from which its distributions follow.
        fixed_XS: places that this pass could not change: given ones, and with rules that keep
            what they commit, those committed before it.
        passes_X: how many passes each block needed.
        confidence_XS, entropy_XS: of the last pass.
    """

    token_XS: Tensor
    hidden_XSD: Tensor
    fixed_XS: Tensor
    passes_X: Tensor
    confidence_XS: Tensor
    entropy_XS: Tensor


@dataclass(frozen=True)
class Refinement:
    """How blocks are refined: the section `refine` of a configuration.

    Attributes:
        iterations: K, most passes of a block.
        commit: the commit rule.
        soft_inputs: what a pass reads of the one before.

    Raises:
        ValueError: no pass at all.
    """

    iterations: int = 4
    commit: CommitRule = field(default_factory=PrefixThreshold)
    soft_inputs: SoftInputs = field(default_factory=UncommittedSoft)

    def __post_init__(self) -> None:
        if self.iterations < 1:
            raise ValueError(f"refine.iterations={self.iterations}: allowed an integer >= 1")

    def start(
        self, runner: BlockRunner, token_XS: Int[Tensor, "X S"], given_XS: Bool[Tensor, "X S"]
    ) -> ChainState:
        """Given places hold their tokens, the others BLANK."""
        token_XS = token_XS.masked_fill(~given_XS, runner.blank_id)
        return ChainState(token_XS, given_XS, runner.table_VD[token_XS])

    def held(self, state: ChainState, given_XS: Bool[Tensor, "X S"]) -> Bool[Tensor, "X S"]:
        """Places that the next pass cannot change."""
        return state.committed_XS if self.commit.keeps else given_XS

    def advance(
        self,
        runner: BlockRunner,
        state: ChainState,
        prediction: Prediction,
        given_XS: Bool[Tensor, "X S"],
    ) -> ChainState:
        """What a pass makes of the state that it has read."""
        held_XS = self.held(state, given_XS)
        token_XS = prediction.token_P.where(~held_XS, state.token_XS)
        committed_XS = self.commit(prediction, held_XS, self.iterations)
        inputs_XSD = self.soft_inputs(
            prediction, token_XS, committed_XS, given_XS, runner.table_VD, runner.blank_id
        )
        return ChainState(token_XS, committed_XS, inputs_XSD)

    def passes(
        self,
        runner: BlockRunner,
        state: ChainState,
        given_XS: Bool[Tensor, "X S"],
        most: int | None = None,
        whole: bool = False,
    ) -> tuple[ChainState, Refined]:
        """Pass after pass, `most` of them at most (K by default), without a gradient.

        Only the inputs of a further pass have one, that of the embeddings they are made of.

        Args:
            runner: reads the blocks.
            state: to begin from.
            given_XS: places whose tokens are known.
            most: passes.
            whole: make all passes even if every block has ended, so that their number does not
                depend on what the model says (ranks that wait for each other).
        """
        most = self.iterations if most is None else most
        passes_X = torch.zeros(len(given_XS), dtype=torch.long, device=given_XS.device)
        fixed_XS = given_XS
        last: list[Tensor] | None = None
        for number in range(most):
            running_X = ~state.committed_XS.all(-1)
            # Nothing but the host can end the loop, so a GPU is asked only where that saves a pass.
            if number and not whole and not bool(running_X.any()):
                break
            with torch.no_grad():
                hidden_XSD = runner.run(state.inputs_XSD)
            prediction = predict_places(runner, hidden_XSD, self.soft_inputs.top)
            now = [hidden_XSD, prediction.confidence_P, prediction.entropy_P]
            fixed_XS = chosen(running_X, self.held(state, given_XS), fixed_XS)
            if last is not None:
                pairs = zip(now, last, strict=True)
                now = [chosen(running_X, new, old) for new, old in pairs]
            last = now
            state = self.advance(runner, state, prediction, given_XS).of(running_X, state)
            passes_X += running_X
        assert last is not None, "at least one pass"
        hidden_XSD, confidence_XS, entropy_XS = last
        return state, Refined(
            state.token_XS, hidden_XSD, fixed_XS, passes_X, confidence_XS, entropy_XS
        )

    def refine(
        self, runner: BlockRunner, token_XS: Int[Tensor, "X S"], given_XS: Bool[Tensor, "X S"]
    ) -> Refined:
        """From BLANKs to a finished block."""
        return self.passes(runner, self.start(runner, token_XS, given_XS), given_XS)[1]


def chosen(which_X: Bool[Tensor, " X"], yes: Tensor, no: Tensor) -> Tensor:
    """Row by row one of two tensors."""
    return yes.where(which_X.view(-1, *[1] * (yes.ndim - 1)), no)


@torch.no_grad()
def predict_places(
    runner: BlockRunner, hidden_XSD: Float[Tensor, "X S D"], top: int = 0
) -> Prediction:
    """What a pass says of all places, [X, S]; a part of the logits at a time."""
    parts = [
        predict(runner.logits(part_PD), runner.forbidden_V, top)
        for part_PD in hidden_XSD.flatten(0, 1).split(_LOGIT_ROWS)
    ]
    shape = hidden_XSD.shape[:2]
    return Prediction(
        *(torch.cat(column).unflatten(0, shape) for column in zip(*parts, strict=True))
    )
