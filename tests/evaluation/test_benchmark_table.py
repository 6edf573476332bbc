"""Tables of benchmarks: the published ones from their counts, and paired ones by hand."""

import math

import pytest

from data.errors import DataError
from evaluation.benchmark_report import comparison_markdown, comparison_text, plot_table
from evaluation.benchmark_table import BenchmarkRun, Result, benchmark_table, pair
from evaluation.rate_differences import Pairs, two_rate_z
from evaluation.statistics import wilson_interval
from modes.benchmark_table import read_counts
from tests.support import ROOT

PUBLISHED = ROOT / "docs" / "published"


def row(number, correct, prompt="p", **more):
    return {
        "id": f"i{number}", "prompt_hash": f"{prompt}{number}", "correct": correct, "error": None,
        "finish": "stop", "num_tokens": 10, "work": None, **more,
    }  # fmt: skip


def result(right, **about):
    """`right` has a character per item: 1 is right."""
    return Result.of_rows([row(n, mark == "1") for n, mark in enumerate(right)], **about)


def cells(markdown, run, benchmark):
    (line,) = [line for line in markdown.splitlines() if line.startswith(f"| {run} | {benchmark} ")]
    return line.strip("| ").split(" | ")


def test_the_published_tables_from_their_counts():
    """Accuracies and differences as in the published cards, with the intervals that it lacks."""
    stage2 = read_counts(PUBLISHED / "qwen3_4b_stage2_step7335.json")
    stage3 = read_counts(PUBLISHED / "qwen3_4b_stage3_nce_step8706.json")
    table = benchmark_table([stage3], stage2)
    text = comparison_markdown(table)
    published = {
        "gsm8k": ("1319", "1053", "79.83 %", "82.64 %", "-2.81", -1.85),
        "math500": ("500", "240", "48.00 %", "51.00 %", "-3.00", -0.95),
        "humaneval": ("164", "92", "56.10 %", "60.98 %", "-4.88", -0.90),
        "gpqa_diamond": ("193", "70", "36.27 %", "36.27 %", "0.00", 0.0),
    }
    rows = {(one.run, one.benchmark): one for one in table.rows}
    for name, (items, correct, accuracy, baseline, delta, z) in published.items():
        found = cells(text, stage3.name, name)
        assert found[2:5] == [items, correct, accuracy] and found[6] == delta
        assert cells(text, stage2.name, name)[4] == baseline
        assert found[8].endswith(" (unpaired z)") and found[9] == "-"
        one = rows[stage3.name, name]
        assert one.interval == wilson_interval(int(correct), int(items)) and one.pairs is None
        bar = rows[stage2.name, name]
        assert bar.delta is None
        assert two_rate_z(one.correct, one.items, bar.correct, bar.items) == pytest.approx(
            z, abs=0.006
        )
        assert one.delta.p == pytest.approx(math.erfc(abs(z) / math.sqrt(2)), abs=0.006)
        assert one.delta.low < one.delta.value < one.delta.high
        # None of the four differences can be told from nothing.
        assert one.delta.low < 0.0 < one.delta.high
    assert "| p | TPF |" in text
    (note,) = table.notes
    assert note.startswith(f"{stage3.name}, gsm8k, math500, humaneval, gpqa_diamond: only counts")
    assert "McNemar's test needs the answers to the same items" in note
    # By hand for 1053 of 1319: centre (p + z^2/2n) / (1 + z^2/n), half width 0.0216.
    assert cells(text, stage3.name, "gsm8k")[5] == "[77.58, 81.91]"


def test_a_paired_table_by_hand():
    ours = result("1111 0110 1".replace(" ", ""), grader="g")
    bar = result("1100 1000 0".replace(" ", ""), grader="g")
    table = benchmark_table([BenchmarkRun("new", {"a": ours})], BenchmarkRun("old", {"a": bar}))
    base, one = table.rows
    assert (base.run, base.accuracy, base.delta) == ("old", 3 / 9, None)
    assert one.pairs == Pairs(both=2, only_first=5, only_second=1, neither=1)
    assert one.delta.value == pytest.approx(4 / 9)
    assert one.delta.p == pytest.approx(2 * (1 + 6) / 2**6)
    text = comparison_text(table)
    assert "McNemar p" in text and "+44.44" in text and "0.22" in text and "unpaired" not in text


