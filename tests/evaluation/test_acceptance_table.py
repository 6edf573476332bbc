"""Drafts compared on the same prompts: published averages and gaps, pairing, refusals."""

import dataclasses

import numpy as np
import pytest

from data.errors import DataError
from evaluation.acceptance import measure, read_answer
from evaluation.acceptance_report import (
    benchmark_table,
    gap_table,
    markdown_table,
    plot_averages,
    slot_table,
)
from evaluation.acceptance_table import DraftRun, acceptance_table

BENCHMARKS = ("gsm8k", "math500", "humaneval", "mbpp", "mt_bench")
# Pooled tau of four stages of one training and of the draft it is measured against.
PUBLISHED = {
    "M1": (5.86, 6.60, 5.02, 4.69, 2.76),
    "M1.5": (6.10, 6.70, 5.28, 4.90, 2.81),
    "M1.6": (6.19, 6.90, 5.87, 5.20, 3.00),
    "M1.9": (6.27, 7.18, 5.65, 5.31, 2.83),
    "M0": (6.27, 8.24, 6.72, 5.61, 3.43),
}
SAME = {"target": "t", "max_new_tokens": 2048, "backend": "local", "prompts.gsm8k": "p"}


def total(name, benchmark, tokens, cycles):
    """An answer of which only the totals are known."""
    row = {
        "id": name, "benchmark": benchmark, "tokens": tokens + 1, "cycles": cycles,
        "accepted": None, "last_uncut": None, "drafted": 15, "finish": "stop",
        "degenerate": False,
    }  # fmt: skip
    return read_answer(row, "here")


def published(name):
    """Two equal prompts per benchmark with the published pooled tau."""
    answers = [
        total(str(place), benchmark, round(100 * tau), 100)
        for benchmark, tau in zip(BENCHMARKS, PUBLISHED[name], strict=True)
        for place in range(2)
    ]
    return DraftRun(name, SAME, answers)


def test_published_averages_steps_and_gap():
    """4.99, 5.16, 5.43, 5.45 and 6.05; steps +0.17, +0.27, +0.02; about 43 % of 1.07 closed."""
    *stages, bar = map(published, PUBLISHED)
    table = acceptance_table(stages, bar)
    assert [round(row.average, 2) for row in table.rows] == [4.99, 5.16, 5.43, 5.45, 6.05]
    assert [round(row.delta.value, 2) for row in table.rows[1:4]] == [0.17, 0.27, 0.02]
    assert table.rows[0].delta is None and table.rows[0].closed == 0.0
    assert table.rows[3].closed == pytest.approx(0.433, abs=5e-4)
    assert round(table.rows[0].average_gap.value, 2) == 1.07
    assert table.rows[3].gap["math500"].value == pytest.approx(1.06)
    assert table.rows[3].gap["gsm8k"].value == pytest.approx(0.0)
    assert table.rows[4].closed == pytest.approx(1.0) and table.reference == "M0"
    assert (table.prompts["mbpp"], table.left_out) == (2, 0)
    # Equal prompts leave the bootstrap nothing to vary.
    assert table.rows[3].delta.low == pytest.approx(table.rows[3].delta.high)


def test_the_average_is_of_benchmarks_not_of_prompts():
    answers = [total("a", "gsm8k", 60, 10), *(total(str(i), "math500", 20, 10) for i in range(9))]
    table = acceptance_table([DraftRun("one", SAME, answers)])
    assert table.rows[0].average == pytest.approx(4.0)
    assert table.rows[0].closed is table.rows[0].gap is None and table.reference is None


def noisy(name, step, seed):
    """Sixty prompts of very different difficulty, `step` more accepted on each."""
    rng, own = np.random.default_rng(0), np.random.default_rng(seed)
    answers = []
    for place in range(60):
        cycles = int(rng.integers(20, 60))
        tau = rng.uniform(2, 12) + step + own.normal(0, 0.1)
        answers.append(total(str(place), "gsm8k", round(cycles * tau), cycles))
    return DraftRun(name, SAME, answers)


def test_pairing_sees_a_step_that_single_intervals_hide():
    """Their spread over prompts is 0.4 each, the step 0.2, its error after pairing 0.013."""
    table = acceptance_table([noisy("a", 0.0, 1), noisy("b", 0.2, 2)])
    first, second = table.rows
    assert first.tau_interval["gsm8k"].high > second.tau_interval["gsm8k"].low, "they overlap"
    assert second.delta.value == pytest.approx(0.2, abs=0.06)
    assert 0.1 < second.delta.low < second.delta.high < 0.3 and second.delta.p <= 1e-3
    assert second.delta == second.delta_by_benchmark["gsm8k"]
    no_step = acceptance_table([noisy("a", 0.0, 1), noisy("b", 0.0, 2)]).rows[1].delta
    assert no_step.low < 0 < no_step.high and no_step.p > 0.05


