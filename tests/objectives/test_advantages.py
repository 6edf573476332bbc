"""Advantages by hand and against plain Python; the rates of groups and what binds them."""

import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.advantages import ADVANTAGES, group_advantages, group_statistics

NAN = math.nan


def groups(*rows):
    """Rewards in double precision; None has no verdict."""
    reward = torch.tensor([[NAN if r is None else r for r in row] for row in rows]).double()
    return reward, ~reward.isnan()


def test_by_hand():
    """Rewards 1, 0, 0, 1, 1 have mean 3/5 and variance 6/25."""
    reward, valid = groups([1.0, 0.0, 0.0, 1.0, 1.0])
    high, low = 2 / 5, -3 / 5
    found = group_advantages(reward, valid, "dr_grpo")[0].tolist()
    assert found == pytest.approx([high, low, low, high, high])
    found = group_advantages(reward, valid, "rloo")[0].tolist()
    assert found == pytest.approx([0.5, -0.75, -0.75, 0.5, 0.5])
    found = group_advantages(reward, valid, "grpo")[0].tolist()
    std = math.sqrt(6) / 5 + 1e-6
    assert found == pytest.approx([a / std for a in (high, low, low, high, high)], rel=1e-12)
    wide = group_advantages(reward, valid, "grpo", eps=0.25)[0, 0].item()
    assert wide == pytest.approx(high / (math.sqrt(6) / 5 + 0.25))
    assert (group_advantages(reward, valid, "grpo", eps=0.5) == 0.0).all(), "std < eps"


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_invalid_samples_are_not_there(kind):
    reward, valid = groups([1.0, None, 0.0, 0.25, None])
    found = group_advantages(reward, valid, kind)[0]
    alone, _ = groups([1.0, 0.0, 0.25])
    expected = group_advantages(alone, torch.ones(1, 3, dtype=torch.bool), kind)[0]
    torch.testing.assert_close(found[valid[0]], expected)
    assert (found[~valid[0]] == 0.0).all() and (expected != 0.0).all()


@pytest.mark.parametrize("kind", ADVANTAGES)
def test_nothing_to_compare_is_zero(kind):
    reward, valid = groups([0.5] * 3, [None, 1.0, None], [None] * 3, [0.0] * 3)
    assert (group_advantages(reward, valid, kind) == 0.0).all()


@pytest.mark.parametrize("kind", ADVANTAGES)
@pytest.mark.parametrize("reward", [0.1, 0.7, 2 / 3, 1.4])
def test_equal_fractions_are_exactly_equal(kind, reward):
    """Their mean is rounded: whoever asks for advantages that are not 0 would find them mixed."""
    reward_GK = torch.full((1, 16), reward)
    assert (reward_GK - reward_GK.mean()).abs().max() > 0.0
    found = group_advantages(reward_GK, torch.ones(1, 16, dtype=torch.bool), kind)
    assert (found == 0.0).all()


def test_rewards_without_bound_are_not_hidden():
    found = group_advantages(torch.full((1, 4), math.inf), torch.ones(1, 4, dtype=torch.bool))
    assert found.isnan().all()


def slow(rewards, kind, eps):
    """One group, sample by sample."""
    known = [r for r in rewards if r is not None]
    if len(known) < 2:
        return [0.0] * len(rewards)
    mean, std = statistics.fmean(known), statistics.pstdev(known)
    found = []
    for k, reward in enumerate(rewards):
        others = [r for j, r in enumerate(rewards) if j != k and r is not None]
        if reward is None or (kind == "grpo" and std < eps):
            found.append(0.0)
        elif kind == "rloo":
            found.append(reward - statistics.fmean(others))
        else:
            found.append((reward - mean) / (std + eps if kind == "grpo" else 1.0))
    return found


rewards = st.one_of(st.none(), st.sampled_from([0.0, 0.125, 0.5, 1.0]))


@given(st.lists(st.lists(rewards, min_size=4, max_size=4), min_size=1, max_size=3))
def test_against_plain_python(rows):
    reward, valid = groups(*rows)
    for kind in ADVANTAGES:
        found = group_advantages(reward, valid, kind)
        expected = torch.tensor([slow(row, kind, 1e-6) for row in rows], dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)
        assert found.sum(-1).abs().max() < 1e-9
    count = valid.sum(-1, keepdim=True)
    scale = torch.where(count > 1, (count - 1) / count.double(), 0.0)
    ours, theirs = (group_advantages(reward, valid, kind) for kind in ("dr_grpo", "rloo"))
    torch.testing.assert_close(ours, theirs * scale, rtol=1e-9, atol=1e-12)


def test_unknown_names_are_refused():
    with pytest.raises(ValueError, match=r"advantage=gae: allowed grpo, dr_grpo, rloo"):
        group_advantages(*groups([0.0, 1.0]), "gae")


def test_statistics_by_hand():
    """Of twelve samples three are invalid; of six groups one is mixed."""
    found = group_statistics(*groups([1, 0], [0, None], [1, 1], [0.5, 0.5], [0, 0], [None, None]))
    known = [1, 0, 0, 1, 1, 0.5, 0.5, 0, 0]
    assert found.reward_mean.item() == pytest.approx(4 / 9)
    assert found.reward_std.item() == pytest.approx(statistics.pstdev(known))
    assert found.invalid_rate.item() == pytest.approx(3 / 12)
    rates = {
        "near_zero": 5, "mixed": 1, "all_zero": 2, "all_one": 1, "any_success": 3, "all_success": 2,
    }  # fmt: skip
    for name, count in rates.items():
        assert getattr(found, name).item() == pytest.approx(count / 6), name
    assert found.mean_group_std.item() == pytest.approx(0.5 / 6)


@pytest.mark.parametrize(
    ("successes", "groups_with", "published"),
    [
        (90, 35, (0.087891, 0.283136, 0.546875, 0.453125)),
        (93, 38, (0.090820, 0.287353, 0.593750, 0.406250)),
        (96, 41, (0.093750, 0.291481, 0.640625, 0.359375)),
        (100, 39, (0.097656, 0.296849, 0.609375, 0.390625)),
    ],
)
def test_published_gate(successes, groups_with, published):
    """64 prefixes with 16 samples each; the counts are those behind the published rates."""
    reward = torch.zeros(64, 16)
    for n in range(successes):
        reward[n % groups_with, n // groups_with] = 1.0
    found = group_statistics(reward, torch.ones_like(reward, dtype=torch.bool))
    rates = found.reward_mean, found.reward_std, found.mixed, found.near_zero
    assert [rate.item() for rate in rates] == pytest.approx(published, abs=6e-7)
    assert found.any_success == found.mixed and found.all_success == 0.0


def test_no_verdict_gives_no_mean():
    found = group_statistics(*groups([None, None]))
    assert found.reward_mean.isnan() and found.reward_std.isnan()
    assert (found.invalid_rate, found.near_zero, found.mixed, found.all_one) == (1, 1, 0, 0)


binary = st.one_of(st.none(), st.sampled_from([0.0, 1.0]))


@given(st.lists(st.lists(binary, min_size=3, max_size=3), min_size=1, max_size=6))
def test_binary_groups_are_mixed_or_near_zero(rows):
    reward, valid = groups(*rows)
    found = group_statistics(reward, valid)
    assert found.near_zero + found.mixed == pytest.approx(1.0)
    unjudged = (~valid.any(-1)).double().mean()
    assert found.near_zero == pytest.approx(found.all_zero + found.all_one + unjudged)
    assert found.any_success == pytest.approx(found.mixed + found.all_one)
    assert found.all_success == found.all_one
