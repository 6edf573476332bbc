"""The clipped policy gradient over sampled tokens: ratio, KL and normaliser are chosen apart.

With l_t = log pi(o_t) under the policy that is trained and l^old_t under the one that sampled

    rho_t = exp(l_t - l^old_t)                      ratio=token      (PPO, arXiv 1707.06347)
    rho   = exp(mean_t (l_t - l^old_t))             ratio=sequence   (GSPO, arXiv 2507.18071)
    loss_t = -min(rho A, clip(rho, 1 - low, 1 + high) A) c_t + beta k3
    k3     = exp(d) - d - 1,   d = log pi_ref - log pi              (Schulman 2020)

d is that of the token (kl_level=token) or its mean over the sequence (kl_level=sequence); what
belongs to a sequence stands at each of its tokens. c_t are importance weights, 1 without any.

Losses of tokens are added up and divided by a weight, which both terms share:

    sequence_mean  mean over sequences of the mean over their tokens: GRPO (arXiv 2402.03300)
    constant       sum over tokens / (sequences * longest): Dr.GRPO (arXiv 2503.20783)
    token_mean     sum over tokens / tokens: DAPO (arXiv 2503.14476)

Sum and weight come back apart. Both are additive over batches, so a global batch in several parts,
on several ranks, divides the sum of its losses by the sum of its weights.

At rho = 1 the clip holds nothing and -A rho has the gradient of -A l. Sampled from the policy
itself k3 of a token has the mean KL(pi || ref), but the gradient of KL(ref || pi).

The log-probabilities must be those of the distribution that was sampled from, truncated if that was
(top_p, allowed tokens). Over the whole vocabulary the ratio to the sampler is the kept mass, below
1, and the gradient is another one.

Legend: P scored tokens, N sequences. Log-probabilities and KL in nats.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.contrastive import exact


class _Sequences:
    """Which sequence each token belongs to; sums and means over the tokens of a sequence."""

    def __init__(self, sequence_P: Tensor, number: int, dtype: torch.dtype) -> None:
        self.sequence_P, self.number = sequence_P, number
        self.tokens_N = self.sum(torch.ones_like(sequence_P, dtype=dtype))

    def sum(self, x_P: Tensor) -> Tensor:
        """[N], 0 for a sequence without a token."""
        return x_P.new_zeros(self.number).index_add(0, self.sequence_P, x_P)

    def mean(self, x_P: Tensor) -> Tensor:
        """[N], 0 for a sequence without a token."""
        return self.sum(x_P) / self.tokens_N.clamp(min=1.0)

    def own(self, x_P: Tensor) -> Tensor:
        """Every token has its own number."""
        return x_P

    def shared(self, x_P: Tensor) -> Tensor:
        """Every token has the mean of its sequence."""
        return self.mean(x_P)[self.sequence_P]

    def total(self, x_P: Tensor) -> Tensor:
        """Every token has the sum of its sequence."""
        return self.sum(x_P)[self.sequence_P]

    def share_of_tokens(self, flag_P: Tensor) -> Tensor:
        """1 for a flagged token, 0 for another."""
        return flag_P.to(self.tokens_N.dtype)

    def share_of_sequences(self, flag_P: Tensor) -> Tensor:
        """1 for a sequence that has a flagged token, 0 for another."""
        return self.sum(self.share_of_tokens(flag_P)).clamp(max=1.0)


# What a level makes of the numbers of tokens, and how it counts them.
_MEANS = {"token": _Sequences.own, "sequence": _Sequences.shared}
_SUMS = {"token": _Sequences.own, "sequence": _Sequences.total}
_UNITS = {"token": _Sequences.share_of_tokens, "sequence": _Sequences.share_of_sequences}
LEVELS = tuple(_MEANS)

# Of a sequence with n tokens: how much each token's loss counts, and the sequence's weight.
AGGREGATIONS: dict[str, Callable[[Tensor, int], tuple[Tensor, Tensor]]] = {
    "sequence_mean": lambda n_N, _: (1.0 / n_N.clamp(min=1.0), torch.ones_like(n_N)),
    "constant": lambda n_N, longest: (torch.ones_like(n_N), torch.full_like(n_N, float(longest))),
    "token_mean": lambda n_N, _: (torch.ones_like(n_N), n_N),
}


def _require(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value}: allowed {', '.join(allowed)}")


class PolicyTerms(NamedTuple):
    """A loss and what it was made of; all but `loss` is detached.

    loss: the sum, with its gradient; the loss of a global batch is sum / weight.
    weight: the normaliser; 0 if no sequence counts, which the caller divides by.
    loss_N: of each sequence, as it enters the sum.
    kl_N: mean k3 per token (nats) of every sequence, whatever counts; 0 without a reference.
    clipped: how many ratios the clip holds, so that they have no gradient.
    ratios: how many there are: tokens, or sequences with a token, of sequences that count.
    ratio_N: exp of the mean log ratio of every sequence; 1 for one without a token.
    """

    loss: Float[Tensor, ""]
    weight: Float[Tensor, ""]
    loss_N: Float[Tensor, " N"]
    kl_N: Float[Tensor, " N"]
    clipped: Float[Tensor, ""]
    ratios: Float[Tensor, ""]
    ratio_N: Float[Tensor, " N"]


def k3(log_ratio_P: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
    """exp(d) - d - 1 with d = log pi_ref - log pi: never negative, its mean under pi is the KL."""
    return log_ratio_P.exp() - log_ratio_P - 1.0


def policy_loss(
    logp_P: Float[Tensor, " P"],
    old_P: Float[Tensor, " P"],
    reference_P: Float[Tensor, " P"] | None,
    sequence_P: Int[Tensor, " P"],
    advantage_N: Float[Tensor, " N"],
    counts_N: Bool[Tensor, " N"],
    *,
    ratio: str,
    aggregation: str,
    longest: int,
    clip_low: float | int,
    clip_high: float | int,
    kl_coefficient: float | int,
    kl_level: str,
    kl_counts_N: Bool[Tensor, " N"] | None = None,
    correction_P: Float[Tensor, " P"] | None = None,
) -> PolicyTerms:
    """The sum of -min(rho A, clip(rho) A) c + beta k3, and what it is divided by.

    A sequence that counts and has no token adds nothing to the sum and to the weight what any other
    does (1, longest, or its 0 tokens): it was sampled, its gradient is zero.

    Args:
        logp_P: l_t, the only one with a gradient.
        old_P: l^old_t.
        reference_P: log pi_ref; None: no KL.
        sequence_P: whose token it is, 0 .. N - 1.
        advantage_N: A.
        counts_N: sequences whose policy term counts. The weight is theirs. What stands at the
            tokens of the others may be infinite; it does not reach the loss.
        ratio: "token" or "sequence".
        aggregation: a name in `AGGREGATIONS`.
        longest: tokens that a sequence can have, for `constant`.
        clip_low: a ratio below 1 - clip_low is held where A < 0.
        clip_high: a ratio above 1 + clip_high is held where A > 0.
        kl_coefficient: beta.
        kl_level: "token" or "sequence".
        kl_counts_N: sequences whose KL counts, `counts_N` by default; fewer if groups in which
            nothing can be learned should feel no KL either. The weight does not change.
        correction_P: c of each token; see `importance_correction`.

    Raises:
        ValueError: a name that is not listed.
    """
    _require("ratio", ratio, LEVELS)
    _require("aggregation", aggregation, tuple(AGGREGATIONS))
    _require("kl_level", kl_level, LEVELS)
    logp_P, old_P = exact(logp_P), exact(old_P.detach())
    tokens = _Sequences(sequence_P, len(counts_N), logp_P.dtype)

    # 1. Ratios. Where nothing counts they are 1: an infinity would put nan into the gradient.
    counts_P = counts_N[sequence_P]
    log_ratio_P = logp_P - old_P
    ratio_P = _MEANS[ratio](tokens, log_ratio_P.masked_fill(~counts_P, 0.0)).exp()

    # 2. Surrogate of every token; the clip only ever makes it smaller.
    advantage_P = advantage_N.detach().to(logp_P.dtype)[sequence_P].masked_fill(~counts_P, 0.0)
    free_P = ratio_P * advantage_P
    held_P = ratio_P.clamp(1.0 - clip_low, 1.0 + clip_high) * advantage_P
    surrogate_P = torch.minimum(free_P, held_P)
    if correction_P is not None:
        surrogate_P = surrogate_P * correction_P.detach().masked_fill(~counts_P, 0.0)
    loss_P = -surrogate_P

    # 3. KL to the reference.
    kl_N = torch.zeros_like(tokens.tokens_N)
    if reference_P is not None:
        distance_P = exact(reference_P.detach()) - logp_P
        kl_N = tokens.mean(k3(distance_P.detach()))
        if kl_coefficient:
            kl_counts_P = (counts_N if kl_counts_N is None else kl_counts_N)[sequence_P]
            kl_P = k3(_MEANS[kl_level](tokens, distance_P.masked_fill(~kl_counts_P, 0.0)))
            loss_P = loss_P + kl_coefficient * kl_P

    # 4. Sum and weight.
    share_N, weight_N = AGGREGATIONS[aggregation](tokens.tokens_N, longest)
    loss_N = tokens.sum(loss_P) * share_N
    return PolicyTerms(
        loss=loss_N.sum(),
        weight=(weight_N * counts_N).sum(),
        loss_N=loss_N.detach(),
        kl_N=kl_N,
        clipped=_UNITS[ratio](tokens, (held_P < free_P).detach()).sum(),
        ratios=_UNITS[ratio](tokens, counts_P).sum(),
        ratio_N=tokens.mean(log_ratio_P.detach()).exp(),
    )


class Correction(NamedTuple):
    """Importance weights of tokens, and the share of them that the cap has cut.

    cut: of tokens, or of sequences with a token; 0 if there are none.
    """

    weight_P: Float[Tensor, " P"]
    cut: Float[Tensor, ""]


def importance_correction(
    trainer_logp_P: Float[Tensor, " P"],
    sampler_logp_P: Float[Tensor, " P"],
    sequence_P: Int[Tensor, " P"],
    num_sequences: int,
    level: str,
    cap: float | int,
) -> Correction:
    """min(exp(trainer - sampler), cap), for an engine that samples from not quite the same policy.

    level=token takes each token by itself, level=sequence the sum over the sequence, which is the
    whole importance weight. Truncation trades the variance of large weights for a bias (Ionides
    2008). No gradient.

    Args:
        trainer_logp_P: what the trainer gives the tokens under the weights that sampled them.
        sampler_logp_P: what the engine gave them when it drew them.
        sequence_P: whose token it is.
        num_sequences: N.
        level: "token" or "sequence".
        cap: largest weight.

    Raises:
        ValueError: a level that is not listed.
    """
    _require("level", level, LEVELS)
    log_weight_P = exact(trainer_logp_P.detach()) - exact(sampler_logp_P.detach())
    tokens = _Sequences(sequence_P, num_sequences, log_weight_P.dtype)
    weight_P = _SUMS[level](tokens, log_weight_P).exp()
    cut = _UNITS[level](tokens, weight_P > cap).sum()
    there = _UNITS[level](tokens, torch.ones_like(weight_P, dtype=torch.bool)).sum()
    return Correction(weight_P.clamp(max=cap), cut / there.clamp(min=1.0))
