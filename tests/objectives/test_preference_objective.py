"""Tournaments, pairs, DPO and RF-NLL: hand numbers, slow references, ties that favour nobody."""

import itertools
import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.preference import (
    PAIRINGS,
    best_candidate,
    choose_pairs,
    dpo_loss,
    filtered_likelihood,
    tournament_scores,
)

NAN = math.nan
KEY = (1, 2, 3)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_dpo_by_hand():
    """First pair: the policy is the reference.

    Second pair: the winner has gained 3 nats, the loser lost 1; beta = 1/2 gives the margin 2.
    """
    chosen = tensor(-7.0, -5.0).requires_grad_()
    rejected = tensor(-9.0, -6.0).requires_grad_()
    found = dpo_loss(chosen, rejected, tensor(-7.0, -8.0), tensor(-9.0, -5.0), 0.5)
    assert found.margin_N.tolist() == pytest.approx([0.0, 2.0])
    expected = [math.log(2), math.log(1 + math.exp(-2))]
    assert found.loss_N.tolist() == pytest.approx(expected)
    found.loss_N.sum().backward()
    slope = [-0.5 * 0.5, -0.5 / (1 + math.exp(2))]
    assert chosen.grad.tolist() == pytest.approx(slope)
    assert rejected.grad.tolist() == pytest.approx([-s for s in slope])
    assert not found.margin_N.requires_grad


def test_dpo_is_the_bradley_terry_likelihood_and_stays_finite():
    """exp(-loss) of a pair and of its mirror image add up to 1; huge margins do not overflow."""
    draw = torch.Generator().manual_seed(0)
    a, b, c, d = torch.randn(4, 8, generator=draw, dtype=torch.float64) * 5
    forth, back = dpo_loss(a, b, c, d, 0.3), dpo_loss(b, a, d, c, 0.3)
    total = (-forth.loss_N).exp() + (-back.loss_N).exp()
    torch.testing.assert_close(total, torch.ones_like(total))
    lost = dpo_loss(tensor(-1e6), tensor(0.0), tensor(0.0), tensor(0.0), 1.0)
    assert lost.loss_N.item() == pytest.approx(1e6)


def test_dpo_does_not_train_the_reference():
    leaves = [tensor(-1.0).requires_grad_() for _ in range(4)]
    dpo_loss(*leaves, 0.1).loss_N.sum().backward()
    assert [leaf.grad is not None for leaf in leaves] == [True, True, False, False]


def test_filtered_likelihood_by_hand():
    """Tokens with probability 1/2, 1/4 and 1: 3 ln 2 nats of three tokens."""
    logp = tensor(0.5, 0.25, 1.0).log().requires_grad_()
    found = filtered_likelihood(logp)
    assert found.loss.item() == pytest.approx(3 * math.log(2)) and found.weight == 3
    found.loss.backward()
    assert logp.grad.tolist() == [-1.0] * 3
    assert filtered_likelihood(logp[:0]) == (0.0, 0.0)


def test_tournament_by_hand():
    """0 beats 1, ties with 2; 2 against 1 has no verdict; 3 lost its only game that counts."""
    first = torch.tensor([0, 2, 2, 3, 3])
    second = torch.tensor([1, 0, 1, 1, 4])
    found = tournament_scores(first, second, tensor(1.0, 0.5, NAN, 0.0, NAN), 5)
    assert found[:4].tolist() == pytest.approx([1.5 / 2, 1 / 2, 0.5, 0.0])
    assert found[4].isnan(), "nothing is known of it"


outcome = st.sampled_from([0.0, 0.5, 1.0, NAN])


@given(st.integers(2, 5), st.data())
def test_tournament_against_a_table(candidates, data):
    pairs = list(itertools.permutations(range(candidates), 2))
    met = data.draw(st.lists(st.tuples(st.sampled_from(pairs), outcome), max_size=12))
    table = {n: [] for n in range(candidates)}
    for (one, other), win in met:
        if not math.isnan(win):
            table[one].append(win)
            table[other].append(1.0 - win)
    index = torch.tensor([pair for pair, _ in met], dtype=torch.long).view(-1, 2)
    found = tournament_scores(
        index[:, 0], index[:, 1], torch.tensor([win for _, win in met]), candidates
    )
    expected = [sum(x) / len(x) if x else NAN for x in table.values()]
    assert found.tolist() == pytest.approx(expected, nan_ok=True)


