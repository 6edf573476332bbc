"""Speculative drafts: how likely a slot is accepted, how long a block lasts, losses made of it.

A draft predicts K tokens after a known one, all at once. p_k is the target's distribution of the
token of slot k (k = 1..K), q_k the draft's, y_k the token that is there, m_k whether slot k counts.
With a_k, the probability that slot k is accepted once it is reached,

    S_k = prod_{i<=k} a_i,      EAL = sum_k S_k,      d EAL / d log a_j = w_j = sum_{m>=j} S_m

S_k is the probability that slot k is accepted (survival), EAL the expected number of accepted
tokens; a verification step commits 1 + EAL tokens. A draft is cut at its first rejected token, so a
hole ends the block as well: S is 0 from the first slot with m_k = 0 on.

"EAL" and "survival-EAL" are a reading of the published descriptions; no code of them is public. The
functions come first, on probabilities, slow and clear; `objectives/draft_losses.py` makes losses of
them. `AcceptanceObjective` states the same on log-probabilities of slots, whatever computed those;
in training it is `objectives/fused_acceptance.py`, which never holds the logits of a batch.

Legend: N blocks, K predicted slots of a block, V vocabulary. Losses are in nats.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


def decay_weights(
    slots: int,
    gamma: float | int | None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | None = None,
) -> Float[Tensor, " K"]:
    """exp(-(k - 1) / gamma) for k = 1..K: the first predicted slot weighs 1; None is no decay."""
    place_K = torch.arange(slots, dtype=dtype, device=device)
    return torch.exp(-place_K / (torch.inf if gamma is None else gamma))


def unbroken(valid_NK: Bool[Tensor, "N K"]) -> Bool[Tensor, "N K"]:
    """The slots before the first hole of every block."""
    return valid_NK.long().cumprod(-1).bool()


def survival(a_NK: Float[Tensor, "N K"], valid_NK: Bool[Tensor, "N K"]) -> Float[Tensor, "N K"]:
    """S_k = prod_{i<=k} a_i, and 0 from the first hole on."""
    return a_NK.masked_fill(~valid_NK, 0.0).cumprod(-1)


def expected_accepted_length(
    a_NK: Float[Tensor, "N K"], valid_NK: Bool[Tensor, "N K"]
) -> Float[Tensor, " N"]:
    """EAL = sum_k S_k of every block, in tokens."""
    return survival(a_NK, valid_NK).sum(-1)


def suffix_weights(
    a_NK: Float[Tensor, "N K"], valid_NK: Bool[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """w_j = sum_{m>=j} S_m, the derivative of EAL with respect to log a_j."""
    return survival(a_NK, valid_NK).flip(-1).cumsum(-1).flip(-1)


def smoothed(a_NK: Float[Tensor, "N K"], smoothing: float | int) -> Float[Tensor, "N K"]:
    """(1 - s) a + s: no slot is hopeless, so what lies behind it keeps a gradient (2605.18810)."""
    return (1.0 - smoothing) * a_NK + smoothing


def survival_weights(
    a_NK: Float[Tensor, "N K"],
    valid_NK: Bool[Tensor, "N K"],
    inclusive: bool = False,
    floor: float | int = 0.0,
) -> Float[Tensor, "N K"]:
    """max(S_{k-1}, floor), the probability that slot k is reached; `inclusive` takes S_k.

    0 from the first hole on, whatever the floor.
    """
    s_NK = survival(a_NK, valid_NK)
    if not inclusive:
        s_NK = torch.cat([torch.ones_like(s_NK[:, :1]), s_NK[:, :-1]], dim=-1)
    return s_NK.clamp(min=floor) * unbroken(valid_NK)


def dpace_weights(
    a_NK: Float[Tensor, "N K"], valid_NK: Bool[Tensor, "N K"], smoothing: float | int = 0.5
) -> Float[Tensor, "N K"]:
    """Suffix sums of the smoothed survival, D-PACE's weights of the cross-entropy (2605.18810).

    With smoothing 0 their cross-entropy has the gradient of -EAL. The paper's code steps over a
    hole inside a block, as if it had been accepted; here it ends the block.
    """
    return suffix_weights(smoothed(a_NK, smoothing), valid_NK)


def label_probability(
    p_NKV: Float[Tensor, "N K V"], q_NKV: Float[Tensor, "N K V"], labels_NK: Int[Tensor, "N K"]
) -> Float[Tensor, "N K"]:
    """q(y)."""
    return q_NKV.gather(-1, labels_NK[..., None])[..., 0]


def _greedy(p_NKV: Tensor, q_NKV: Tensor, labels_NK: Tensor) -> Tensor:
    return (q_NKV.argmax(-1) == labels_NK).to(q_NKV.dtype)


def _greedy_match(p_NKV: Tensor, q_NKV: Tensor, labels_NK: Tensor) -> Tensor:
    return p_NKV.gather(-1, q_NKV.argmax(-1, keepdim=True))[..., 0]


def _match(p_NKV: Tensor, q_NKV: Tensor, labels_NK: Tensor) -> Tensor:
    return (p_NKV * q_NKV).sum(-1)


def _overlap(p_NKV: Tensor, q_NKV: Tensor, labels_NK: Tensor) -> Tensor:
    return torch.minimum(p_NKV, q_NKV).sum(-1)


_Acceptance = Callable[[Tensor, Tensor, Tensor], Tensor]
# What verification really accepts, and what stands in for it where a gradient is needed.
ACCEPTANCE: dict[str, tuple[_Acceptance, _Acceptance]] = {
    "greedy": (_greedy, label_probability),
    "greedy_match": (_greedy_match, _match),
    "match": (_match, _match),
    "overlap": (_overlap, _overlap),
}
# Those a draft can be trained for: each has a differentiable stand-in of its own.
VERIFICATIONS = ("greedy", "match", "overlap")


def acceptance_probability(
    p_NKV: Float[Tensor, "N K V"],
    q_NKV: Float[Tensor, "N K V"],
    labels_NK: Int[Tensor, "N K"],
    verification: str,
    differentiable: bool = False,
) -> Float[Tensor, "N K"]:
    """Probability that a slot is accepted when all slots before it were.

    On the target's own path; for greedy labels that is exact, because what has been accepted then
    equals the labels.

        verification   how                                       a              differentiable
        greedy         both greedy                               1[argmax q=y]  q(y)
        greedy_match   greedy draft equals the target's sample   p(argmax q)    sum p q
        match          sampled draft equals the target's sample  sum p q        sum p q
        overlap        rejection sampling                        sum min(p, q)  sum min(p, q)

    Raises:
        ValueError: a verification that is not listed.
    """
    if verification not in ACCEPTANCE:
        raise ValueError(f"verification={verification}: allowed {', '.join(ACCEPTANCE)}")
    return ACCEPTANCE[verification][differentiable](p_NKV, q_NKV, labels_NK)


class BlockTerms(NamedTuple):
    """The parts of the loss of every block, each a sum over its slots, and the weights in it.

    reward_N: the expected accepted length, in tokens, smoothed if the objective is.
    kl_N: sum_k weight KL; ce_N: sum_k weight (-log a), the cross-entropy if a = q(y).
    weight_NK: detached, 0 at slots that do not count.
    """

    reward_N: Float[Tensor, " N"]
    kl_N: Float[Tensor, " N"]
    ce_N: Float[Tensor, " N"]
    weight_NK: Float[Tensor, "N K"]


def _survival_rule(s_NK: Tensor, objective: "AcceptanceObjective") -> Tensor:
    if objective.inclusive:
        return s_NK
    return torch.cat([torch.ones_like(s_NK[:, :1]), s_NK[:, :-1]], dim=-1)


def _suffix_rule(s_NK: Tensor, objective: "AcceptanceObjective") -> Tensor:
    return s_NK.flip(-1).cumsum(-1).flip(-1)


# Rules that follow the draft: detached S of every slot -> weight. None: no such factor.
POSITION_RULES: dict[str, Callable[[Tensor, "AcceptanceObjective"], Tensor] | None] = {
    "uniform": None,
    "decay": None,
    "survival": _survival_rule,
    "suffix": _suffix_rule,
}


@dataclass(frozen=True)
class AcceptanceObjective:
    """-reward_weight EAL + kl_weight weight KL + ce_weight weight (-log a), and what weight is.

    Everything is made from log a and KL of the slots, so a new rule is a subclass with its own
    `position_weights` or `block_terms`, named by `_target_` in a yaml of the group `objective`.

    Args:
        reward_weight: of the expected accepted length over K (see `scales`).
        kl_weight: of KL(target || draft), lambda; 0 needs no teacher for it.
        ce_weight: of -log a: the cross-entropy of the label with `verification=greedy`, the LK loss
            (arXiv 2602.23881) with `overlap`.
        position: weight of a slot in KL and CE. `uniform`; `decay`, exp(-(k-1)/gamma); `survival`,
            the probability that it is reached; `suffix`, w_k = sum_{m>=k} S_m (D-PACE, 2605.18810).
            The last two are detached, end at a hole and, if gamma is set, decay as well.
        gamma: of the decay, in slots; None (or infinite) is none.
        inclusive: `survival` takes S_k (accepted) in place of S_{k-1} (reached).
        floor: least weight of `survival` and `suffix` before the hole.
        smoothing: a becomes (1 - s) a + s in every product of a, reward and weights.
        verification: `greedy` a = q(y), `match` a = sum p q, `overlap` a = sum min(p, q); the last
            two need the target's last hidden states.
        temperature: both logits are divided by it in the KL (not multiplied by its square).

    Raises:
        ValueError: an option out of range, or options that do not go together.
    """

    reward_weight: float | int = 0.0
    kl_weight: float | int = 0.0
    ce_weight: float | int = 0.0
    position: str = "uniform"
    gamma: float | int | None = None
    inclusive: bool = False
    floor: float | int = 0.0
    smoothing: float | int = 0.0
    verification: str = "greedy"
    temperature: float | int = 1.0

    def __post_init__(self) -> None:
        weights = "reward_weight", "kl_weight", "ce_weight"
        for key in (*weights, "floor", "smoothing", "temperature"):
            self._require(key, isinstance(getattr(self, key), float | int), "a number")
        for key in weights:
            self._require(key, 0.0 <= getattr(self, key) < inf, "a number of at least 0")
        self._require("position", self.position in POSITION_RULES, ", ".join(POSITION_RULES))
        allowed = ", ".join(VERIFICATIONS)
        self._require("verification", self.verification in VERIFICATIONS, allowed)
        above_0 = isinstance(self.gamma, float | int) and self.gamma > 0
        self._require("gamma", self.gamma is None or above_0, "null or a number above 0")
        self._require("floor", 0.0 <= self.floor <= 1.0, "a number in [0, 1]")
        self._require("smoothing", 0.0 <= self.smoothing < 1.0, "a number in [0, 1)")
        self._require("temperature", 0.0 < self.temperature < inf, "a number above 0")
        if self.position == "uniform":
            self._require("gamma", self.gamma is None, "null with objective.position=uniform")
        if self.position == "decay":
            self._require("gamma", self.gamma is not None, "a number with objective.position=decay")
        if not any(getattr(self, key) for key in weights):
            raise ValueError(f"objective: {', '.join(weights)} are all 0: allowed one above 0")

    def _require(self, key: str, holds: bool, allowed: str) -> None:
        if not holds:
            raise ValueError(f"objective.{key}={getattr(self, key)}: allowed {allowed}")

    @property
    def needs_kl(self) -> bool:
        """Whether a gradient flows through the KL."""
        return self.kl_weight > 0

    @property
    def needs_acceptance(self) -> bool:
        """Whether a gradient flows through log a."""
        return self.reward_weight > 0 or self.ce_weight > 0

    @property
    def needs_distribution(self) -> bool:
        """Whether a needs all of p, so that the target's last hidden states have to be there."""
        return self.verification != "greedy"

    def survival(
        self, log_a_NK: Float[Tensor, "N K"], valid_NK: Bool[Tensor, "N K"]
    ) -> Float[Tensor, "N K"]:
        """S_k of the smoothed a, 0 from the first hole on, by sums of logarithms."""
        open_NK = unbroken(valid_NK)
        if self.smoothing:
            log_a_NK = smoothed(log_a_NK.exp(), self.smoothing).log()
        return torch.where(open_NK, log_a_NK, 0.0).cumsum(-1).exp() * open_NK

    def position_weights(
        self, log_a_NK: Float[Tensor, "N K"], valid_NK: Bool[Tensor, "N K"]
    ) -> Float[Tensor, "N K"]:
        """Weight of every slot in KL and CE, without a gradient; 0 where it does not count."""
        log_a_NK = log_a_NK.detach()
        decay_K = decay_weights(valid_NK.shape[1], self.gamma, log_a_NK.dtype, log_a_NK.device)
        rule = POSITION_RULES[self.position]
        if rule is None:
            return valid_NK * decay_K
        weight_NK = rule(self.survival(log_a_NK, valid_NK), self).clamp(min=self.floor)
        return weight_NK * unbroken(valid_NK) * decay_K

    def block_terms(
        self,
        log_a_NK: Float[Tensor, "N K"],
        kl_NK: Float[Tensor, "N K"],
        valid_NK: Bool[Tensor, "N K"],
    ) -> BlockTerms:
        """The terms of every block; what stands at slots that are not valid is not looked at."""
        weight_NK = self.position_weights(log_a_NK, valid_NK)
        reward_N = self.survival(log_a_NK, valid_NK).sum(-1)
        kl_N = (weight_NK * torch.where(valid_NK, kl_NK, 0.0)).sum(-1)
        ce_N = (weight_NK * torch.where(valid_NK, -log_a_NK, 0.0)).sum(-1)
        return BlockTerms(reward_N, kl_N, ce_N, weight_NK)

    def normaliser(self, valid_NK: Bool[Tensor, "N K"]) -> Float[Tensor, ""]:
        """Sum of the weights if every slot were accepted: what divides KL and CE.

        For `uniform` and `decay` the sum of the weights itself. Otherwise an upper bound of it that
        is known before the draft has spoken, so that a batch can be cut over ranks and accumulation
        steps without changing its gradient; `scales` takes the ratio of the two from elsewhere.
        """
        return self.position_weights(
            torch.zeros(valid_NK.shape, device=valid_NK.device), valid_NK
        ).sum()

    def scales(self, slots: int, share: float | int | Tensor = 1.0) -> dict[str, Any]:
        """`reward_scale`, `kl_scale`, `ce_scale` of `fused_acceptance_loss` in training.

        With them a sum over any blocks, divided by the `normaliser` of the same blocks, is

            -reward_weight mean EAL / K + kl_weight sum w KL / sum w + ce_weight sum w CE / sum w,

        the mean over blocks exact where all have K slots (one that is cut short counts for as many
        as it has).

        Args:
            slots: K.
            share: sum of the weights over `normaliser`, where the weights follow the draft.
        """
        full = self.normaliser(torch.ones(1, slots, dtype=torch.bool)).item()
        return {
            "reward_scale": self.reward_weight * full / slots,
            "kl_scale": self.kl_weight / share,
            "ce_scale": self.ce_weight / share,
        }
