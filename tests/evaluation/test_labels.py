"""The audit of labels: every figure by hand."""

import io

import pytest

from data.errors import DataError
from evaluation.labels import (
    ALL,
    LATEX,
    audit_labels,
    histogram,
    language_detector,
    metrics_of,
    prose,
    rate,
    summary,
    unit_of,
)
from evaluation.labels_plot import plot_lengths
from evaluation.row_counts import count_metrics, counts_table
from evaluation.statistics import wilson_interval


def row(source, response, ids=None, finish=None):
    more = {} if ids is None else {"response_ids": ids}
    more |= {} if finish is None else {"finish": finish}
    return {"id": response, "source": source, "prompt": "p", "response": response, **more}


ROWS = [
    row("math", r"So $x = \frac{1}{2}$, thus \boxed{x}", [1, 2, 3], "stop"),
    row("math", r"\[ a \] and \(b\) are \boxedless", [5] * 40, "length"),
    row("math", "one two", [7] * 7),
    row("chat", "", [], "stop"),
]


@pytest.mark.parametrize(
    ("text", "marks"),
    [
        ("It was $5 and is $10 now.", 0),
        ("Between $5-$10, or $3.", 0),
        ("$x$ and $y + 1$ for $5", 2),
        ("$$x = 1$$", 2),
        (r"$\frac{1}{2}$ is \(0.5\)", 4),
        ("5$ a piece", 0),
    ],
)
def test_prices_are_no_mathematics(text, marks):
    assert len(LATEX.findall(text)) == marks


def test_figures_by_hand():
    labels = audit_labels(ROWS)
    assert list(labels) == ["chat", "math", ALL] and unit_of(labels) == "tokens"
    found = summary(labels["math"], "tokens")
    assert (found["rows"], found["unit"], found["max"]) == (3, "tokens", 40)
    assert found["mean"] == pytest.approx(50 / 3) and found["median"] == 7
    # Quantiles between order statistics 3, 7, 40.
    assert found["p10"] == pytest.approx(3.8) and found["p90"] == pytest.approx(33.4)
    # $...$ \frac \boxed; \[ \] \( \) \boxedless; nothing.
    assert found["latex_per_answer"] == pytest.approx((3 + 5 + 0) / 3)
    assert found["boxed"]["successes"] == 1 and found["degenerate"]["successes"] == 1
    low, high = wilson_interval(1, 2)
    assert found["capped"] == {
        "rate": 0.5, "successes": 1, "trials": 2, "low": low, "high": high,
    }  # fmt: skip
    assert found["finish_unknown"] == 1 and found["languages"] == {}
    total = summary(labels[ALL], "tokens")
    assert (total["rows"], total["empty"], total["capped"]["trials"]) == (4, 1, 3)
    assert total["mean"] == 12.5


def test_words_are_counted_where_an_answer_has_no_tokens():
    labels = audit_labels([*ROWS, row("math", "a b c")])
    assert unit_of(labels) == "words"
    found = summary(labels["math"], "words")
    assert found["max"] == 7 and found["rows"] == 4


def test_looping_is_judged_on_tokens_and_else_on_words():
    loop = "so it is " * 20
    labels = audit_labels([row("a", loop), row("b", loop, list(range(9))), row("c", "x", [1] * 40)])
    assert [labels[name].degenerate for name in "abc"] == [1, 0, 1]


def test_no_answer_says_how_it_ended():
    found = summary(audit_labels([row("a", "x")])["a"], "words")
    nothing = {"rate": None, "successes": 0, "trials": 0, "low": None, "high": None}
    assert found["capped"] == rate(0, 0) == nothing
    metrics = metrics_of({"a": found})
    assert metrics["a/capped"] != metrics["a/capped"] and metrics["a/boxed"] == 0.0


def test_languages_of_a_share_of_the_rows():
    rows = [row("a", f"text {n}") for n in range(400)]
    languages = audit_labels(rows, detect=lambda text: "en", language_share=0.25)["a"].languages
    assert 60 < languages["en"] < 140
    assert (
        languages
        == audit_labels(rows[::-1], detect=lambda t: "en", language_share=0.25)[ALL].languages
    )


def test_code_and_formulas_are_no_prose():
    text = "Wir rechnen $x^2$ und\n```python\nfor x in y: pass\n```\ndann `x` aus \\[y\\] \\pi ."
    assert prose(text) == "Wir rechnen und dann aus ."
    assert prose("open ```code") == "open"
    assert len(prose("a " * 5000)) == 1000


def test_the_detector_is_seeded_and_says_when_it_does_not_know():
    pytest.importorskip("langdetect")
    detect = language_detector()
    assert detect("The train leaves at noon and arrives in the evening.") == "en"
    assert detect("Der Zug fährt am Mittag ab und kommt am Abend an.") == "de"
    assert detect("") == detect("123 456") == "unknown"
    assert len({detect("Le train part à midi.") for _ in range(5)}) == 1


def test_a_source_called_like_the_sum():
    with pytest.raises(DataError, match="source 'all': is the name of the sum"):
        audit_labels([row("all", "x")])


def test_histogram_by_hand():
    assert histogram([0, 1, 1, 3], bins=3) == ([1, 2, 1], [0.0, 1.0, 2.0, 3.0])
    assert histogram([0]) == ([1], [0.0, 1.0])
    counts, edges = histogram(list(range(1000)))
    assert sum(counts) == 1000 and len(counts) == 40 and edges[-1] == 999


def test_the_picture_is_drawn():
    file = io.BytesIO()
    plot_lengths(file, {"a": [1, 2, 3], "b": [5], ALL: [1, 2, 3, 5]}, "words")
    assert file.getvalue().startswith(b"\x89PNG")


def test_row_counts_as_table_and_metrics():
    counts = {"in": {"a": 3, "b": 2}, "out": {"a": 1}, "removed": {"x": {"a": 2, "b": 2}}}
    lines = counts_table("T", counts).splitlines()
    assert [line.split() for line in lines if not line.startswith("-")] == [
        ["T", "in", "x", "out"], ["a", "3", "2", "1"], ["b", "2", "2", "0"],
        ["all", "5", "4", "1"],
    ]  # fmt: skip
    assert count_metrics(counts) == {
        "rows_in": 5, "rows_out": 1, "removed/x": 4, "a/in": 3, "a/out": 1, "b/in": 2, "b/out": 0,
    }  # fmt: skip
