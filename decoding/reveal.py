"""Reveal rules: which masked positions of a block become tokens at which forward pass.

A rule drives one block until nothing in it is masked. Two kinds exist:

    Planned    positions follow from random clocks alone, so they are known before the network
               runs, which then computes nothing for the others: FirstHitting, Ancestral
    Adaptive   positions follow from what the network says about all of them: Confidence, TopK,
               EntropyBound

A new rule is a subclass of either, with one method.

Legend: B sequences, S positions of the block, N candidates, M rows of the flattened [B * S],
V vocabulary.
"""

from abc import ABC, abstractmethod
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.noise import Schedule


@runtime_checkable
class Block(Protocol):
    """A block being denoised, as a rule sees it.

    Attributes:
        masked_BS: positions to fill in, on the host, as they were at the start.
        clock_BS: a uniform number in [0, 1) for every position, on the host.
        schedule: the masking schedule p(t).
        device: where rows and logits live.
    """

    masked_BS: Tensor
    clock_BS: Tensor
    schedule: Schedule
    device: torch.device

    def predict(self, rows_M: Int[Tensor, " M"]) -> Float[Tensor, "M V"]:
        """Run the network once: logits of these rows given all tokens there are."""
        ...

    def reveal(
        self,
        rows_M: Int[Tensor, " M"],
        logits_MV: Float[Tensor, "M V"],
        chosen_M: Bool[Tensor, " M"] | None = None,
    ) -> None:
        """Draw a token for each of these rows, and keep it (where chosen)."""
        ...


class RevealRule(ABC):
    """How a block is denoised."""

    @abstractmethod
    def run(self, block: Block) -> None:
        """Reveal every masked position of the block."""


class Planned(RevealRule):
    """A rule that knows the positions of every forward pass beforehand."""

    @abstractmethod
    def plan(
        self,
        clock_BS: Float[Tensor, "B S"],
        masked_BS: Bool[Tensor, "B S"],
        schedule: Schedule,
    ) -> Int[Tensor, "B S"]:
        """Number of the forward pass, from 0, that reveals each position; -1 if it is not masked.

        Every sequence uses the numbers 0, 1, ... up to a last one of its own, without gaps: one
        that is finished waits for the others.
        """

    def run(self, block: Block) -> None:
        """Reveal by plan; the device gets it once, and is never asked anything."""
        step_N = self.plan(block.clock_BS, block.masked_BS, block.schedule).flatten()
        counts = (step_N + 1).bincount().tolist()
        rows_N = step_N.argsort(stable=True).to(block.device)
        for rows_M in rows_N.split(counts)[1:]:
            block.reveal(rows_M, block.predict(rows_M))


