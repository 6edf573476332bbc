"""What becomes of a drafted block: how drafts are chosen, and which of them the target accepts.

The target has seen [anchor, d_1 .. d_K] in one pass; its logits at place i are its distribution
p_{i+1} of the token behind. A rule accepts the longest prefix and adds one token of the target's
own, so a cycle commits 1 to K + 1 tokens. All rules leave the target's distribution as it is:

    Greedy       accept d_i while d_i = argmax p_i; add the argmax behind. Temperature 0.
    ExactMatch   draw y_i ~ p_i from the target itself, accept while d_i = y_i, add the first y that
                 was not drafted. Token for token what plain sampling draws with the same numbers.
    Rejection    d_i ~ q_i; accept with min(1, p_i(d_i) / q_i(d_i)); where that fails add a token of
                 the residual max(0, p_i - q_i) / sum, behind K accepted ones one of p_{K+1}
                 (arXiv 2211.17192, 2302.01318).

Random numbers are keyed by request and place in the answer (`RequestNoise`), so that results do not
depend on the batch. A place that is drafted again after a refusal sees its number again, which is
harmless: what was committed before depends on the numbers of earlier places only.

Legend: B sequences, K drafted tokens, Q = K + 1, V vocabulary, N places.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoding.categorical import invert, keyed_uniform64, nucleus

# What a random number is for; part of its key.
TARGET, DRAFT, ACCEPT = range(3)


class RequestNoise:
    """Uniform numbers in [0, 1), a function of (seed, purpose, request, place in the answer).

    Args:
        seed: part of every key.
        requests: a number for each sequence.
        places: how many places there are, drafts behind the limit included.
    """

    def __init__(
        self, seed: int, requests: Sequence[int], places: int, device: torch.device
    ) -> None:
        self._seed, self._places, self._device = seed, places, device
        self._requests_B = torch.tensor(requests, dtype=torch.long)
        self._drawn: dict[int, Tensor] = {}

    def at(self, purpose: int, place_BN: Int[Tensor, "B N"]) -> Float[Tensor, "B N"]:
        """The numbers of these places."""
        if purpose not in self._drawn:
            numbers_BP = keyed_uniform64((self._seed, purpose), self._requests_B, self._places)
            self._drawn[purpose] = numbers_BP.to(self._device)
        return self._drawn[purpose].gather(1, place_BN)

    def keep(self, rows: Sequence[int]) -> None:
        """Drop all other sequences."""
        rows_A = torch.tensor(rows)
        self._requests_B = self._requests_B[rows_A]
        self._drawn = {k: v[rows_A.to(self._device)] for k, v in self._drawn.items()}


class Drafts(NamedTuple):
    """Drafted tokens [B, K]; the distribution [B, K, V] they were drawn from, if a rule asks."""

    tokens_BK: Tensor
    q_BKV: Tensor | None


class Verdict(NamedTuple):
    """Number of accepted drafts [B]; [B, Q] tokens, of which the first accepted + 1 count."""

    accepted_B: Tensor
    tokens_BQ: Tensor


@runtime_checkable
class Verification(Protocol):
    """A rule; `place` counts tokens of the answer from 0, which the prefill gives."""

    def draw(
        self, logits_BV: Float[Tensor, "B V"], noise: RequestNoise, place_B: Int[Tensor, " B"]
    ) -> Int[Tensor, " B"]:
        """A token of the target alone: of the prefill, or of plain decoding."""
        ...

    def draft(
        self, logits_BKV: Float[Tensor, "B K V"], noise: RequestNoise, place_BK: Int[Tensor, "B K"]
    ) -> Drafts:
        """Choose drafts from the draft model's logits."""
        ...

    def verify(
        self,
        drafts: Drafts,
        logits_BQV: Float[Tensor, "B Q V"],
        noise: RequestNoise,
        place_BQ: Int[Tensor, "B Q"],
    ) -> Verdict:
        """Accept and correct; `place_BQ` are the places that the target's logits are about."""
        ...


class Greedy:
    """Temperature 0: the result is the target's own greedy answer."""

    def draw(
        self, logits_BV: Float[Tensor, "B V"], noise: RequestNoise, place_B: Int[Tensor, " B"]
    ) -> Int[Tensor, " B"]:
        """The most probable token."""
        return logits_BV.argmax(-1)

    def draft(
        self, logits_BKV: Float[Tensor, "B K V"], noise: RequestNoise, place_BK: Int[Tensor, "B K"]
    ) -> Drafts:
        """The most probable tokens."""
        return Drafts(logits_BKV.argmax(-1), None)

    def verify(
        self,
        drafts: Drafts,
        logits_BQV: Float[Tensor, "B Q V"],
        noise: RequestNoise,
        place_BQ: Int[Tensor, "B Q"],
    ) -> Verdict:
        """Accept what the target would have said."""
        own_BQ = logits_BQV.argmax(-1)
        return Verdict(_prefix(drafts.tokens_BK == own_BQ[:, :-1]), own_BQ)


