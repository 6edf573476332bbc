"""A tabular scorer at the exact optimum of every loss: what it becomes, what decoding makes of it.

`pytest -s` prints the table: mean of p0(picked) / max p0 among the 4 best blocks of q.
"""

import math

import pytest
import torch

from objectives.contrastive import duplicates
from tests.objectives.tabular_nce import (
    beam,
    drawn,
    drawn_distinct,
    fit,
    largest_error,
    picked_mass,
    random_world,
    valid_slots,
)

ALPHAS = (0.0, 0.1, 0.3, 0.7, 1.0, 3.0, math.inf)


@pytest.fixture(scope="module")
def world():
    return random_world()


@pytest.fixture(scope="module")
def scores(world):
    """[X, K] of every way of training."""
    log_q, cold = world.log_q(), world.log_q(0.7)
    return {
        "oracle": world.log_p_XK - log_q,
        "ranking, q": fit("ranking", drawn(world), log_q).score_XK,
        "ranking, q masked": fit("ranking", drawn(world), log_q, dedup=True).score_XK,
        "ranking, q distinct": fit("ranking", drawn_distinct(world), log_q, dedup=True).score_XK,
        "ranking, q at 0.7": fit("ranking", drawn(world, 0.7), cold).score_XK,
        "ranking, beam": fit("ranking", beam(world), log_q, dedup=True, l2=1e-6).score_XK,
        "corrected, q": fit("ranking_corrected", drawn(world), log_q).score_XK,
        "corrected, q at 0.7": fit("ranking_corrected", drawn(world, 0.7), cold).score_XK,
        "binary, q": fit("binary", drawn(world), log_q).score_XK,
        "binary, q at 0.7": fit("binary", drawn(world, 0.7), cold).score_XK,
    }


@pytest.fixture(scope="module")
def mass(world, scores):
    """By training and alpha."""
    found = {name: {a: picked_mass(world, s, a) for a in ALPHAS} for name, s in scores.items()}
    print("\n" + " " * 22 + "".join(f"{a:>7.1f}" for a in ALPHAS))
    for name, row in found.items():
        print(f"{name:<22}" + "".join(f"{value:7.3f}" for value in row.values()))
    return found


def test_optima(world, scores):
    """log p0 - log q_T + C; log p0 + C whatever T; log p0 - log q_T without a constant."""
    log_p = world.log_p_XK
    for temperature, suffix in ((1.0, ""), (0.7, " at 0.7")):
        ratio = log_p - world.log_q(temperature)
        assert largest_error(scores[f"ranking, q{suffix}"], ratio) < 1e-6
        assert largest_error(scores[f"corrected, q{suffix}"], log_p) < 1e-6
        torch.testing.assert_close(scores[f"binary, q{suffix}"], ratio, rtol=0, atol=1e-6)
    assert largest_error(log_p, world.log_p_XK - world.log_q()) > 1


def test_a_beam_teaches_p0_on_the_beam_alone(world, scores):
    """There log p0 + C; a truth that was never a negative rises without bound as l2 falls."""
    found = scores["ranking, beam"]
    kept = world.log_q().topk(4).indices
    assert largest_error(found.gather(1, kept), world.log_p_XK.gather(1, kept)) < 0.01
    outside = found.scatter(1, kept, torch.inf).min(-1).values
    assert (outside > found.gather(1, kept).max(-1).values).all()
    loose = fit("ranking", beam(world), world.log_q(), dedup=True, l2=1e-4).score_XK
    assert (found.amax(-1) > loose.amax(-1) + 1).all()


