"""Groups, means and paired differences of runs, by hand."""

import itertools

import pytest

from data.errors import DataError
from evaluation.comparison import (
    Run,
    compare,
    differing_keys,
    find_group,
    flatten,
    group_runs,
    numeric_keys,
    telling_keys,
)
from evaluation.comparison_plot import is_doubling, plot_comparison


def made(seed, metrics=None, folder=None, **config):
    """A run; `mix=0.5` stands for masking.mix_alpha=0.5."""
    names = {"mix": "masking.mix_alpha", "block": "block_size", "noise": "noise.name"}
    flat = {names.get(key, key): value for key, value in config.items()}
    return Run(folder or f"{flat}-{seed}", seed, flat, metrics or {})


def test_flatten():
    assert flatten({"a": {"b": 1, "c": {"d": None}}, "e": [1, 2]}) == {
        "a.b": 1, "a.c.d": None, "e": [1, 2],
    }  # fmt: skip


def test_what_differs():
    runs = [
        made(1, mix=0.5, block=4, lr=1, list=[1, {"a": 2}]),
        made(2, mix=0, block=4, lr=1.0, list=[1, {"a": 2}]),
        made(3, block=4, lr=True, list=[1, {"a": 2}], path="x"),
    ]
    assert differing_keys(runs) == ["lr", "masking.mix_alpha", "path"], "1 is 1.0 but not true"
    assert differing_keys(runs[:2]) == ["masking.mix_alpha"], "the seed is none of them"
    assert differing_keys(runs, ignore=["path", "lr"]) == ["masking.mix_alpha"]
    assert differing_keys([made(1, a=None), made(1)]) == [], "absent is like null"


def test_keys_that_go_together_are_told_once():
    """Of noise.name and its options the name is enough; what tells more is added."""
    runs = [
        made(1, noise="log", eps=1, target="A", block=4),
        made(1, noise="cosine", eps=2, target="B", block=4),
        made(1, noise="cosine", eps=2, target="B", block=8),
    ]
    keys = differing_keys(runs)
    assert telling_keys(runs, keys) == ["noise.name", "block_size"]
    assert telling_keys(runs, keys, first=["eps", "absent"]) == ["eps", "block_size"]


def test_groups_are_sorted_as_numbers_with_nothing_first():
    runs = [made(seed, mix=mix) for mix in (16, 2, 0.5) for seed in (2, 1)] + [made(1)]
    groups = group_runs(runs, ["masking.mix_alpha"])
    assert [group.values["masking.mix_alpha"] for group in groups] == [None, 0.5, 2, 16]
    assert list(groups[1].runs) == [1, 2] and groups[1].label == "masking.mix_alpha=0.5"
    assert numeric_keys(groups) == ["masking.mix_alpha"]
    assert group_runs(runs[-1:], [])[0].label == "all" and numeric_keys([]) == []


def test_a_seed_twice_is_an_error():
    runs = [made(1, folder="a", mix=0), made(1, folder="b", mix=0)]
    with pytest.raises(DataError, match=r"a and b: the same configuration and seed=1"):
        group_runs(runs, ["masking.mix_alpha"])


@pytest.fixture
def groups():
    """mix 0: 3.0 3.2 3.4 (seeds 1 2 3); mix 1: 2.5 2.9 (seeds 1 2) and 9 (seed 7); block 4."""
    zero = [made(s, {"nll": v}, mix=0) for s, v in ((1, 3.0), (2, 3.2), (3, 3.4))]
    one = [made(s, {"nll": v}, mix=1) for s, v in ((1, 2.5), (2, 2.9), (7, 9.0))]
    return group_runs([*one, *zero, made(5, mix=2)], ["masking.mix_alpha"])


def test_means_intervals_and_paired_differences_by_hand(groups):
    zero, one, two = compare(groups, ["nll"], groups[0])
    assert (zero["n"], zero["mean"], zero["sd"]) == (3, pytest.approx(3.2), pytest.approx(0.2))
    half = 4.302653 * 0.2 / 3**0.5
    assert (zero["low"], zero["high"]) == pytest.approx((3.2 - half, 3.2 + half), rel=1e-6)
    assert zero["pairs"] is None and zero["difference"] is None, "the reference itself"
    assert one["mean"] == pytest.approx(14.4 / 3) and one["seeds"] == [1, 2, 7]
    # Seeds 1 and 2: -0.5 and -0.3; mean -0.4, s = 0.1414, t(1) = 12.706.
    assert one["pairs"] == 2 and one["difference"] == pytest.approx(-0.4)
    assert one["difference_sd"] == pytest.approx(0.02**0.5)
    ends = (one["difference_low"], one["difference_high"])
    assert ends == pytest.approx((-0.4 - 1.2706205, -0.4 + 1.2706205), rel=1e-6)
    assert (two["runs"], two["n"], two["mean"], two["pairs"]) == (1, 0, None, 0)


def test_a_single_seed_has_no_interval():
    groups = group_runs(
        [made(1, {"m": 1.0}, mix=0), made(1, {"m": 3.0}, mix=1)], ["masking.mix_alpha"]
    )
    line = compare(groups, ["m"], groups[0])[1]
    assert (line["mean"], line["difference"], line["pairs"]) == (3.0, 2.0, 1)
    assert line["sd"] is line["low"] is line["difference_low"] is None


@pytest.mark.parametrize("text", ["1", "1.0", "1e0"])
def test_the_reference_is_found_as_written(groups, text):
    assert find_group(groups, {"masking.mix_alpha": text}) is groups[1]


def test_a_reference_that_is_none(groups):
    with pytest.raises(DataError, match=r"mode\.reference=masking\.mix_alpha=7: fits 0 groups"):
        find_group(groups, {"masking.mix_alpha": "7"})
    with pytest.raises(DataError, match=r"fits 0 groups; allowed: one of masking\.mix_alpha=0; "):
        find_group(groups, {"optim.lr": "1"})
    both = group_runs([made(1, mix=0, block=4), made(1, mix=0, block=8)],
                      ["masking.mix_alpha", "block_size"])  # fmt: skip
    with pytest.raises(DataError, match=r"fits 2 groups; allowed: one of .*block_size=8"):
        find_group(both, {"masking.mix_alpha": "0"})


@pytest.mark.parametrize(
    ("values", "doubling"),
    [
        ([0, 0.25, 0.5, 1], True), ([1, 2, 4], True), ([1, 3, 4], False), ([1, 2], False),
        ([0], False), ([-1, 1, 4], False),
    ],
)  # fmt: skip
def test_doubling(values, doubling):
    assert is_doubling(values) is doubling


def test_the_axis_has_equal_steps_from_zero_through_the_powers_of_two(tmp_path, monkeypatch):
    """0, 1/4, 1/2 and 1 stand at equal distances; a group without a number is a line across."""
    from matplotlib.figure import Figure

    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self))
    runs = [made(s, {"nll": 1.0 + s}, mix=m) for m in (0, 0.25, 0.5, 1) for s in (1, 2)]
    groups = group_runs([*runs, made(1, {"nll": 5.0})], ["masking.mix_alpha"])
    plot_comparison(tmp_path / "a.png", groups, ["nll"], "masking.mix_alpha")
    [axis] = kept[0].axes
    places = axis.xaxis.get_transform().transform([0, 0.25, 0.5, 1])
    steps = [after - before for before, after in itertools.pairwise(places)]
    assert steps == pytest.approx([steps[0]] * 3)
    across = [line for line in axis.lines if set(line.get_ydata()) == {5.0}]
    assert len(across) == 1 and list(across[0].get_xdata()) == [0, 1]
