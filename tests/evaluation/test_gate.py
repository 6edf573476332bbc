"""The reward gate against the published tables, hand counts and identities."""

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import DataError
from evaluation.gate import gate, gate_pair, prefix_means
from evaluation.gate_report import (
    arm_cells,
    gate_markdown,
    gate_text,
    pair_cells,
    plain_gate,
    plot_gate,
)
from evaluation.statistics import wilson_interval
from evaluation.thought_probe import thought_probe

ORDER = ("think_base", "think_phase3", "think_base_rlmt", "think_phase3_rlmt")
# Successes of 16 by prefix, a hexadecimal digit per arm (base, base_rlmt, phase3, phase3_rlmt).
# Published are totals of the arms, their mixed groups and the comparisons of pairs; this is one
# distribution with all of them, found by search. Nothing else about it was ever measured.
COUNTS = """
7003 6650 6323 6110 5404 5311 4413 4222 4135 3451 3365 3233 3040 2772 2262 2222 2222 2221 2121 2103
2101 2072 1611 1200 1121 1112 1112 1111 1110 1100 1012 1010 1001 1000 1000 0601 0511 0313 0232 0210
0208 0203 0200 0200 0121 0118 0111 0101 0100 0090 0013 0010 0010 0010 000a 0002 0000 0000 0000 0000
0000 0000 0000 0000
"""
# Totals behind the published means of tokens and words per rollout, of 1024.
LENGTHS = {
    "think_base": (180_036, 89_368), "think_phase3": (180_103, 88_869),
    "think_base_rlmt": (180_115, 88_400), "think_phase3_rlmt": (180_145, 90_929),
}  # fmt: skip
PUBLISHED_ARMS = """
think_base 0.087891 0.283136 0.0000 0.546875 0.453125 0.546875 0.0000 175.8164 87.2734 1.0000
think_phase3 0.090820 0.287353 0.0000 0.593750 0.406250 0.593750 0.0000 175.8818 86.7861 1.0000
think_base_rlmt 0.093750 0.291481 0.0000 0.640625 0.359375 0.640625 0.0000 175.8936 86.3281 1.0000
think_phase3_rlmt 0.097656 0.296849 0.0000 0.609375 0.390625 0.609375 0.0000 175.9229 88.7979 1.0000
"""
PUBLISHED_PAIRS = """
think_base_rlmt_minus_think_base 0.005859 0.281250 0.281250 0.437500 64
think_phase3_minus_think_base 0.002930 0.296875 0.250000 0.453125 64
think_phase3_rlmt_minus_think_base 0.009766 0.296875 0.296875 0.406250 64
think_phase3_minus_think_base_rlmt -0.002930 0.281250 0.312500 0.406250 64
think_phase3_rlmt_minus_think_base_rlmt 0.003906 0.250000 0.265625 0.484375 64
think_phase3_rlmt_minus_think_phase3 0.006836 0.312500 0.312500 0.375000 64
"""


