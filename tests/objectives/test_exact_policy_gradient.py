"""A policy so small that every group it can sample is enumerated: expectations without noise.

Three tokens, one of which ends a sequence of at most three: 15 sequences from 7 contexts, with free
logits for each context. The gradient of the loss, averaged over all groups by probability, is
compared with the gradient of the expected reward, which is a sum of 15 terms.

Legend: C contexts, V tokens, Z sequences, T places, N sequences of all groups, P their tokens.
"""

import itertools
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from objectives.advantages import group_advantages
from objectives.policy_gradient import importance_correction, policy_loss

END, VOCABULARY, LONGEST = 2, 3, 3
CONTEXTS = [(), (0,), (1,), (0, 0), (0, 1), (1, 0), (1, 1)]
SEQUENCES = [
    tokens
    for length in range(1, LONGEST + 1)
    for tokens in itertools.product(range(VOCABULARY), repeat=length)
    if END not in tokens[:-1] and (length == LONGEST or tokens[-1] == END)
]
# What the judge says of each, in the order of SEQUENCES.
REWARD_Z = torch.tensor([1, 0, 1, 0, 1, 1, 0, 0, 1, 1, 0, 1, 0, 0, 1], dtype=torch.float64)


class Places(NamedTuple):
    """The tokens of all sequences, one after the other."""

    sequence_P: Tensor
    context_P: Tensor
    token_P: Tensor


PLACES = Places(
    *torch.tensor(
        [
            (z, CONTEXTS.index(tokens[:t]), tokens[t])
            for z, tokens in enumerate(SEQUENCES)
            for t in range(len(tokens))
        ]
    ).unbind(-1)
)