def test_only_shared_items_are_compared_and_the_rest_is_said():
    ours = result("11100", settings={"max_new_tokens": 5}, expected=9)
    theirs = Result.of_rows([row(n, n == 9) for n in (1, 2, 8, 9)], settings={"max_new_tokens": 7})
    runs = [BenchmarkRun("new", {"a": ours, "b": result("1")})]
    table = benchmark_table(runs, BenchmarkRun("old", {"a": theirs}))
    one = next(row for row in table.rows if (row.run, row.benchmark) == ("new", "a"))
    assert (one.items, one.correct, one.accuracy) == (5, 3, 0.6)
    assert one.pairs == Pairs(0, 2, 0, 0) and one.delta.value == 1.0
    assert table.notes == [
        "new, a: 3 items are only here and 2 only in the baseline; delta is over the 2 that both"
        " have",
        "new, a: max_new_tokens is 5 here and 7 in the baseline",
        "new, a: 5 items; the complete benchmark has 9",
    ]
    alone = next(row for row in table.rows if row.benchmark == "b")
    assert alone.delta is None and cells(comparison_markdown(table), "new", "b")[6] == "-"


def test_errors_and_capped_answers_are_said():
    rows = [row(0, True), row(1, False, error="no room", finish=""), row(2, False, finish="length")]
    ours = BenchmarkRun("new", {"a": Result.of_rows(rows)})
    table = benchmark_table([ours], BenchmarkRun("old", {"a": result("111")}))
    assert table.notes == [
        "new, a: 1 items have no answer and count as wrong",
        "new, a: 1 of 3 answers were ended by the limit",
    ]


def test_tokens_per_forward_are_pooled_over_answers_that_were_counted():
    rows = [row(0, True, work={"nfe": 4.0}), row(1, True, work={"nfe": 6.0}, num_tokens=5),
            row(2, True), row(3, True, work={"flips": 1.0})]  # fmt: skip
    ours = BenchmarkRun("new", {"a": Result.of_rows(rows)})
    base, one = benchmark_table([ours], BenchmarkRun("old", {"a": result("1111")})).rows
    assert one.tokens_per_forward == 1.5 and base.tokens_per_forward is None


def test_other_prompts_are_refused():
    ours = {one["id"]: one for one in (row(0, True), row(1, True, prompt="q"))}
    theirs = {one["id"]: one for one in (row(0, True), row(1, True))}
    with pytest.raises(DataError, match=r"new, a: item 'i1' had another prompt in the baseline"):
        pair(ours, theirs, "new, a")
    with pytest.raises(DataError, match="new, a: no item in common"):
        pair({"x": row(0, True)}, theirs, "new, a")


@pytest.mark.parametrize(
    ("runs", "message"),
    [
        ([("new", {"b": result("1")})], "new and old have no benchmark in common: b, and a"),
        ([("old", {"a": result("1")})], "a benchmark table: two runs are called old"),
        ([], "a benchmark table: no run beside the baseline"),
        ([("new", {"a": result("1", grader="h")})], "a was graded by 'h' and None; allowed"),
    ],
)
def test_what_cannot_be_compared(runs, message):
    with pytest.raises(DataError, match=message):
        benchmark_table(
            [BenchmarkRun(*run) for run in runs], BenchmarkRun("old", {"a": result("1")})
        )


def test_counts_beside_rows_are_unpaired_and_the_picture_is_drawn(tmp_path):
    runs = [BenchmarkRun("rows", {"a": result("1101"), "b": result("11")})]
    table = benchmark_table(runs, BenchmarkRun("paper", {"a": Result(1, 4), "b": Result(0, 2)}))
    assert all(row.pairs is None for row in table.rows)
    assert [row.delta.value for row in table.rows[2:]] == [0.5, 1.0]
    plot_table(tmp_path / "a.png", table)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