def test_binary_on_a_beam_is_no_ratio(world):
    """Truths on the beam alone, copies masked: s = logit p0 + ln 3, where q has no part."""
    kept = world.log_q().topk(4).indices
    inside = torch.full_like(world.log_p_XK, -torch.inf)
    inside = inside.scatter(1, kept, world.log_p_XK.gather(1, kept)).log_softmax(-1)
    here = world._replace(log_p_XK=inside)
    score = fit("binary", beam(here), here.log_q(), dedup=True, l2=1e-9).score_XK.gather(1, kept)
    logit = inside.gather(1, kept).exp().logit() + math.log(3)
    torch.testing.assert_close(score, logit, rtol=0, atol=1e-3)


def test_corrected_on_a_beam_counts_q_into_p0(world):
    """log p0 + log q + C."""
    kept = world.log_q().topk(4).indices
    score = fit("ranking_corrected", beam(world), world.log_q(), dedup=True, l2=1e-6).score_XK
    wrong = (world.log_p_XK + world.log_q()).gather(1, kept)
    assert largest_error(score.gather(1, kept), wrong) < 0.02


def test_masked_copies_and_distinct_draws_lie_between(world, scores):
    """Their optimum is neither: the score correlates with log p0 more than the ratio does."""
    ratio = world.log_p_XK - world.log_q()

    def correlation(score):
        both = [(x - x.mean(-1, keepdim=True)).flatten() for x in (score, world.log_p_XK)]
        return torch.corrcoef(torch.stack(both))[0, 1]

    exact = correlation(ratio)
    masked, distinct = (correlation(scores[f"ranking, q {how}"]) for how in ("masked", "distinct"))
    assert exact + 0.02 < masked < distinct < 1
    for how in ("masked", "distinct"):
        assert largest_error(scores[f"ranking, q {how}"], ratio) > 0.3


def test_decoding_rules(mass):
    """The rule that belongs to the loss is the best, and exact; the others lose mass."""
    best = mass["oracle"][1.0]
    assert best > 0.99 > 0.95 > mass["oracle"][0.0] > mass["oracle"][math.inf]
    for loss in ("ranking", "binary"):
        row, cold = mass[f"{loss}, q"], mass[f"{loss}, q at 0.7"]
        assert row[1.0] == best == max(row.values())
        assert row[0.0] < row[0.1] < row[0.3] < row[1.0] > row[3.0] > row[math.inf]
        # l / T + s is l + T s; 1 is too much, more is worse than no scorer at all.
        assert cold[0.7] == best > cold[1.0] > cold[0.0] > cold[3.0] > cold[math.inf]
        assert cold[math.inf] < 0.5
    for name in ("corrected, q", "corrected, q at 0.7"):
        assert mass[name][math.inf] == best > mass[name][1.0] > mass[name][0.0]
    assert mass["ranking, beam"][math.inf] == best > mass["ranking, beam"][1.0]


def test_masking_asks_for_a_larger_weight(mass):
    for name in ("ranking, q masked", "ranking, q distinct"):
        assert mass[name][3.0] > mass["ranking, q"][3.0] + 0.05
        assert mass[name][math.inf] > mass["ranking, q"][math.inf] + 0.1


def test_copies_put_a_floor_under_the_loss(world):
    """A beam with copies of the truth: at least rate ln 2, far above the loss without them."""
    sets = beam(world)
    copies = duplicates(sets.slots.flatten(0, 1)[..., None]).positive_MC.sum(-1)
    rate = float((copies.view(sets.weight_XN.shape) * sets.weight_XN).sum(-1).mean())
    copied = fit("ranking", sets, world.log_q(), l2=1e-6).loss
    masked = fit("ranking", sets, world.log_q(), dedup=True, l2=1e-6).loss
    print(f"\nbeam: dup_rate {rate:.3f}, floor {rate * math.log(2):.3f}, loss with copies"
          f" {copied:.3f}, without {masked:.3f}")  # fmt: skip
    assert copied > rate * math.log(2) and copied > masked + 0.25
    kept = valid_slots(sets.slots, dedup=True).flatten(0, 1)
    found = duplicates(sets.slots.flatten(0, 1)[..., None]).any_MC
    assert torch.equal(kept, ~found)
