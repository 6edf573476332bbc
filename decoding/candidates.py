"""Proposals: several candidate blocks from the factorised posterior prod_i p_i of a block.

    SoftmaxSampling   c ~ prod_i softmax(logits_i / T), repeats left out
    BeamBayes         the argmax block and its cheapest swaps to second-best tokens (arXiv
                      2606.08357, Alg. 5)
    BeamExact         the most probable blocks there are

A scorer ranks what they propose; no gradient flows through. Random numbers are keyed by the block,
and sums over places are taken from left to right, so that a block's candidates do not depend on the
batch it is in.

Legend: M blocks, S places of a block, V vocabulary, C candidates, N best tokens of a place,
P subsets of places, T tries.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import combinations
from math import comb
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.keyed import keyed_uniform

# Subsets of a block that a beam looks at; each costs a sum per block.
_MOST_SUBSETS = 1 << 14


class Candidates(NamedTuple):
    """Distinct blocks to choose from.

    Attributes:
        tokens_MCS: int64; candidate 0 is the argmax block (of equal logits the lowest id), or the
            first sample where a proposal says so. Invalid slots repeat candidate 0.
        log_q_MC: nats, sum over the free places of the log-probabilities that were proposed from
            (those of temperature T if sampled at T); -inf where invalid.
        valid_MC: false where there are fewer distinct candidates than were asked for. A block in
            which a free place has nothing but -inf, or a NaN, has no valid candidate.
        duplicates_M: how many draws of a block repeated an earlier candidate of it; None if
            nothing was drawn.
        draws: draws per block.
    """

    tokens_MCS: Tensor
    log_q_MC: Tensor
    valid_MC: Tensor
    duplicates_M: Tensor | None = None
    draws: int = 0


@runtime_checkable
class Proposal(Protocol):
    """How candidates are found.

    Attributes:
        name: as in configurations.
        temperature: of the distribution that `log_q_MC` is of.
        deterministic: whether `key` and `rows_M` are without effect.
    """

    @property
    def name(self) -> str:
        """Of the proposal."""
        ...

    @property
    def temperature(self) -> float | int:
        """T."""
        ...

    @property
    def deterministic(self) -> bool:
        """Whether nothing is drawn."""
        ...

    def __call__(
        self,
        logits_MSV: Float[Tensor, "M S V"],
        fixed_MS: Bool[Tensor, "M S"],
        tokens_MS: Int[Tensor, "M S"],
        count: int,
        key: tuple[int, ...],
        rows_M: Int[Tensor, " M"],
    ) -> Candidates:
        """`count` candidates for every block.

        Args:
            logits_MSV: scores of the tokens; one of -inf is never proposed.
            fixed_MS: places that are given: every candidate has `tokens_MS` there, which adds
                nothing to its `log_q_MC`. Their logits are not looked at.
            tokens_MS: tokens of the fixed places; elsewhere anything.
            count: C.
            key: what the random numbers are for, e.g. (seed, purpose, iteration).
            rows_M: counter of every block, e.g. of its request and place.
        """
        ...


def duplicate_rate(candidates: Candidates) -> Float[Tensor, ""]:
    """Share of all draws that repeated an earlier candidate of their block; 0 without draws."""
    if candidates.duplicates_M is None or not len(candidates.duplicates_M):
        return candidates.log_q_MC.new_zeros(())
    return candidates.duplicates_M.to(candidates.log_q_MC.dtype).mean() / candidates.draws


@dataclass(frozen=True)
class SoftmaxSampling:
    """c ~ q_T(c) = prod_i softmax(logits_i / T)(c_i), of which the first distinct ones are kept.

    The law of the candidates, for those who train on them as negatives: without the greedy block
    the first one is a draw from q_T, and each later one a draw from q_T given that it differs from
    those before (until the tries are used up). With it, candidate 0 is no draw, and the others are
    draws given that they differ from it: the argmax block is then a certain negative whatever its
    q_T, so a loss that assumes samples of q_T (`ranking` and its correction by log q_T) is off by
    that block. Train on samples with `include_greedy=False`, or compare within the set alone.

    Attributes:
        temperature: T > 0.
        tries: draws per block; what is still missing then is marked invalid.
        include_greedy: whether candidate 0 is the argmax block, so that a scorer of weight 0 leaves
            greedy decoding as it is.

    Raises:
        ValueError: a value out of its range; when called, more candidates than there can be.
    """

    temperature: float | int = 1.0
    tries: int = 16
    include_greedy: bool = True
    name = "softmax_sampling"
    deterministic = False

    def __post_init__(self) -> None:
        finite = 0.0 < self.temperature < float("inf")
        _require(finite, "proposal.temperature", self.temperature, "(0, inf)")
        _require(self.tries >= 1, "proposal.tries", self.tries, "an integer >= 1")

    def __call__(
        self,
        logits_MSV: Float[Tensor, "M S V"],
        fixed_MS: Bool[Tensor, "M S"],
        tokens_MS: Int[Tensor, "M S"],
        count: int,
        key: tuple[int, ...],
        rows_M: Int[Tensor, " M"],
    ) -> Candidates:
        """Draw `tries` blocks and keep the first `count` that differ."""
        _require_count(count)
        least = count - self.include_greedy
        allowed = f"at least {least} for bon.count={count}"
        _require(self.tries >= least, "proposal.tries", self.tries, allowed)
        log_q_MSV = _log_softmax(logits_MSV, self.temperature)
        drawn_MTS = _draw(log_q_MSV, key, rows_M, self.tries)
        if self.include_greedy:
            drawn_MTS = torch.cat([logits_MSV.argmax(-1)[:, None], drawn_MTS], dim=1)
        log_q_MTS = log_q_MSV.gather(-1, drawn_MTS.mT).mT.masked_fill(fixed_MS[:, None], 0.0)
        drawn_MTS = torch.where(fixed_MS[:, None], tokens_MS[:, None].long(), drawn_MTS)
        repeats_MT = _repeats(drawn_MTS)
        log_q_MT = _sum_places(log_q_MTS).masked_fill(repeats_MT, -torch.inf)
        kept_MC = repeats_MT.int().argsort(dim=-1, stable=True)[:, :count]
        kept_MCS = kept_MC[..., None].expand(-1, -1, drawn_MTS.shape[-1])
        candidates = _candidates(drawn_MTS.gather(1, kept_MCS), log_q_MT.gather(1, kept_MC), count)
        return candidates._replace(duplicates_M=repeats_MT.sum(-1), draws=self.tries)


@dataclass(frozen=True)
class BeamBayes:
    """The argmax block and its cheapest swaps (arXiv 2606.08357, Alg. 5).

    delta_i = log p_i(best) - log p_i(second best) is what a swap at place i costs. Of all subsets
    of at most R places, the cheapest by the sum of their deltas are swapped; the empty one comes
    first, and of equally cheap ones the smaller, then the one further left. `log_q_MC` is
    sum_i log p_i(c_i) at T = 1.

    A place that is fixed, or has one token that is allowed, cannot be swapped.

    Attributes:
        max_swap: R; S and above are the same.

    Raises:
        ValueError: a negative R; when called, more subsets of a block than can be looked at.
    """

    max_swap: int = 1
    name = "beam_bayes"
    temperature = 1.0
    deterministic = True

    def __post_init__(self) -> None:
        _require(self.max_swap >= 0, "proposal.max_swap", self.max_swap, "an integer >= 0")

    def __call__(
        self,
        logits_MSV: Float[Tensor, "M S V"],
        fixed_MS: Bool[Tensor, "M S"],
        tokens_MS: Int[Tensor, "M S"],
        count: int,
        key: tuple[int, ...],
        rows_M: Int[Tensor, " M"],
    ) -> Candidates:
        """The `count` cheapest subsets, swapped."""
        _require_count(count)
        tokens_MSN, log_p_MSN = _best(logits_MSV, fixed_MS, tokens_MS, 2)
        swaps_PS = _subsets(logits_MSV.shape[1], self.max_swap, logits_MSV.device)
        delta_MS = log_p_MSN[..., 0] - log_p_MSN[..., 1]
        cost_MP = _sum_places(torch.where(swaps_PS, delta_MS[:, None], 0.0))
        # topk may order equal costs as it likes, and the empty subset has to be the first.
        cheapest_MC = cost_MP.argsort(dim=-1, stable=True)[:, :count]
        swapped_MCS = swaps_PS[cheapest_MC]
        tokens_MCS, log_p_MCS = (
            torch.where(swapped_MCS, x_MSN[:, None, :, 1], x_MSN[:, None, :, 0])
            for x_MSN in (tokens_MSN, log_p_MSN)
        )
        return _candidates(tokens_MCS, _sum_places(log_p_MCS), count)


@dataclass(frozen=True)
class BeamExact:
    """The most probable blocks of prod_i p_i, distinct, in falling order.

    Place by place, the n best prefixes are joined with the n best tokens of the next place, and the
    n best of these n^2 are kept. That is exact: let (a, b) be among the n best pairs of a prefix a
    and a token b. Were a not among the n best prefixes, n others would be at least as probable,
    and each of them with b a pair at least as probable as (a, b): n pairs, all distinct, so that
    without ties (a, b) is not among the n best. The same holds for b. With ties the set may be
    another one, of the same probabilities. By induction the prefixes kept are the n best, too.
    """

    name = "beam_exact"
    temperature = 1.0
    deterministic = True

    def __call__(
        self,
        logits_MSV: Float[Tensor, "M S V"],
        fixed_MS: Bool[Tensor, "M S"],
        tokens_MS: Int[Tensor, "M S"],
        count: int,
        key: tuple[int, ...],
        rows_M: Int[Tensor, " M"],
    ) -> Candidates:
        """Merge the places from left to right."""
        _require_count(count)
        tokens_MSN, log_p_MSN = _best(logits_MSV, fixed_MS, tokens_MS, count)
        log_q_MC = log_p_MSN.new_zeros(len(log_p_MSN), 1)
        found_MCS = tokens_MSN.new_empty(len(log_p_MSN), 1, 0)
        for place in range(logits_MSV.shape[1]):
            joint_MCN = log_q_MC[:, :, None] + log_p_MSN[:, None, place]
            # Stable: the best tokens of all places stay candidate 0 where others are as probable.
            joint_MR, order_MR = joint_MCN.flatten(1).sort(dim=-1, descending=True, stable=True)
            log_q_MC, order_MC = joint_MR[:, :count], order_MR[:, :count]
            prefix_MC1 = (order_MC // count)[..., None]
            added_MC = tokens_MSN[:, place].gather(1, order_MC % count)
            prefix_MCS = found_MCS.gather(1, prefix_MC1.expand(-1, -1, place))
            found_MCS = torch.cat([prefix_MCS, added_MC[..., None]], dim=-1)
        return _candidates(found_MCS, log_q_MC, count)


def _log_softmax(logits_MSV: Tensor, temperature: float = 1.0) -> Tensor:
    """A new tensor, in float32 or better, without a gradient."""
    logits_MSV = logits_MSV.detach()
    dtype = torch.promote_types(logits_MSV.dtype, torch.float32)
    if temperature == 1.0:
        return logits_MSV.log_softmax(-1, dtype=dtype)
    return (logits_MSV.to(dtype) / temperature).log_softmax(-1)


def _best(
    logits_MSV: Tensor, fixed_MS: Tensor, tokens_MS: Tensor, count: int
) -> tuple[Tensor, Tensor]:
    """The `count` best tokens of every place and their log p [M, S, N], -inf behind the last.

    The best is the argmax of the logits: log p rounds, and might take two tokens for equal.
    """
    log_p_MSV = _log_softmax(logits_MSV)
    first_MS1 = logits_MSV.argmax(-1, keepdim=True)
    log_first_MS1 = log_p_MSV.gather(-1, first_MS1)
    log_p_MSV.scatter_(-1, first_MS1, -torch.inf)
    others = log_p_MSV.topk(min(count, log_p_MSV.shape[-1]) - 1, dim=-1)
    missing = (0, max(0, count - log_p_MSV.shape[-1]))
    tokens_MSN = torch.cat([first_MS1, others.indices], dim=-1)
    log_p_MSN = torch.cat([log_first_MS1, others.values], dim=-1)
    tokens_MSN = torch.nn.functional.pad(tokens_MSN, missing)
    log_p_MSN = torch.nn.functional.pad(log_p_MSN, missing, value=-torch.inf)
    # A fixed place has one token, of probability 1.
    only_N = log_p_MSN.new_full((count,), -torch.inf)
    only_N[0] = 0.0
    fixed_MS1 = fixed_MS[..., None]
    tokens_MSN = torch.where(fixed_MS1, tokens_MS[..., None].long(), tokens_MSN)
    return tokens_MSN, torch.where(fixed_MS1, only_N, log_p_MSN)


def _draw(log_q_MSV: Tensor, key: Sequence[int], rows_M: Tensor, tries: int) -> Tensor:
    """Blocks [M, T, S] by the inverse of the cumulative distributions: none of probability 0."""
    cumulative_MSV = log_q_MSV.exp().cumsum_(-1)
    total_MS1 = cumulative_MSV[..., -1:]
    places = log_q_MSV.shape[1]
    # One try after the other: more tries leave the first ones as they are.
    uniform_MTS = keyed_uniform(key, rows_M, tries * places).unflatten(1, (tries, places))
    uniform_MST = uniform_MTS.mT.contiguous().to(total_MS1)
    # A product may be rounded up to the total, which nothing exceeds.
    below_MS1 = torch.nextafter(total_MS1, torch.zeros_like(total_MS1))
    wanted_MST = torch.minimum(uniform_MST * total_MS1, below_MS1)
    drawn_MST = torch.searchsorted(cumulative_MSV, wanted_MST, right=True)
    # Behind the last one only where a place has no distribution, as a fixed one may.
    return drawn_MST.clamp_max(log_q_MSV.shape[-1] - 1).mT


def _repeats(blocks_MTS: Tensor) -> Tensor:
    """Which blocks [M, T] equal an earlier one of their row."""
    equal_MTT = reduce(
        torch.logical_and, [x[:, :, None] == x[:, None, :] for x in blocks_MTS.unbind(-1)]
    )
    return equal_MTT.tril(-1).any(-1)


def _sum_places(x_MCS: Tensor) -> Tensor:
    """Sum over the places from left to right, by which no other row matters to the rounding."""
    return reduce(torch.add, x_MCS.unbind(-1))


@cache
def _subsets(places: int, most: int, device: torch.device) -> Tensor:
    """Masks [P, S] of the subsets of at most `most` places, small ones first; 0 is empty."""
    sizes = range(min(most, places) + 1)
    number = sum(comb(places, size) for size in sizes)
    allowed = f"at most {_MOST_SUBSETS} subsets of a block's {places} places, these are {number}"
    _require(number <= _MOST_SUBSETS, "proposal.max_swap", most, allowed)
    subsets = [set(subset) for size in sizes for subset in combinations(range(places), size)]
    return torch.tensor([[i in subset for i in range(places)] for subset in subsets], device=device)


def _candidates(tokens_MCS: Tensor, log_q_MC: Tensor, count: int) -> Candidates:
    """Fill up to `count` slots and mark those without a candidate."""
    missing = count - tokens_MCS.shape[1]
    first_M1S = tokens_MCS[:, :1]
    tokens_MCS = torch.cat([tokens_MCS, first_M1S.expand(-1, missing, -1)], dim=1)
    log_q_MC = torch.nn.functional.pad(log_q_MC, (0, missing), value=-torch.inf)
    valid_MC = log_q_MC > -torch.inf
    return Candidates(
        torch.where(valid_MC[..., None], tokens_MCS, first_M1S),
        log_q_MC.masked_fill(~valid_MC, -torch.inf),
        valid_MC,
    )


def _require_count(count: int) -> None:
    _require(count >= 1, "count", count, "an integer >= 1")


def _require(valid: bool, name: str, value: object, allowed: str) -> None:
    if not valid:
        raise ValueError(f"bon.{name}={value}: allowed {allowed}")
