"""Sampled verification keeps the target's distribution; acceptance rates as in theory."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.drafts import NoDraft, OracleDraft, RandomDraft
from decoding.speculate import speculate
from decoding.verification import (
    Drafts,
    ExactMatch,
    Greedy,
    Rejection,
    RequestNoise,
    Warping,
)
from tests.decoding.speculation import network_draft, tiny_target

SYMBOLS, PROMPT = 5, [1, 3, 2]
# A model whose distributions over five tokens are neither flat nor certain.
HOT = 6.0
RULES = {
    "exact": ExactMatch(HOT),
    "exact sampled": ExactMatch(HOT, sampled_drafts=True),
    "rejection": Rejection(HOT),
    "rejection cut": Rejection(HOT, top_p=0.8, top_k=4),
}


def target():
    return tiny_target(vocabulary=SYMBOLS, layers=2)


def answers(rule, draft, requests, count=3, seed=0):
    prompts = [PROMPT] * len(requests)
    found = speculate(
        target(), draft, prompts, rule, max_new_tokens=count, seed=seed, requests=requests
    )
    return [tuple(result.token_ids) for result in found]


@torch.inference_mode()
def joint(warp, count=3):
    """Probability of every sequence of `count` tokens, from the target and the warping alone."""
    sequences = list(itertools.product(range(SYMBOLS), repeat=count))
    ids = torch.tensor([[*PROMPT, *sequence] for sequence in sequences])
    p_NSV = warp(target()(ids).logits[:, len(PROMPT) - 1 : -1])
    chosen = p_NSV.gather(-1, ids[:, len(PROMPT) :, None])[..., 0]
    return dict(zip(sequences, chosen.prod(-1).tolist(), strict=True))


def chi_square(found, expected):
    """Pearson's statistic, cells of fewer than five expected draws together, and its freedom."""
    counts = {key: 0 for key in expected}
    for answer in found:
        counts[answer] += 1
    cells, rare = [], np.zeros(2)
    for key, p in expected.items():
        cell = np.array([counts[key], p * len(found)])
        if cell[1] < 5:
            rare += cell
        else:
            cells.append(cell)
    if rare[1] > 0:
        cells.append(rare)
    observed, wanted = np.array(cells).T
    return float(((observed - wanted) ** 2 / wanted).sum()), len(cells) - 1


def draft_of(kind):
    if kind == "network":
        return network_draft(target(), trained=3, mask_token=SYMBOLS - 1)
    return RandomDraft(2, SYMBOLS, spread=12.0)


@pytest.mark.parametrize("kind", ["network", "random"])
@pytest.mark.parametrize("name", RULES)
def test_three_tokens_have_the_targets_joint_distribution(name, kind):
    """125 sequences, 4000 answers: chi-square within 4.5 standard deviations of its mean."""
    rule = RULES[name]
    found = answers(rule, draft_of(kind), range(4000))
    statistic, freedom = chi_square(found, joint(rule._warp))
    assert freedom > 20 and abs(statistic - freedom) < 4.5 * (2 * freedom) ** 0.5


def test_the_chi_square_sees_a_wrong_distribution():
    """A rule that accepts too much, and noise that is used twice, do not pass."""

    class Generous(Rejection):
        def verify(self, drafts, logits_BQV, noise, place_BQ):
            halved = Drafts(drafts.tokens_BK, drafts.q_BKV / 2)
            return super().verify(halved, logits_BQV, noise, place_BQ)

    rule = Generous(HOT)
    statistic, freedom = chi_square(
        answers(rule, draft_of("random"), range(4000)), joint(rule._warp)
    )
    assert statistic - freedom > 20 * (2 * freedom) ** 0.5


@settings(deadline=None, max_examples=10)
@given(seed=st.integers(0, 99), sampled=st.booleans(), drafted=st.integers(1, 6))
def test_exact_match_draws_what_plain_sampling_draws(seed, sampled, drafted):
    """Token for token: the target's numbers belong to places, whatever was drafted."""
    rule = ExactMatch(HOT, top_p=0.95, sampled_drafts=sampled)
    draft = RandomDraft(drafted, SYMBOLS, seed=seed)
    requests = [seed, seed + 1, 7]
    assert answers(rule, draft, requests, 12, seed) == answers(rule, NoDraft(), requests, 12, seed)


@pytest.mark.parametrize("name", RULES)
def test_without_drafts_every_rule_is_plain_sampling(name):
    plain = ExactMatch(HOT, top_p=0.8, top_k=4) if name == "rejection cut" else ExactMatch(HOT)
    expected = answers(plain, NoDraft(), [5, 6, 7], 10)
    assert answers(RULES[name], NoDraft(), [5, 6, 7], 10) == expected