def test_the_closed_share_has_the_interval_of_the_paired_draws():
    """Half of a lead of 0.8 is closed; what makes a prompt hard cancels above and below."""
    first, bar = noisy("a", 0.0, 1), noisy("c", 0.8, 3)
    row = acceptance_table([first, noisy("b", 0.4, 2)], bar).rows[1]
    low, high = row.closed_interval
    assert low < row.closed < high and row.closed == pytest.approx(0.5, abs=0.06)
    assert 0.02 < high - low < 0.2
    table = acceptance_table([first, noisy("b", 0.4, 2)], noisy("c", 0.02, 3))
    assert table.rows[1].closed_interval is None, "the reference is ahead in some draws only"
    answers = noisy("b", 0.4, 2).answers
    assert row.cycles == {"gsm8k": sum(a.cycles for a in answers)}
    assert row.tokens == {"gsm8k": sum(a.committed for a in answers)}


def test_a_table_is_reproducible():
    runs = [noisy("a", 0.0, 1), noisy("b", 0.2, 2)]
    assert acceptance_table(runs, seed=1) == acceptance_table(runs, seed=1)
    assert acceptance_table(runs, seed=1) != acceptance_table(runs, seed=2)


def test_prompts_without_a_cycle_are_left_out_for_all():
    one = DraftRun("one", SAME, [total("a", "gsm8k", 4, 2), total("b", "gsm8k", 0, 0)])
    two = DraftRun("two", SAME, [total("a", "gsm8k", 6, 2), total("b", "gsm8k", 8, 1)])
    table = acceptance_table([one, two])
    assert table.left_out == 1 and table.rows[1].tau == {"gsm8k": 3.0}
    with pytest.raises(DataError, match="gsm8k: no prompt with a verify cycle in every run"):
        acceptance_table([dataclasses.replace(one, answers=one.answers[1:])])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target": "u"}, "a and b cannot be compared: target is 't' and 'u'"),
        ({"max_new_tokens": 64}, "max_new_tokens is 2048 and 64"),
        ({"backend": "sglang"}, "backend is 'local' and 'sglang'"),
        ({"prompts.gsm8k": "q"}, r"prompts\.gsm8k is 'p' and 'q'"),
        ({"prompts.mbpp": "q"}, r"prompts\.mbpp is None and 'q'"),
    ],
)
def test_runs_under_other_conditions_are_refused(change, message):
    other = DraftRun("b", SAME | change, noisy("b", 0, 2).answers)
    with pytest.raises(DataError, match=message):
        acceptance_table([noisy("a", 0, 1), other])
    with pytest.raises(DataError, match=message):
        acceptance_table([noisy("a", 0, 1)], other)


def test_runs_with_other_prompts_are_refused():
    whole = noisy("a", 0, 1)
    part = DraftRun("b", SAME, whole.answers[:-2])
    with pytest.raises(DataError, match=r"b lacks gsm8k 58, which a has \(and 1 more differ\)"):
        acceptance_table([whole, part])
    with pytest.raises(DataError, match="b lacks gsm8k 58"):
        acceptance_table([part, whole])
    with pytest.raises(DataError, match="runs of one name in a table: a"):
        acceptance_table([whole, whole])
    with pytest.raises(DataError, match="at least 1 run"):
        acceptance_table([])


def test_markdown():
    *stages, bar = map(published, PUBLISHED)
    text = markdown_table(acceptance_table(stages, bar))
    lines = text.splitlines()
    assert lines[0] == (
        "| run | gsm8k | math500 | humaneval | mbpp | mt_bench | average | step | p | gap closed |"
    )
    assert lines[5].startswith("| M1.9 | 6.27 [6.27, 6.27] | 7.18 ")
    assert lines[5].endswith(
        "| 5.45 [5.45, 5.45] | +0.02 [+0.02, +0.02] | 0.0005 | 43% [43%, 43%] |"
    )
    assert lines[6].startswith("| M0 (reference) |") and lines[6].endswith("| - | - | 100% |")
    gaps = gap_table(acceptance_table(stages, bar)).splitlines()
    assert gaps[3] == "| math500 | M1.9 | 7.18 | 8.24 | +1.06 [+1.06, +1.06] |"
    assert gaps[4].startswith("| humaneval | M1.6 | 5.87 | 6.72 | +0.85 ")
    assert gap_table(acceptance_table(stages)) == ""


def test_tables_of_one_draft_and_the_plot(tmp_path):
    row = {
        "id": "a", "benchmark": "b", "tokens": 5, "cycles": 2, "accepted": [2, 2], "drafted": 3,
        "last_uncut": 3, "finish": "length", "degenerate": True,
    }  # fmt: skip
    found = measure([read_answer(row, "here")])
    assert benchmark_table({"b": found}).splitlines()[2] == (
        "| b | 1 | 1 | 0 | 5 | 2 | 2.00 | 2.00 | 2.50 | 2.50 | 1 | 1 | - |"
    )
    assert slot_table(found.slots).splitlines()[3:] == [
        "| 2 | 2 | 1 | 0.500 [0.095, 0.905] | 0.500 |", "| 3 | 0 | 0 | - | - |",
    ]  # fmt: skip
    table = acceptance_table([noisy("a", 0, 1), noisy("b", 0.2, 2)])
    taus = {row.name: row.tau for row in table.rows}
    intervals = {row.name: {**row.tau_interval} for row in table.rows}
    intervals["b"]["gsm8k"] = None
    plot_averages(tmp_path / "taus.png", taus, intervals)
    assert (tmp_path / "taus.png").read_bytes().startswith(b"\x89PNG")