@dataclass(frozen=True)
class Warping:
    """The target's distribution: tempered, cut to the `top_k` most probable tokens, then to a
    nucleus of `top_p`.

    Raises:
        ValueError: a value outside its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        for name, holds, allowed in (
            ("temperature", self.temperature > 0, "(0, inf); for 0 use the greedy rule"),
            ("top_p", 0 < self.top_p <= 1, "(0, 1]"),
            ("top_k", self.top_k >= 0, "an integer >= 0 (0 = all)"),
        ):
            if not holds:
                value = getattr(self, name)
                raise ValueError(f"verification.{name}={value}: allowed {allowed}")

    def __call__(self, logits: Float[Tensor, "*N V"]) -> Float[Tensor, "*N V"]:
        """Probabilities, at least in float32; they sum to one."""
        p = (
            logits.to(torch.promote_types(logits.dtype, torch.float32)) / self.temperature
        ).softmax(-1)
        if self.top_k and self.top_k < p.shape[-1]:
            least = p.topk(self.top_k, dim=-1).values[..., -1:]
            p = p.where(p >= least, 0.0)
            p = p / p.sum(-1, keepdim=True)
        if self.top_p < 1:
            p = nucleus(p.flatten(0, -2), self.top_p).view_as(p)
            p = p / p.sum(-1, keepdim=True)
        return p


class _Sampling:
    """What the rules of a temperature share: the target's distribution, and a draw from it.

    Args:
        temperature, top_p, top_k: of the target.
    """

    def __init__(self, temperature: float = 1.0, top_p: float = 1.0, top_k: int = 0) -> None:
        self._warp = Warping(temperature, top_p, top_k)

    def draw(
        self, logits_BV: Float[Tensor, "B V"], noise: RequestNoise, place_B: Int[Tensor, " B"]
    ) -> Int[Tensor, " B"]:
        """A token of the target's distribution."""
        return invert(self._warp(logits_BV), noise.at(TARGET, place_B[:, None])[:, 0])


class ExactMatch(_Sampling):
    """The target samples, drafts must guess it.

    Args:
        temperature, top_p, top_k: of the target.
        sampled_drafts: draw the drafts from the draft's own distribution, warped likewise, instead
            of taking its most probable tokens.
    """

    def __init__(
        self,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        sampled_drafts: bool = False,
    ) -> None:
        super().__init__(temperature, top_p, top_k)
        self._sampled_drafts = sampled_drafts

    def draft(
        self, logits_BKV: Float[Tensor, "B K V"], noise: RequestNoise, place_BK: Int[Tensor, "B K"]
    ) -> Drafts:
        """The most probable tokens, or drawn ones."""
        if not self._sampled_drafts:
            return Drafts(logits_BKV.argmax(-1), None)
        return Drafts(_invert(self._warp(logits_BKV), noise.at(DRAFT, place_BK)), None)

    def verify(
        self,
        drafts: Drafts,
        logits_BQV: Float[Tensor, "B Q V"],
        noise: RequestNoise,
        place_BQ: Int[Tensor, "B Q"],
    ) -> Verdict:
        """Accept what the target drew."""
        own_BQ = _invert(self._warp(logits_BQV), noise.at(TARGET, place_BQ))
        return Verdict(_prefix(drafts.tokens_BK == own_BQ[:, :-1]), own_BQ)


class Rejection(_Sampling):
    """Speculative sampling: drafts from q are accepted as often as p allows.

    Args:
        temperature, top_p, top_k: of the target, and of the draft.
    """

    def draft(
        self, logits_BKV: Float[Tensor, "B K V"], noise: RequestNoise, place_BK: Int[Tensor, "B K"]
    ) -> Drafts:
        """Tokens of q, and q."""
        q_BKV = self._warp(logits_BKV)
        return Drafts(_invert(q_BKV, noise.at(DRAFT, place_BK)), q_BKV)

    def verify(
        self,
        drafts: Drafts,
        logits_BQV: Float[Tensor, "B Q V"],
        noise: RequestNoise,
        place_BQ: Int[Tensor, "B Q"],
    ) -> Verdict:
        """Accept with min(1, p / q); u q < p needs no division and never accepts where p is 0."""
        assert drafts.q_BKV is not None
        p_BQV, tokens_BK = self._warp(logits_BQV), drafts.tokens_BK
        p_BK, q_BK = (
            x.gather(-1, tokens_BK[..., None])[..., 0] for x in (p_BQV[:, :-1], drafts.q_BKV)
        )
        accepted_B = _prefix(noise.at(ACCEPT, place_BQ[:, :-1]) * q_BK < p_BK)
        # Behind the last draft nothing was proposed: q = 0 makes the residual p itself.
        q_BQV = torch.zeros_like(p_BQV)
        q_BQV[:, :-1] = drafts.q_BKV
        left_BV, full_BV = ((x[_rows(accepted_B), accepted_B]) for x in (p_BQV - q_BQV, p_BQV))
        left_BV = left_BV.clamp_min(0)
        # Rounding may leave nothing of a residual that is tiny: p and q are then the same.
        left_BV = torch.where(left_BV.sum(-1, keepdim=True) > 0, left_BV, full_BV)
        place_B1 = place_BQ.gather(1, accepted_B[:, None])
        added_B = invert(left_BV, noise.at(TARGET, place_B1)[:, 0])
        tokens_BQ = torch.cat([tokens_BK, added_B[:, None]], dim=1)
        return Verdict(accepted_B, tokens_BQ.scatter(1, accepted_B[:, None], added_B[:, None]))


def _prefix(match_BK: Bool[Tensor, "B K"]) -> Int[Tensor, " B"]:
    """Length of the leading run of true entries."""
    return match_BK.long().cumprod(-1).sum(-1)


def _invert(p_BNV: Float[Tensor, "B N V"], uniform_BN: Float[Tensor, "B N"]) -> Tensor:
    return invert(p_BNV.flatten(0, 1), uniform_BN.flatten()).view_as(uniform_BN)


def _rows(x_B: Tensor) -> Tensor:
    return torch.arange(len(x_B), device=x_B.device)
