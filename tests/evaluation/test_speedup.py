"""Speed-up of hand-made timings."""

import numpy as np
import pytest

from data.errors import DataError
from evaluation.speedup import Timing, measure_speedup
from evaluation.statistics import bootstrap_interval, bootstrap_ratio


def timing(plain_s, speculative_s, plain_tokens, tokens):
    return Timing(plain_s, speculative_s, plain_tokens, tokens, 1, plain_tokens == tokens)


def test_the_interval_is_of_the_ratio_of_rates():
    """Answers of one prompt differ in length by chance: all four columns are drawn together."""
    rng = np.random.default_rng(0)
    rows = [
        timing(plain / 10, tokens / 20 * rng.uniform(0.8, 1.2), plain, tokens)
        for plain, tokens in rng.integers(20, 200, (40, 2)).tolist()
    ]
    found = measure_speedup(rows, seed=3)
    tokens, seconds = sum(r.tokens for r in rows), sum(r.speculative_s for r in rows)
    assert found.value == pytest.approx(tokens / seconds / 10)
    picks = np.random.Generator(np.random.Philox(key=3))
    draws = []
    for _ in range(1000):
        drawn = [rows[place] for place in picks.integers(0, 40, 40)]
        fast = sum(r.tokens for r in drawn) / sum(r.speculative_s for r in drawn)
        draws.append(fast / (sum(r.plain_tokens for r in drawn) / sum(r.plain_s for r in drawn)))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(draws, [0.025, 0.975])))
    assert found.low < found.value < found.high and found.different > 0


def test_of_equal_answers_it_is_the_ratio_of_times():
    rng = np.random.default_rng(1)
    rows = [timing(p, s, 50, 50) for p, s in rng.uniform(1, 3, (20, 2)).tolist()]
    found = measure_speedup(rows, seed=1)
    ratio = bootstrap_ratio([r.plain_s for r in rows], [r.speculative_s for r in rows], seed=1)
    assert (found.value, found.low, found.high) == pytest.approx(
        (ratio.value, ratio.low, ratio.high)
    )


def test_one_prompt_has_no_interval_and_none_no_value():
    found = measure_speedup([timing(4.0, 2.0, 10, 10)])
    assert (found.value, found.low, found.high) == (2.0, None, None)
    with pytest.raises(DataError, match="at least 1 timed prompt"):
        measure_speedup([])
    with pytest.raises(DataError, match="at least 1 row"):
        bootstrap_interval([], lambda sums: sums[:, 0])