def logits(seed=0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    logits_CV = torch.randn(len(CONTEXTS), VOCABULARY, generator=draw, dtype=torch.float64)
    return logits_CV.requires_grad_()


def nucleus(logits_CV: Tensor, top_p: float) -> Tensor:
    """[C, V]: the likeliest tokens until their probabilities add up to `top_p`."""
    p_CV, order_CV = logits_CV.detach().softmax(-1).sort(-1, descending=True)
    before_CV = p_CV.cumsum(-1) - p_CV
    return torch.zeros_like(p_CV).scatter(-1, order_CV, (before_CV < top_p).double()).bool()


def token_logp(logits_CV: Tensor, kept_CV: Tensor | None = None) -> Tensor:
    """[P], -inf for what is not kept."""
    if kept_CV is not None:
        logits_CV = logits_CV.masked_fill(~kept_CV, -torch.inf)
    return logits_CV.log_softmax(-1)[PLACES.context_P, PLACES.token_P]


def sequence_p(logp_P: Tensor) -> Tensor:
    """[Z], which add up to 1."""
    logp_Z = torch.zeros(len(SEQUENCES), dtype=logp_P.dtype)
    return logp_Z.index_add(0, PLACES.sequence_P, logp_P).exp()


def gradient(value: Tensor, logits_CV: Tensor) -> Tensor:
    return torch.autograd.grad(value, logits_CV, retain_graph=True)[0]


def exact_gradient(logits_CV: Tensor, kept_CV: Tensor | None = None) -> Tensor:
    """Of the expected reward; sequences that cannot be sampled are left out before the exp."""
    logp_P = token_logp(logits_CV, kept_CV)
    possible_Z = sequence_p(logp_P.detach()) > 0
    p_Z = sequence_p(torch.where(possible_Z[PLACES.sequence_P], logp_P, 0.0))
    return gradient((p_Z * REWARD_Z * possible_Z).sum(), logits_CV)


def expected_gradient(
    logits_CV: Tensor, kind: str, group: int = 2, kept_CV: Tensor | None = None,
    scored_CV: Tensor | None = None, **options,
) -> Tensor:  # fmt: skip
    """Mean gradient of the loss over all groups that can be sampled, each with its probability.

    Sampled from the policy on `kept_CV`, scored with the policy on `scored_CV`; None: all tokens.
    The probability of a group multiplies its advantages, in which the loss is linear.
    """
    p_Z = sequence_p(token_logp(logits_CV, kept_CV)).detach()
    possible = p_Z.nonzero()[:, 0].tolist()
    slots_GK = torch.tensor(list(itertools.product(possible, repeat=group)))
    reward_GK = REWARD_Z[slots_GK]
    advantage_GK = group_advantages(
        reward_GK, torch.ones_like(reward_GK, dtype=torch.bool), kind, eps=1e-12
    )
    advantage_GK = advantage_GK * p_Z[slots_GK].prod(-1, keepdim=True)

    slot_N = slots_GK.flatten()
    place_P = torch.cat([(PLACES.sequence_P == z).nonzero()[:, 0] for z in slot_N.tolist()])
    length_Z = torch.bincount(PLACES.sequence_P)
    sequence_P = torch.repeat_interleave(torch.arange(len(slot_N)), length_Z[slot_N])
    logp_P = token_logp(logits_CV, scored_CV)[place_P]
    terms = policy_loss(
        logp_P, logp_P, None, sequence_P, advantage_GK.flatten(),
        torch.ones(len(slot_N), dtype=torch.bool),
        **{
            "ratio": "token", "aggregation": "constant", "longest": LONGEST, "clip_low": 0.2,
            "clip_high": 0.2, "kl_coefficient": 0.0, "kl_level": "token", **options,
        },
    )  # fmt: skip
    assert terms.clipped == 0.0
    # The weight is that of all groups; each group is a batch of its own.
    return gradient(terms.loss / (terms.weight / len(slots_GK)), logits_CV)


def assert_same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def relative_distance(found: Tensor, expected: Tensor) -> float:
    """How far `found` is from every multiple of `expected`: the sine of the angle between them."""
    cosine = torch.cosine_similarity(found.flatten(), expected.flatten(), dim=0)
    return (1.0 - cosine.square()).clamp(min=0.0).sqrt().item()


def test_the_world_is_complete():
    assert len(SEQUENCES) == len(REWARD_Z) == 15
    assert sequence_p(token_logp(logits())).sum().item() == pytest.approx(1.0)
    kept_CV = nucleus(logits(), 0.8)
    assert (~kept_CV).sum() > 0 and kept_CV.any(-1).all()
    assert sequence_p(token_logp(logits(), kept_CV)).sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("group", [2, 3])
def test_rloo_is_the_policy_gradient(group):
    """Times -1 / longest, the constant by which Dr.GRPO divides."""
    logits_CV = logits()
    found = expected_gradient(logits_CV, "rloo", group)
    assert_same(found, -exact_gradient(logits_CV) / LONGEST)


@pytest.mark.parametrize("group", [2, 3])
def test_dr_grpo_is_smaller_by_the_share_of_the_others(group):
    logits_CV = logits(1)
    found = expected_gradient(logits_CV, "dr_grpo", group)
    assert_same(found, -exact_gradient(logits_CV) / LONGEST * (group - 1) / group)


def test_grpo_of_two_binary_rewards_is_dr_grpo():
    """std is 1/2 wherever it is not 0; of three it is not, and the direction changes."""
    logits_CV = logits(2)
    assert_same(expected_gradient(logits_CV, "grpo"), 2.0 * expected_gradient(logits_CV, "dr_grpo"))


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_mean_over_tokens_is_biased_by_length(ratio):
    """The policy chooses lengths as well, so no constant makes up for them."""
    logits_CV = logits()
    found = expected_gradient(logits_CV, "rloo", aggregation="sequence_mean", ratio=ratio)
    assert relative_distance(found, exact_gradient(logits_CV)) > 0.1


def test_sequence_and_token_ratios_agree_on_policy():
    """exp of the mean has the gradient of the mean: that of sequence_mean over token ratios."""
    logits_CV = logits(3)
    found = [
        expected_gradient(logits_CV, "grpo", aggregation="sequence_mean", ratio=ratio)
        for ratio in ("token", "sequence")
    ]
    assert_same(*found)


@pytest.mark.parametrize("top_p", [0.6, 0.8])
def test_truncated_sampling_needs_the_truncated_likelihood(top_p):
    """Log-probabilities on the kept set, held fixed, give the gradient of the truncated policy.

    Those over all tokens do not: where the mean advantage of a context is not 0, they push its
    whole kept set up or down. Before the first token it is 0, and nothing is wrong.
    """
    logits_CV = logits(5)
    kept_CV = nucleus(logits_CV, top_p)
    expected = -exact_gradient(logits_CV, kept_CV) / LONGEST
    matched = expected_gradient(logits_CV, "rloo", kept_CV=kept_CV, scored_CV=kept_CV)
    assert_same(matched, expected)
    assert (matched[~kept_CV] == 0.0).all(), "what cannot be sampled is not moved"
    full = expected_gradient(logits_CV, "rloo", kept_CV=kept_CV)
    assert_same(full[0], expected[0])
    assert (full - expected).norm() > 0.1 * expected.norm()
    assert relative_distance(full, expected) > 0.1
    assert relative_distance(full, exact_gradient(logits_CV)) > 0.1, "nor is it that of the policy"


def test_the_ratio_to_a_truncated_sampler_is_the_kept_mass():
    """A mean ratio below 1 on policy says that the trainer scores what was not sampled from."""
    logits_CV = logits()
    kept_CV = nucleus(logits_CV, 0.8)
    sampler_P = token_logp(logits_CV, kept_CV).detach()
    p_Z = sequence_p(sampler_P)
    inside_P = (p_Z > 0)[PLACES.sequence_P]
    sequence_P, context_P = PLACES.sequence_P[inside_P], PLACES.context_P[inside_P]

    def weights(scored_CV, level):
        trainer_P = token_logp(logits_CV, scored_CV)[inside_P]
        return importance_correction(
            trainer_P, sampler_P[inside_P], sequence_P, len(SEQUENCES), level, 10.0
        )

    mass_C = (logits_CV.softmax(-1) * kept_CV).sum(-1).detach()
    full = weights(None, "token")
    torch.testing.assert_close(full.weight_P, mass_C[context_P])
    visits_P = p_Z[sequence_P]
    mean = (full.weight_P * visits_P).sum() / visits_P.sum()
    assert 0.8 < mean < 0.999 and full.cut == 0.0
    assert_same(weights(kept_CV, "token").weight_P, torch.ones_like(visits_P))

    # Of whole sequences the mean weight is the probability that the sampler can write them at all.
    first_P = torch.cat([torch.tensor([True]), sequence_P.diff() > 0])
    whole_P = weights(None, "sequence").weight_P[first_P]
    possible_Z = p_Z > 0
    reachable = sequence_p(token_logp(logits_CV))[possible_Z].sum()
    assert (whole_P * p_Z[possible_Z]).sum().item() == pytest.approx(reachable.item())
    assert reachable < 0.9


@pytest.mark.parametrize(("advantage", "share"), [(1.0, 0.0), (-1.0, 1.0)])
def test_a_truncated_sampler_as_old_policy_clips_the_bad_alone(advantage, share):
    """Where the kept mass is below 1 - clip_low, only samples with A > 0 are learned from."""
    logits_CV = logits()
    kept_CV = nucleus(logits_CV, 0.6)
    sampler_P = token_logp(logits_CV, kept_CV)
    mass_C = (logits_CV.softmax(-1) * kept_CV).sum(-1)
    inside_P = (sampler_P > -torch.inf) & (mass_C < 0.8)[PLACES.context_P]
    terms = policy_loss(
        token_logp(logits_CV)[inside_P], sampler_P[inside_P], None, PLACES.sequence_P[inside_P],
        torch.full((15,), advantage).double(), torch.ones(15, dtype=torch.bool),
        ratio="token", aggregation="constant", longest=LONGEST, clip_low=0.2, clip_high=0.2,
        kl_coefficient=0.0, kl_level="token",
    )  # fmt: skip
    assert terms.ratios == inside_P.sum() > 0
    assert terms.clipped == share * terms.ratios
    moved = gradient(terms.loss, logits_CV).abs().max()
    assert (moved > 0) == (share == 0.0)


def test_k3_has_the_mean_of_one_kl_and_the_gradient_of_the_other():
    """Sampled from pi: KL(pi || ref) of the contexts that are met, and grad KL(ref || pi)."""
    logits_CV, reference_CV = logits(4), logits(5).detach()
    logp_P = token_logp(logits_CV)
    p_Z = sequence_p(logp_P).detach()
    number = len(SEQUENCES)
    terms = [
        policy_loss(
            logp_P[mine_P], logp_P[mine_P], token_logp(reference_CV)[mine_P],
            torch.zeros(int(mine_P.sum()), dtype=torch.long), torch.zeros(1).double(),
            torch.ones(1, dtype=torch.bool), ratio="token", aggregation="constant",
            longest=1, clip_low=0.2, clip_high=0.2, kl_coefficient=1.0, kl_level="token",
        )
        for mine_P in (PLACES.sequence_P == z for z in range(number))
    ]  # fmt: skip
    expected_loss = sum(p * term.loss for p, term in zip(p_Z, terms, strict=True))

    visits_C = torch.zeros(len(CONTEXTS)).double()
    visits_C = visits_C.index_add(0, PLACES.context_P, p_Z[PLACES.sequence_P])
    # Every sequence passes through a context at most once.
    log_pi_CV, log_ref_CV = logits_CV.log_softmax(-1), reference_CV.log_softmax(-1)
    reverse_C = (log_pi_CV.exp() * (log_pi_CV - log_ref_CV)).sum(-1)
    forward_C = (log_ref_CV.exp() * (log_ref_CV - log_pi_CV)).sum(-1)
    assert expected_loss.item() == pytest.approx((visits_C * reverse_C).sum().item())
    found = gradient(expected_loss, logits_CV)
    assert_same(found, gradient((visits_C * forward_C).sum(), logits_CV))
    assert relative_distance(found, gradient((visits_C * reverse_C).sum(), logits_CV)) > 0.05
