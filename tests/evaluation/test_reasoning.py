"""Mean@n, Pass@k, chance and paired differences, against enumeration and hand numbers."""

from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

from data.errors import DataError
from data.fingerprint import fingerprint
from evaluation.grouped import Groups
from evaluation.reasoning import (
    MACRO,
    Problem,
    Problems,
    chance_of,
    consecutive,
    pass_at_k,
    powers_up_to,
    reasoning_table,
)
from evaluation.statistics import wilson_interval


def test_pass_at_k_is_the_share_of_draws_with_a_right_sample():
    for n in range(1, 8):
        for c, k in product(range(n + 1), range(1, n + 1)):
            draws = list(combinations([True] * c + [False] * (n - c), k))
            assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, draws)) / len(draws), abs=1e-14)


def test_pass_at_k_of_many_samples_is_exact():
    """C(10000 - 3, 5000) and C(10000, 5000) do not fit into a float; their quotient does."""
    wrong = Fraction(5000 * 4999 * 4998, 10000 * 9999 * 9998)
    assert pass_at_k(10_000, 3, 5000) == pytest.approx(float(1 - wrong), rel=1e-12)


@pytest.mark.parametrize(("n", "c", "k"), [(8, 3, 0), (8, 3, 9), (8, 9, 1), (8, -1, 1)])
def test_pass_at_k_of_what_cannot_be(n, c, k):
    with pytest.raises(DataError, match=rf"pass@{k} of {c} right samples among {n}: allowed 1 <="):
        pass_at_k(n, c, k)


def test_ks_and_comparisons():
    assert [powers_up_to(n) for n in (1, 2, 5, 8)] == [[1], [1, 2], [1, 2, 4, 5], [1, 2, 4, 8]]
    assert consecutive(["a", "b", "c"]) == [("b", "a"), ("c", "b")]


def test_chance():
    found = chance_of([4, 4, 2], 8)
    assert found.mean == pytest.approx(1 / 3)
    assert found.passed == pytest.approx((2 * (1 - 0.75**8) + 1 - 0.5**8) / 3)


SMALL = Problems(4, [Problem(0, 10, 4), Problem(1, 20, 4), Problem(4, 36, 4)])
OTHER = Problems(4, [Problem(2, 40), Problem(2, 40)])


def test_one_arm_by_hand():
    table = reasoning_table({"a": {"small": SMALL, "other": OTHER}}, resamples=50)
    small, other = table.rows
    assert (small.problems, small.samples, small.correct, small.passed) == (3, 12, 5, 2)
    assert small.mean.value == pytest.approx(5 / 12) and small.any.value == pytest.approx(2 / 3)
    assert (small.any.low, small.any.high) == wilson_interval(2, 3)
    assert small.tokens.value == pytest.approx(66 / 12)
    # Of four samples with one right, two drawn have it in half of the cases.
    assert [small.pass_at[k].value for k in (1, 2, 4)] == pytest.approx([5 / 12, 0.5, 2 / 3])
    assert small.chance is not None and small.chance.mean == 0.25 and other.chance is None
    (macro,) = table.macro
    assert macro.mean.value == pytest.approx((5 / 12 + 0.5) / 2)
    assert macro.any.value == pytest.approx((2 / 3 + 1) / 2)
    assert macro.tokens.value == pytest.approx((66 / 12 + 10) / 2)
    assert macro.pass_at[2].value == pytest.approx((0.5 + 5 / 6) / 2)
    assert table.deltas == [] and table.samples == 4


def problems(seed, number=40, n=8):
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, n + 1, number)
    return Problems(n, [Problem(int(c), int(10 * c + n)) for c in counts])


def groups(name, number):
    return Groups(np.arange(number), 300, int(fingerprint({"problems of": name}), 16))


def test_intervals_and_p_are_those_of_the_bootstrap_over_problems():
    first, second = problems(1), problems(2)
    table = reasoning_table({"a": {"x": first}, "b": {"x": second}}, resamples=300)
    rate = [np.array([one.correct for one in arm.of]) / 8 for arm in (first, second)]
    drawn = groups("x", 40)
    expected = drawn.ratio(rate[0])
    found = table.rows[0].mean
    assert (found.value, found.low, found.high) == pytest.approx(expected[:3])
    change, p = drawn.difference(rate[1], rate[0])
    (delta, macro) = table.deltas
    assert (delta.right, delta.left, delta.benchmark) == ("b", "a", "x")
    assert (delta.mean.value, delta.mean.low, delta.mean.high) == pytest.approx(change[:3])
    assert delta.mean.p == p and macro.mean == delta.mean and macro.benchmark == MACRO


def test_benchmarks_are_drawn_independently_and_the_macro_average_from_both():
    """Shifted copies: within a benchmark paired draws cancel all that two arms have in common."""
    x, y = problems(3), problems(4, 25)
    more = {
        name: Problems(8, [one._replace(tokens=one.tokens + 8) for one in of.of])
        for name, of in (("x", x), ("y", y))
    }
    table = reasoning_table({"a": {"x": x, "y": y}, "b": more}, resamples=300)
    for delta in table.deltas:
        assert (delta.tokens.value, delta.tokens.low, delta.tokens.high) == pytest.approx((1,) * 3)
        assert delta.tokens.p == 1 / 300
        assert (delta.mean.value, delta.mean.p) == (0.0, 1.0)
    means = [
        groups(name, number).times_DG @ np.array([one.correct / 8 for one in of.of]) / number
        for name, of, number in (("x", x, 40), ("y", y, 25))
    ]
    ends = np.quantile(sum(means) / 2, [0.025, 0.975])
    assert (table.macro[0].mean.low, table.macro[0].mean.high) == pytest.approx(tuple(ends))


def test_one_problem_has_no_interval():
    one = {"x": Problems(2, [Problem(1, 5)])}
    table = reasoning_table({"a": one, "b": one})
    assert (table.rows[0].mean.low, table.rows[0].mean.high) == (None, None)
    assert table.deltas[0].mean.p is None and table.macro[0].any.low is None


def test_few_problems_prove_little_however_alike_they_are():
    """All problems are better by the same, so every resample is: the signs of three, or of five in
    both benchmarks together, have a pattern like this by chance in 1 of 4, or 1 of 16, cases."""
    counts = {"x": [1, 2, 3], "y": [4, 5]}
    arms = {
        arm: {name: Problems(8, [Problem(c + more, 9) for c in of]) for name, of in counts.items()}
        for arm, more in (("a", 0), ("b", 1))
    }
    deltas = {delta.benchmark: delta for delta in reasoning_table(arms).deltas}
    assert {name: delta.mean.p for name, delta in deltas.items()} == {
        "x": 0.25, "y": 0.5, MACRO: 0.0625,
    }  # fmt: skip
    assert all(delta.tokens.p == 1.0 for delta in deltas.values())


def test_an_arm_that_is_not_there():
    with pytest.raises(DataError, match="comparison with c: no such arm; allowed: a"):
        reasoning_table({"a": {"x": SMALL}}, [("c", "a")])