@pytest.mark.parametrize("name", RULES)
def test_a_request_has_its_own_numbers_in_any_batch(name):
    draft, rule = network_draft(target(), trained=4, mask_token=SYMBOLS - 1), RULES[name]
    together = answers(rule, draft, [5, 6, 7, 8], 10)
    assert [answers(rule, draft, [request], 10)[0] for request in (5, 6, 7, 8)] == together
    assert answers(rule, draft, [5, 6, 7, 8], 10, seed=1) != together
    assert len(set(together)) > 1


ROWS = 20_000


def first_draft_rate(rule, p_V, q_V):
    """Share of rows whose first draft is accepted, with these two distributions at every place."""
    noise = RequestNoise(3, range(ROWS), 4, torch.device("cpu"))
    place = torch.arange(1, 4).expand(ROWS, -1)
    drafts = rule.draft(q_V.log().expand(ROWS, 2, -1), noise, place[:, :2])
    verdict = rule.verify(drafts, p_V.log().expand(ROWS, 3, -1), noise, place)
    return float((verdict.accepted_B >= 1).double().mean()), verdict


def test_acceptance_rates():
    """Greedy draft p(argmax q), sampled draft sum p q, rejection sum min(p, q)."""
    p_V = torch.tensor([0.5, 0.2, 0.2, 0.1], dtype=torch.float64)
    q_V = torch.tensor([0.3, 0.45, 0.15, 0.1], dtype=torch.float64)
    for rule, rate in (
        (ExactMatch(), 0.2),
        (ExactMatch(sampled_drafts=True), float(p_V @ q_V)),
        (Rejection(), float(torch.minimum(p_V, q_V).sum())),
    ):
        found, verdict = first_draft_rate(rule, p_V, q_V)
        assert found == pytest.approx(rate, abs=4 * (rate * (1 - rate) / ROWS) ** 0.5)
        both = float((verdict.accepted_B == 2).double().mean())
        assert both == pytest.approx(rate**2, abs=0.015), "places are independent"
    assert first_draft_rate(Greedy(), p_V, q_V)[0] == 0.0
    assert first_draft_rate(Rejection(), p_V, p_V)[0] == 1.0, "the target itself is never refused"


def test_a_draft_that_cannot_be_right():
    """No overlap: everything is refused, and the token added is one of p."""
    p_V = torch.tensor([0.0, 0.25, 0.75], dtype=torch.float64)
    q_V = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    rate, verdict = first_draft_rate(Rejection(), p_V, q_V)
    share = verdict.tokens_BQ[:, 0].bincount(minlength=3).double() / ROWS
    assert rate == 0.0 and share[0] == 0.0
    assert float(share[2]) == pytest.approx(0.75, abs=0.015)


def test_hand_made_verdicts():
    """Drafts 1 2 3: the target says 1 2 0 9, or 0 2 3 9, or all of them and 9."""
    drafts = Drafts(torch.tensor([[1, 2, 3]] * 3), None)
    own = torch.tensor([[1, 2, 0, 9], [0, 2, 3, 9], [1, 2, 3, 9]])
    noise = RequestNoise(0, [0, 1, 2], 5, torch.device("cpu"))
    logits = torch.nn.functional.one_hot(own, 10).double()
    verdict = Greedy().verify(drafts, logits, noise, torch.arange(4).expand(3, -1))
    assert verdict.accepted_B.tolist() == [2, 0, 3]
    committed = [row[: n + 1] for n, row in zip([2, 0, 3], verdict.tokens_BQ.tolist(), strict=True)]
    assert committed == [[1, 2, 0], [0], [1, 2, 3, 9]]


def test_warping():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0]] * 2, dtype=torch.float64).log()

    def warped(**options):
        return Warping(**options)(logits)[1].tolist()

    roots = [x**0.5 for x in (4, 3, 2, 1)]
    assert warped() == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert warped(temperature=2.0) == pytest.approx([root / sum(roots) for root in roots])
    assert warped(top_k=2) == pytest.approx([4 / 7, 3 / 7, 0.0, 0.0])
    assert warped(top_p=0.65) == pytest.approx([4 / 7, 3 / 7, 0.0, 0.0])
    assert warped(top_p=0.7, top_k=3) == pytest.approx([4 / 7, 3 / 7, 0.0, 0.0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, r"verification\.temperature=0\.0: allowed \(0, inf\); for 0 use"),
        ({"top_p": 0.0}, r"verification\.top_p=0\.0: allowed \(0, 1\]"),
        ({"top_k": -1}, r"verification\.top_k=-1: allowed an integer >= 0"),
    ],
)
@pytest.mark.parametrize("rule", [ExactMatch, Rejection])
def test_options_are_checked(rule, options, message):
    with pytest.raises(ValueError, match=message):
        rule(**options)


def test_an_oracle_is_never_refused_by_its_own_greedy_target():
    rule = Greedy()
    plain = answers(rule, NoDraft(), [0], 9)[0]
    draft = OracleDraft({tuple(PROMPT): [*plain, 0, 0, 0]}, 3, SYMBOLS)
    assert answers(rule, draft, [0], 9)[0] == plain