def shares(total, parts):
    """Whole numbers that differ by at most one and have this sum."""
    return [total // parts + (place < total % parts) for place in range(parts)]


def arm_rows(successes, tokens=None, words=None, samples=16, name="arm"):
    """Rollouts of an arm with so many successes per prefix."""
    number = len(successes) * samples
    tokens, words = shares(tokens or 7 * number, number), shares(words or number, number)
    places = ((prefix, k) for prefix in range(len(successes)) for k in range(samples))
    return [
        {
            "arm": name, "prefix_id": f"p{prefix:02d}", "k": k, "prefix": f"text {prefix}",
            "reference": "end", "reward": float(k < successes[prefix]), "thought": "so",
            "suffix": "w " * n_words, "thought_tokens": 3, "suffix_tokens": n_tokens - 3,
            "boundary_ids": [9], "closed_autonomously": False,
        }
        for (prefix, k), n_tokens, n_words in zip(places, tokens, words, strict=True)
    ]  # fmt: skip


def published_rows():
    columns = dict(zip(sorted(ORDER), zip(*COUNTS.split(), strict=True), strict=True))
    return {
        name: arm_rows([int(digit, 16) for digit in columns[name]], *LENGTHS[name], name=name)
        for name in ORDER
    }


@pytest.fixture(scope="module")
def published():
    return gate(published_rows())


def lines(text):
    return [line.split() for line in text.strip().splitlines()]


def test_the_published_table_of_arms(published):
    assert arm_cells(published)[1] == lines(PUBLISHED_ARMS)


def test_the_published_comparisons(published):
    header, rows = pair_cells(published)
    assert [row[:6] for row in rows] == lines(PUBLISHED_PAIRS)
    assert header[-1] == "Significant" and {row[-1] for row in rows} == {"false"}


def test_the_published_go_no_go_fields(published):
    assert published.go_no_go == {
        "reward_validity_ok": True, "variance_ok": True, "phase3_more_reward_separable": True,
        "phase3_higher_mean_reward": True,
    }  # fmt: skip


def test_the_fields_say_more_than_the_evidence(published):
    """All go, and no pair differs by more than chance."""
    assert not any(pair.significant for pair in published.pairs)
    for pair in published.pairs:
        assert pair.interval.low < pair.mean_reward_delta < pair.interval.high and pair.p > 0.05


def test_wilson_and_the_wider_interval_over_prefixes(published):
    rounded = {
        "think_base": (0.072, 0.107), "think_phase3": (0.075, 0.110),
        "think_base_rlmt": (0.077, 0.113), "think_phase3_rlmt": (0.081, 0.117),
    }  # fmt: skip
    for name, ends in rounded.items():
        arm = published.arms[name]
        assert arm.wilson == wilson_interval(arm.successes, 1024)
        assert tuple(round(end, 3) for end in arm.wilson) == ends
        assert arm.interval.high - arm.interval.low > arm.wilson.high - arm.wilson.low


def test_the_report_has_every_number_and_is_json(published, tmp_path):
    text = gate_markdown(published, ["seen here"])
    for part in ("0.283136", "-0.002930", "- variance_ok: true", "| 90 | 1024 |", "- seen here"):
        assert part in text
    assert "think_phase3_rlmt_minus_think_phase3" in gate_text(published)
    found = json.loads(json.dumps(plain_gate(published), allow_nan=False))
    assert found["arms"]["think_base"]["wilson"]["low"] == pytest.approx(0.0721, abs=1e-4)
    assert found["pairs"]["think_phase3_minus_think_base"]["shared_prefixes"] == 64
    plot_gate(tmp_path / "gate.png", published)
    assert (tmp_path / "gate.png").read_bytes()[:4] == b"\x89PNG"


def test_hand_counts_with_rewards_that_are_invalid():
    rows = arm_rows([2, 0, 1], samples=2)
    rows[1]["reward"] = rows[4]["reward"] = rows[5]["reward"] = None
    rows[0]["closed_autonomously"] = True
    found = gate({"arm": rows})
    arm = found.arms["arm"]
    assert (arm.prefixes, arm.samples, arm.valid, arm.successes) == (3, 6, 3, 1)
    assert (arm.reward_mean, arm.reward_min, arm.reward_max) == (pytest.approx(1 / 3), 0.0, 1.0)
    assert arm.invalid_rate == 0.5 and arm.mean_group_std == 0.0
    assert (arm.any_success_group_rate, arm.all_success_group_rate) == (1 / 3, 1 / 3)
    assert (arm.near_zero_group_rate, arm.mixed_group_rate) == (1.0, 0.0)
    assert (arm.closed_think_rate, arm.autonomous_closed_think_rate) == (1.0, 1 / 6)
    assert found.go_no_go == {"reward_validity_ok": False, "variance_ok": False}
    assert found.pairs == []


def test_graded_rewards_have_no_rate_and_an_arm_without_any_no_mean():
    rows = arm_rows([1, 0], samples=2)
    rows[0]["reward"] = 0.75
    assert gate({"arm": rows}).arms["arm"].wilson is None
    unjudged = gate({"arm": [{**row, "reward": None} for row in rows]})
    arm = unjudged.arms["arm"]
    assert arm.reward_mean is arm.wilson is arm.interval is arm.mean_group_std is None
    assert "| arm | - | - | 1.0000 |" in gate_markdown(unjudged)


def test_a_difference_by_hand():
    pair = gate_pair("a", {"p": 0.5, "q": 0.0, "r": 0.25, "only": 1.0},
                     "b", {"p": 0.75, "q": 0.0, "r": 0.0, "s": 1.0})  # fmt: skip
    assert pair.name == "b_minus_a" and pair.shared_prefixes == 3
    assert pair.mean_reward_delta == pytest.approx(0.0, abs=1e-12)
    rates = (pair.right_better_prefix_rate, pair.left_better_prefix_rate, pair.tie_prefix_rate)
    assert rates == pytest.approx((1 / 3, 1 / 3, 1 / 3))
    assert gate_pair("a", {"p": 0.5}, "b", {"q": 0.5}) is None


def twice(rows):
    """Every prefix two times over, both of one document."""
    return [
        {**row, "document": int(row["prefix_id"][1:]), "prefix_id": f"{row['prefix_id']}{part}"}
        for row in rows for part in "ab"
    ]  # fmt: skip


def width(interval):
    return interval.high - interval.low


def test_prefixes_of_one_document_are_drawn_together():
    rows = {"a": arm_rows([1, 5, 0, 9, 3, 7, 2]), "b": arm_rows([3, 4, 1, 16, 3, 9, 2])}
    once = gate(rows)
    doubled = {name: twice(of_arm) for name, of_arm in rows.items()}
    found = gate(doubled)
    for name in rows:
        assert found.arms[name].interval == pytest.approx(once.arms[name].interval)
        assert (found.arms[name].documents, found.arms[name].prefixes) == (7, 14)
        assert once.arms[name].documents == 7
    (pair,), (other,) = found.pairs, once.pairs
    assert pair.interval == pytest.approx(other.interval) and pair.p == other.p
    # Taken for independent, copies narrow the intervals.
    unknown = {
        name: [{**row, "document": None} for row in of_arm] for name, of_arm in doubled.items()
    }
    free = gate(unknown)
    assert width(free.arms["a"].interval) < 0.85 * width(found.arms["a"].interval)
    assert width(free.pairs[0].interval) < 0.85 * width(pair.interval)
    assert free.arms["a"].documents == 14
    # One arm that knows is enough for the pair.
    for some in ({"a": doubled["a"], "b": unknown["b"]}, {"a": unknown["a"], "b": doubled["b"]}):
        assert gate(some).pairs == found.pairs
    assert "| 224 | 224 | 14 | 7 |" in gate_markdown(found)


def test_a_probe_draws_documents():
    own, blank = arm_rows([1, 5, 0, 9, 3, 7, 2]), arm_rows([0, 4, 1, 2, 3, 5, 2])
    (_, once) = thought_probe({"a": {"own": own, "blank": blank}})
    (_, found) = thought_probe({"a": {"own": twice(own), "blank": twice(blank)}})
    for name in ("interval", "oracle_interval"):
        assert getattr(found, name) == pytest.approx(getattr(once, name))
    assert found.own_minus.interval == pytest.approx(once.own_minus.interval)
    assert found.own_minus.p == once.own_minus.p and found.prefixes == 2 * once.prefixes


def test_what_is_always_better_is_significant():
    better = gate({"a": arm_rows([1] * 20), "b": arm_rows([3] * 20)}).pairs[0]
    assert better.significant and better.interval == pytest.approx((0.125, 0.125))
    assert better.p == pytest.approx(1 / 2000)


@pytest.mark.parametrize(("prefixes", "p"), [(2, 0.5), (5, 0.0625), (6, 0.03125)])
def test_few_prefixes_prove_little_however_alike_they_are(prefixes, p):
    """Of 2^m patterns of signs two are as one-sided as this; a prefix that ties is none of m."""
    tied = gate({"a": arm_rows([1] * prefixes + [2]), "b": arm_rows([3] * prefixes + [2])})
    assert tied.pairs[0].p >= p
    alone = gate({"a": arm_rows([1] * prefixes), "b": arm_rows([3] * prefixes)}).pairs[0]
    assert alone.p == p and alone.interval.low > 0 and alone.significant == (prefixes == 6)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=2, max_size=8))
