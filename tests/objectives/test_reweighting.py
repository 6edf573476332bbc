"""Weights by depth: hand numbers, mean 1, independence of the batch, the controls."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from objectives.reweighting import DEPTH_MODES, DepthReweighting

MODES = [mode for mode in DEPTH_MODES if mode != "none"]


def weights(depths, heights, block_size=None, seed=0, **options):
    depth_BL, height_BL = torch.tensor(depths), torch.tensor(heights)
    uniform_BL = torch.rand(depth_BL.shape, generator=torch.Generator().manual_seed(seed))
    reweighting = DepthReweighting(**{"mix_alpha": 1.0, **options})
    return reweighting.weights(depth_BL, height_BL, uniform_BL, block_size or depth_BL.shape[1])


def test_by_hand():
    """Depths 0, 1, 2 of a tree of height 2, and a token without a word."""
    found = weights([[0, 1, 2, -1]], [[2, 2, 2, -1]], mix_alpha=0.25, depth_temp=0.5)
    e = [math.exp(d / 2 / 0.5) for d in (0, 1, 2)]
    expected = [0.75 + 0.25 * 3 * value / sum(e) for value in e]
    assert found[0].tolist() == pytest.approx([*expected, 1.0])


def test_reverse_turns_the_order_and_normalising_uses_the_sentence():
    depths, heights = [[0, 1, 0, 4]], [[1, 1, 4, 4]]  # two sentences in one unit
    plain = weights(depths, heights)[0]
    # 1/1 and 4/4 weigh the same, and so do both roots.
    assert plain[1] == plain[3] and plain[0] == plain[2] and plain[1] > plain[0]
    assert plain[1] / plain[0] == pytest.approx(math.e)
    turned = weights(depths, heights, reverse=True)[0]
    assert turned[0] / turned[1] == pytest.approx(math.e)
    raw = weights(depths, heights, normalize_depth=False)[0]
    assert raw[3] / raw[1] == pytest.approx(math.exp(3.0))


trees = st.lists(st.integers(-1, 9), min_size=12, max_size=12)


@settings(deadline=None)
@given(
    st.lists(trees, min_size=1, max_size=3), st.sampled_from([3, 4, 12]), st.sampled_from(MODES),
    st.booleans(), st.booleans(), st.floats(0.01, 1.0), st.floats(0.1, 3.0),
)  # fmt: skip
def test_weights_average_one_over_the_words_of_every_unit(
    rows, block_size, mode, reverse, normalize, alpha, temperature
):
    found = weights(
        rows, [[max(0, *row)] * 12 for row in rows], block_size, mix_alpha=alpha, depth_mode=mode,
        reverse=reverse, normalize_depth=normalize, depth_temp=temperature,
    ).view(len(rows), -1, block_size)  # fmt: skip
    is_word = (torch.tensor(rows) >= 0).view(found.shape)
    assert (found[~is_word] == 1.0).all() and (found >= 1.0 - alpha - 1e-6).all()
    count = is_word.sum(-1)
    mean = (found * is_word).sum(-1)[count > 0] / count[count > 0]
    torch.testing.assert_close(mean, torch.ones_like(mean), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_a_weight_depends_on_its_own_unit_alone(mode):
    draw = torch.Generator().manual_seed(1)
    depth = torch.randint(-1, 8, (6, 12), generator=draw)
    height, uniform = torch.full((6, 12), 8), torch.rand(6, 12, generator=draw)
    reweighting = DepthReweighting(1.0, mode)
    whole = reweighting.weights(depth, height, uniform, 4)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    moved = reweighting.weights(depth[order], height[order], uniform[order], 4)
    assert torch.equal(moved, whole[order])
    alone = reweighting.weights(depth[2:3, 4:8], height[2:3, 4:8], uniform[2:3, 4:8], 4)
    assert torch.equal(alone, whole[2:3, 4:8])


def test_random_deals_the_same_weights_to_other_words():
    depth = torch.arange(12).repeat(40, 1)
    depth[:, [0, 7]] = -1
    height = torch.where(depth >= 0, 11, -1)
    plain = DepthReweighting(1.0)
    control = DepthReweighting(1.0, "random")
    uniform = torch.rand(depth.shape, generator=torch.Generator().manual_seed(0))
    true, dealt = (r.weights(depth, height, uniform, 6) for r in (plain, control))
    units = true.view(40, 2, 6).sort(-1).values, dealt.view(40, 2, 6).sort(-1).values
    torch.testing.assert_close(*units)
    assert (dealt[:, [0, 7]] == 1.0).all()
    # Every word of a unit receives every weight equally often: the means are those of the unit.
    mean = dealt.view(40, 2, 6).mean(0)
    assert (mean[0, 1:] - 1.0).abs().max() < 0.25
    assert not torch.equal(true, dealt)


def test_position_ignores_the_tree():
    one = weights([[0, 3, 1, 2]], [[3, 3, 3, 3]], depth_mode="position")
    two = weights([[2, 2, 0, 1]], [[2, 2, 2, 2]], depth_mode="position")
    assert torch.equal(one, two) and (one.diff() > 0).all()


@pytest.mark.parametrize(
    ("options", "active"),
    [({"mix_alpha": 0.0}, False), ({"mix_alpha": 0.5, "depth_mode": "none"}, False),
     ({"mix_alpha": 0.5}, True)],
)  # fmt: skip
def test_what_changes_nothing_is_not_active(options, active):
    assert DepthReweighting(**options).active is active


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mix_alpha": 1.5}, r"masking\.mix_alpha=1\.5: allowed a number in \[0, 1\]"),
        ({"depth_temp": 0.0}, r"masking\.depth_temp=0\.0: allowed"),
        ({"depth_mode": "depth"}, r"masking\.depth_mode=depth: allowed dependency, none, random"),
        ({"target": "mask"}, r"masking\.target=mask: allowed loss, schedule"),
    ],
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        DepthReweighting(**options)