class FirstHitting(Planned):
    """Exact simulation of the reverse process, one position at a time (arXiv 2409.02908).

    In the reverse process every masked position has a clock, uniform in the masking probability p,
    and becomes a token when p falls to it. The next of n clocks below p is p * u^(1/n), at a
    uniformly random one of the n positions. So sorting the clocks simulates the process, for every
    schedule, and no network pass is spent on a time at which nothing happens.

    Args:
        tokens_per_step: reveal this many hits from one pass; above 1 it is an approximation that
            draws their tokens independently.
    """

    def __init__(self, tokens_per_step: int = 1) -> None:
        _require(tokens_per_step >= 1, "tokens_per_step", tokens_per_step, "an integer >= 1")
        self.tokens_per_step = tokens_per_step

    def plan(self, clock_BS: Tensor, masked_BS: Tensor, schedule: Schedule) -> Tensor:
        """Rank of the clocks, latest time first, in groups of `tokens_per_step`."""
        late_BS = clock_BS.masked_fill(~masked_BS, -1.0)
        rank_BS = late_BS.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return (rank_BS // self.tokens_per_step).masked_fill(~masked_BS, -1)


class Ancestral(Planned):
    """The reverse process on a grid of T steps from t = 1 to t = 0 (arXiv 2406.07524).

    From t to s each masked position is revealed with probability (p(t) - p(s)) / p(t): that its
    clock, uniform below p(1), lies in [p(s), p(t)) given that it lies below p(t). The grid ends at
    p(0) = 0, below which there is no clock, so nothing stays masked. Steps that reveal nothing
    leave the network's input as it was and are not run.

    Args:
        num_steps: T.
    """

    def __init__(self, num_steps: int) -> None:
        _require(num_steps >= 1, "num_steps", num_steps, "an integer >= 1")
        self.num_steps = num_steps

    def plan(self, clock_BS: Tensor, masked_BS: Tensor, schedule: Schedule) -> Tensor:
        """Grid step of every clock, numbered without the empty steps of its sequence."""
        grid = torch.linspace(0.0, 1.0, self.num_steps + 1, dtype=torch.float64)
        probability = schedule.probability(grid)
        above_BS = torch.searchsorted(
            probability, (clock_BS * probability[-1]).contiguous(), right=True
        )
        step_BS = self.num_steps - above_BS.clamp(1, self.num_steps)
        return _without_gaps(step_BS, masked_BS)


def _without_gaps(step_BS: Tensor, masked_BS: Tensor) -> Tensor:
    """Replace the values at masked positions by their rank among the values of their row."""
    last = int(step_BS.max()) + 1
    sorted_BS, order_BS = step_BS.masked_fill(~masked_BS, last).sort(dim=-1)
    is_new_BS = torch.zeros_like(sorted_BS)
    is_new_BS[:, 1:] = (sorted_BS.diff(dim=-1) > 0).long()
    rank_BS = torch.empty_like(step_BS).scatter_(-1, order_BS, is_new_BS.cumsum(-1))
    return rank_BS.masked_fill(~masked_BS, -1)


class Adaptive(RevealRule):
    """A rule that looks at the predictions of all masked positions.

    The tokens themselves are drawn afterwards. A rule must not look at them: choosing the positions
    whose draw was a likely token would lower the temperature.
    """

    @abstractmethod
    def choose(
        self, log_p_BNV: Float[Tensor, "B N V"], masked_BN: Bool[Tensor, "B N"]
    ) -> Bool[Tensor, "B N"]:
        """Candidates to reveal now: at least one of every sequence that has a masked one.

        `log_p` is the model's own distribution, before temperature and nucleus. Candidates that are
        not masked fill up the rows; what is said of them does not matter.
        """

    def limit(self, left: int) -> int | None:
        """How many `choose` takes of a sequence with `left` (or fewer: all); None if it depends.

        A fixed number spares waiting for the device at every step.
        """
        return None

    def run(self, block: Block) -> None:
        """Predict, choose, reveal, until nothing is masked."""
        masked_BS = block.masked_BS.to(block.device)
        left = int(block.masked_BS.sum(-1).max())
        while left > 0:
            rows_BN, masked_BN = _candidates(masked_BS, left)
            if self.limit(left) is None:  # finished sequences wait: ask nothing about them
                is_running_B = masked_BN.any(-1)
                rows_BN, masked_BN = rows_BN[is_running_B], masked_BN[is_running_B]
            logits_MV = block.predict(rows_BN.flatten())
            log_p_BNV = logits_MV.log_softmax(-1).unflatten(0, rows_BN.shape)
            chosen_BN = self.choose(log_p_BNV, masked_BN) & masked_BN
            limit = self.limit(left)
            most = int(chosen_BN.sum(-1).max()) if limit is None else limit
            picks_M, chosen_M = _first_true(chosen_BN, most)
            rows_M = rows_BN.flatten()[picks_M]
            block.reveal(rows_M, logits_MV[picks_M], chosen_M)
            masked_BS.view(-1)[rows_M] &= ~chosen_M
            left = int(masked_BS.sum(-1).max()) if limit is None else left - limit


def _candidates(masked_BS: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Rows of the masked positions [B, N = most] and whether they are masked: some are padding."""
    place_BN = masked_BS.int().argsort(dim=-1, descending=True, stable=True)[:, :most]
    first_B1 = torch.arange(len(masked_BS), device=masked_BS.device)[:, None] * masked_BS.shape[1]
    return first_B1 + place_BN, masked_BS.gather(1, place_BN)


def _first_true(chosen_BN: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Flat indices of each row's true entries, padded to `most` per row, and which are true."""
    rows_M, chosen_BM = _candidates(chosen_BN, most)
    return rows_M.flatten(), chosen_BM.flatten()


class Confidence(Adaptive):
    """Reveal all positions whose most probable token has at least the threshold's probability.

    The most confident position is revealed in any case (arXiv 2505.22618).

    Args:
        threshold: probability in [0, 1]; 0 reveals a block at once.
    """

    def __init__(self, threshold: float = 0.9) -> None:
        _require(0.0 <= threshold <= 1.0, "confidence_threshold", threshold, "[0, 1]")
        self.threshold = threshold

    def choose(self, log_p_BNV: Tensor, masked_BN: Tensor) -> Tensor:
        """p_max >= threshold, or the largest p_max of the sequence."""
        confidence_BN = _confidence(log_p_BNV, masked_BN)
        best_B1 = confidence_BN.argmax(-1, keepdim=True)
        return (confidence_BN >= self.threshold).scatter(-1, best_B1, True)


class TopK(Adaptive):
    """Reveal the k positions whose most probable token is most probable (arXiv 2202.04200).

    Args:
        tokens_per_step: k.
    """

    def __init__(self, tokens_per_step: int = 1) -> None:
        _require(tokens_per_step >= 1, "tokens_per_step", tokens_per_step, "an integer >= 1")
        self.tokens_per_step = tokens_per_step

    def limit(self, left: int) -> int:
        """k, or all that are left."""
        return min(self.tokens_per_step, left)

    def choose(self, log_p_BNV: Tensor, masked_BN: Tensor) -> Tensor:
        """The k largest p_max of each sequence."""
        confidence_BN = _confidence(log_p_BNV, masked_BN)
        best_BK = confidence_BN.topk(self.limit(masked_BN.shape[1]), dim=-1).indices
        return torch.zeros_like(masked_BN).scatter(-1, best_BK, True)


class EntropyBound(Adaptive):
    """Reveal the largest set of positions of lowest entropy with sum(H) - max(H) <= bound.

    The left side bounds what drawing the set independently can cost, its total correlation
    sum(H) - H(all) (arXiv 2505.24857). One position alone costs nothing.

    Args:
        bound: nats, >= 0.
    """

    def __init__(self, bound: float = 0.1) -> None:
        _require(bound >= 0.0, "entropy_bound", bound, "[0, inf)")
        self.bound = bound

    def choose(self, log_p_BNV: Tensor, masked_BN: Tensor) -> Tensor:
        """With entropies ascending, sum(H) - max(H) is the sum of all but the last."""
        entropy_BN = torch.special.entr(log_p_BNV.exp()).sum(-1)
        # Padding goes behind every masked position, whose entropy is at most log V.
        sorted_BN, order_BN = entropy_BN.masked_fill(~masked_BN, 1e4).sort(dim=-1)
        before_BN = sorted_BN.cumsum(-1) - sorted_BN
        before_BN[:, 0] = 0.0
        return torch.zeros_like(masked_BN).scatter(-1, order_BN, before_BN <= self.bound)


def _confidence(log_p_BNV: Tensor, masked_BN: Tensor) -> Tensor:
    """Probability of the most probable token; below every probability where nothing is masked."""
    return log_p_BNV.amax(-1).exp().masked_fill(~masked_BN, -1.0)


def _require(valid: bool, name: str, value: object, allowed: str) -> None:
    if not valid:
        raise ValueError(f"sampling.{name}={value}: allowed {allowed}")