def test_identities(counts):
    left, right = ([pair[side] for pair in counts] for side in (0, 1))
    found = gate({"a": arm_rows(left, samples=4), "b": arm_rows(right, samples=4)})
    (pair,) = found.pairs
    a, b = found.arms["a"], found.arms["b"]
    assert pair.mean_reward_delta == pytest.approx(b.reward_mean - a.reward_mean)
    total = pair.right_better_prefix_rate + pair.left_better_prefix_rate + pair.tie_prefix_rate
    assert total == pytest.approx(1)
    assert pair.right_better_prefix_rate * len(counts) == pytest.approx(
        sum(y > x for x, y in counts)
    )
    for arm in (a, b):
        assert arm.reward_std == pytest.approx(
            math.sqrt(arm.reward_mean * (1 - arm.reward_mean)), abs=1e-12
        )
        assert arm.mixed_group_rate == pytest.approx(1 - arm.near_zero_group_rate)
        assert arm.any_success_group_rate == pytest.approx(
            arm.mixed_group_rate + arm.all_success_group_rate
        )
    swapped = gate({"a": arm_rows(right, samples=4), "b": arm_rows(left, samples=4)}).pairs[0]
    assert swapped.mean_reward_delta == pytest.approx(-pair.mean_reward_delta)


def test_the_interval_of_a_pair_is_a_plain_bootstrap_over_prefixes():
    rows = published_rows()
    left, right = (prefix_means(rows[name]) for name in ("think_base", "think_phase3_rlmt"))
    pair = gate_pair("l", left, "r", right)
    differences = np.array([right[p] - left[p] for p in sorted(left)])
    rng = np.random.default_rng(1)
    means = [rng.choice(differences, 64).mean() for _ in range(4000)]
    assert pair.interval == pytest.approx(np.quantile(means, [0.025, 0.975]), abs=0.006)


def test_refusals():
    with pytest.raises(DataError, match="arm a: no rollouts"):
        gate({"a": []})
    other = [{**row, "prefix": "another"} for row in arm_rows([1, 1])]
    with pytest.raises(DataError, match="prefix 'p00' is another text in arm b than in a"):
        gate({"a": arm_rows([1, 1]), "b": other})