def test_a_full_round_is_wins_over_opponents():
    """17 candidates, 136 comparisons, the lower number wins: (16 - n) / 16, mean 1/2."""
    first, second = torch.triu_indices(17, 17, offset=1)
    assert len(first) == 136
    found = tournament_scores(first, second, torch.ones(136), 17)
    assert found.tolist() == pytest.approx([(16 - n) / 16 for n in range(17)])
    assert found.mean() == pytest.approx(0.5)


def test_pairs_by_hand():
    score = tensor(0.25, NAN, 1.0, 0.5, 0.0, 0.75)
    assert choose_pairs(score, key=KEY) == [(2, 4)]
    found = choose_pairs(score, "top_k_bottom_k", k=2, key=KEY)
    assert found == [(2, 4), (5, 0)]
    assert choose_pairs(score, "top_k_bottom_k", k=9, key=KEY) == found, "3 is in the middle"
    order = [2, 5, 3, 0, 4]
    assert choose_pairs(score, "all_pairs", key=KEY) == list(itertools.combinations(order, 2))
    assert best_candidate(score, KEY) == 2


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize(
    "scores", [[], [0.3], [0.5] * 4, [NAN] * 3, [NAN, 1.0], [0.1 + 0.2, 0.3]], ids=str
)
def test_no_difference_gives_no_pair(pairing, scores):
    """Nor does one that is rounding: 0.1 + 0.2 is 0.30000000000000004."""
    assert choose_pairs(tensor(*scores), pairing, k=2, key=KEY) == []


def test_the_best_of_nothing_is_none():
    assert best_candidate(tensor(NAN, NAN), KEY) is None
    assert best_candidate(tensor(NAN, 0.0), KEY) == 1


def test_the_order_of_equals_is_drawn_by_key():
    """Each of the equal ones is chosen as often as the others, wherever they stand in the pool."""
    score = tensor(1.0, 1.0, 0.5, 0.0, 0.5, 1.0, 0.0)
    draws = 120
    pairs = [choose_pairs(score, key=(7, step)) for step in range(draws)]
    assert pairs[:9] == [choose_pairs(score, key=(7, step)) for step in range(9)]
    winners = Counter(pair[0][0] for pair in pairs)
    losers = Counter(pair[0][1] for pair in pairs)
    assert set(winners) == {0, 1, 5} and set(losers) == {3, 6}
    # Four standard deviations of a binomial count.
    assert all(abs(n - draws / 3) < 4 * math.sqrt(draws * 2 / 9) for n in winners.values())
    assert all(abs(n - draws / 2) < 4 * math.sqrt(draws / 4) for n in losers.values())


@given(st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0, NAN]), max_size=7), st.integers(1, 4))
def test_pairs_are_ordered_and_distinct(scores, k):
    score = tensor(*scores)
    for pairing in PAIRINGS:
        pairs = choose_pairs(score, pairing, k=k, key=KEY)
        assert all(scores[winner] > scores[loser] for winner, loser in pairs)
        assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    known = [x for x in scores if x == x]
    differing = sum(a != b for a, b in itertools.combinations(known, 2))
    assert len(choose_pairs(score, "all_pairs", key=KEY)) == differing
    extremes = [(scores[best], scores[worst]) for best, worst in choose_pairs(score, key=KEY)]
    assert extremes == ([(max(known), min(known))] if differing else [])
    top = choose_pairs(score, "top_k_bottom_k", k=k, key=KEY)
    members = [candidate for pair in top for candidate in pair]
    assert len(set(members)) == len(members) and len(top) <= k


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairing": "best"}, "pairing=best: allowed best_worst, all_pairs, top_k_bottom_k"),
        ({"pairing": "top_k_bottom_k", "k": 0}, "k=0: allowed k >= 1"),
    ],
)
def test_bad_choices_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        choose_pairs(tensor(0.0, 1.0), key=KEY, **options)
