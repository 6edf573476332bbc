"""How l and score are combined, and which pairs of training and decoding are refused."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.pairing import (
    RATIO,
    TARGET,
    Learns,
    ProposalLaw,
    additive_weight,
    check_pairing,
    decode_score,
)

SAMPLES = ProposalLaw("softmax_sampling", 0.7)
BEAM, EXACT = ProposalLaw("beam_bayes"), ProposalLaw("beam_exact")


def values(seed):
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(2, 50, 6, generator=draw, dtype=torch.float64) * 3


def test_forms_by_hand():
    log_q, score = torch.tensor([-2.0, -4.0]), torch.tensor([1.0, 6.0])
    assert decode_score(log_q, score, 0.5).tolist() == [-1.5, -1.0]
    assert decode_score(log_q, score, 0.25, "convex").tolist() == [-1.25, -1.5]
    assert decode_score(log_q, score, form="scorer_only").tolist() == [1.0, 6.0]


def test_at_the_ends_one_of_the_two_is_all():
    """Bit by bit, and whatever the other one holds."""
    log_q, score = torch.tensor([-2.0, -0.1]), torch.tensor([math.nan, math.inf])
    for form in ("additive", "convex"):
        assert decode_score(log_q, score, 0, form) is log_q
    for alpha, form in ((math.inf, "additive"), (1, "convex"), (0.3, "scorer_only")):
        assert decode_score(score, log_q, alpha, form) is log_q


@given(st.integers(0, 10**6), st.floats(0.0, 20.0))
def test_additive_is_convex_at_another_alpha(seed, alpha):
    """l + a s = (1 + a) ((1 - c) l + c s) with c = a / (1 + a), so a = c / (1 - c)."""
    log_q, score = values(seed)
    convex = decode_score(log_q, score, alpha / (1 + alpha), "convex")
    torch.testing.assert_close(decode_score(log_q, score, alpha), (1 + alpha) * convex)
    assert additive_weight(alpha / (1 + alpha), "convex") == pytest.approx(alpha)


def test_published_alphas_in_the_other_form():
    assert additive_weight(0.5, "convex") == 1.0
    assert additive_weight(1 / 11, "convex") == pytest.approx(0.1)
    assert additive_weight(1, "convex") == additive_weight(0, "scorer_only") == math.inf


@pytest.mark.parametrize(
    ("alpha", "form", "message"),
    [
        (-0.1, "additive", "bon.alpha=-0.1: allowed 0 <= alpha <= inf with bon.form=additive"),
        (1.5, "convex", "bon.alpha=1.5: allowed 0 <= alpha <= 1 with bon.form=convex"),
        (math.nan, "additive", "bon.alpha=nan: allowed"),
        (0.5, "product", "bon.form=product: allowed additive, convex, scorer_only"),
    ],
)
def test_options_out_of_range(alpha, form, message):
    with pytest.raises(ValueError, match=message):
        decode_score(torch.zeros(2), torch.zeros(2), alpha, form)
    with pytest.raises(ValueError, match=message):
        check_pairing("ranking", BEAM, BEAM, alpha, form)


@pytest.mark.parametrize(
    ("loss", "trained", "decoded", "alpha", "form"),
    [
        ("ranking", SAMPLES, SAMPLES, 0.1, "additive"),
        ("ranking", SAMPLES, SAMPLES, 0.5, "convex"),
        ("binary", SAMPLES, SAMPLES, 1, "additive"),
        ("ranking_corrected", SAMPLES, SAMPLES, 0, "scorer_only"),
        ("ranking_corrected", SAMPLES, BEAM, math.inf, "additive"),
        ("ranking_corrected", SAMPLES, ProposalLaw("softmax_sampling", 1.0), 1, "convex"),
        ("ranking", BEAM, BEAM, 0.1, "additive"),
        ("ranking", EXACT, EXACT, 1, "scorer_only"),
        ("ranking", BEAM, BEAM._replace(temperature=0.7), 0.5, "additive"),
        # alpha = 0 is greedy decoding, in which no score has a say.
        ("ranking", SAMPLES, BEAM, 0, "additive"),
        ("ranking_corrected", SAMPLES, SAMPLES, 0, "convex"),
    ],
)
def test_pairs_that_fit(loss, trained, decoded, alpha, form):
    check_pairing(loss, trained, decoded, alpha, form)


@pytest.mark.parametrize(
    ("loss", "trained", "decoded", "alpha", "form", "message"),
    [
        ("ranking", SAMPLES, SAMPLES, 1, "scorer_only", "bon.form=scorer_only .* log p0 - log q"),
        ("binary", SAMPLES, SAMPLES, 1, "convex", "bon.form=scorer_only .* nce/loss=binary"),
        ("ranking", SAMPLES, SAMPLES._replace(temperature=1), 1, "additive",
         "bon.proposal.temperature=1: .* T=0.7 .*allowed: 0.7"),
        ("ranking", SAMPLES, BEAM, 1, "additive", "bon/proposal=beam_bayes: .* softmax_sampling"),
        ("ranking", BEAM, SAMPLES, 1, "additive", "bon/proposal=softmax_sampling: .*beam_bayes"),
        ("ranking", BEAM, EXACT, 1, "scorer_only", "bon/proposal=beam_exact: .* beam_bayes"),
        ("ranking_corrected", SAMPLES, SAMPLES, 0.1, "additive",
         "bon.form=additive with bon.alpha=0.1: .*allowed: bon.form=scorer_only"),
        ("ranking_corrected", BEAM, BEAM, 1, "scorer_only", "bon/proposal=beam_bayes: a determin"),
        ("binary", EXACT, EXACT, 0, "additive", "nce/loss=binary with bon/proposal=beam_exact"),
        ("triplet", BEAM, BEAM, 1, "additive", "nce/loss=triplet: allowed ranking, "),
        ("ranking", ProposalLaw("mcts"), BEAM, 1, "additive", "trained_with=mcts: allowed soft"),
        ("ranking", BEAM, ProposalLaw("mcts"), 1, "additive", "bon/proposal=mcts: allowed softm"),
        ("ranking", SAMPLES._replace(temperature=0), SAMPLES, 1, "additive",
         "nce.trained_with=softmax_sampling at temperature=0: allowed a number above 0"),
    ],
)  # fmt: skip
def test_contradictions_are_refused_in_a_line(loss, trained, decoded, alpha, form, message):
    with pytest.raises(ValueError, match=message) as error:
        check_pairing(loss, trained, decoded, alpha, form)
    assert "\n" not in str(error.value)


def test_losses_and_proposals_of_ones_own():
    """What they are is said instead of looked up; the rules are the same."""
    tree = ProposalLaw("tree_sampling", 1.0, deterministic=False)
    check_pairing("mine", tree, tree, 1, "additive", Learns(RATIO, None))
    with pytest.raises(ValueError, match=r"bon.form=scorer_only"):
        check_pairing("mine", tree, tree, 1, "scorer_only", Learns(RATIO, None))
    check_pairing("mine", tree, BEAM, 1, "scorer_only", Learns(TARGET, None))
    with pytest.raises(ValueError, match="a deterministic beam has no density"):
        check_pairing("mine", tree._replace(deterministic=True), tree, learns=Learns(RATIO, None))
