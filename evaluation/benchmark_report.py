"""Benchmarks as a text table, as Markdown and as a picture."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.benchmark_run import Score
from evaluation.benchmark_table import BenchmarkTable, TableRow
from evaluation.tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

UNPAIRED = " (unpaired z)"
SAID = (
    "acc: items that are right, with the 95 % interval of a rate (Wilson). delta: percentage points"
    " to the baseline, with a 95 % interval (Newcombe). TPF: tokens per forward pass."
)
PAIRED = "p: McNemar's exact test, two-sided, over the items on which the two differ."


def score_cells(scores: Mapping[str, Score]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the scores of one model."""
    header = ["benchmark", "n", "correct", "acc", "Wilson 95 %", "no answer", "capped", "NFE",
              "TPF", "tokens/s"]  # fmt: skip
    rows = [
        [
            name, str(one.items), str(one.correct), _percent(one.accuracy),
            _between(one.low, one.high), str(one.errors), _percent(one.capped_rate),
            _plain(one.nfe, 1), _plain(one.tokens_per_forward), _plain(one.tokens_per_s, 1),
        ]
        for name, one in scores.items()
    ]  # fmt: skip
    return header, rows


def table_cells(table: BenchmarkTable) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a comparison."""
    compared = [row for row in table.rows if row.delta is not None]
    p = "McNemar p" if all(row.pairs is not None for row in compared) else "p"
    header = ["run", "benchmark", "n", "correct", "acc", "Wilson 95 %", "delta pp", "95 % of delta",
              p, "TPF"]  # fmt: skip
    return header, [_cells(row) for row in table.rows]


def _cells(row: TableRow) -> list[str]:
    counts = [row.run, row.benchmark, str(row.items), str(row.correct), _percent(row.accuracy)]
    counts.append(_between(*row.interval))
    if row.delta is None:
        return [*counts, "-", "-", "-", _plain(row.tokens_per_forward)]
    p = f"{row.delta.p:.2g}" + ("" if row.pairs is not None else UNPAIRED)
    ends = f"[{_points(row.delta.low)}, {_points(row.delta.high)}]"
    return [*counts, _points(row.delta.value), ends, p, _plain(row.tokens_per_forward)]


def comparison_text(table: BenchmarkTable) -> str:
    """The table for a terminal, and what has to be said."""
    return text_table(*table_cells(table)) + "\n" + _notes(table)


def comparison_markdown(table: BenchmarkTable) -> str:
    """The same as Markdown."""
    return markdown(*table_cells(table)) + "\n" + _notes(table)


def _notes(table: BenchmarkTable) -> str:
    paired = [PAIRED] if any(row.pairs is not None for row in table.rows) else []
    said = [f"baseline: {table.baseline}. {SAID}", *paired, *table.notes]
    return "\n".join(f"- {line}" for line in said) + "\n"


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its numbers to the right."""
    rule = ["---", *(["---:"] * (len(header) - 1))]
    return "".join(f"| {' | '.join(line)} |\n" for line in (header, rule, *rows))


def plot_table(path: Path, table: BenchmarkTable) -> None:
    """Left the accuracies with their intervals, right the differences to the baseline."""
    from matplotlib.figure import Figure

    benchmarks = list(dict.fromkeys(row.benchmark for row in table.rows))
    runs = list(dict.fromkeys(row.run for row in table.rows))
    height = 1.5 + 0.35 * len(benchmarks) * len(runs)
    figure = Figure(figsize=(10, height), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for row in table.rows:
        color = f"C{runs.index(row.run) % 10}"
        at = benchmarks.index(row.benchmark) + (runs.index(row.run) + 1) / (len(runs) + 1) - 0.5
        label = row.run if row.benchmark == benchmarks[0] else None
        _whisker(left, at, (row.accuracy, *row.interval), color, label)
        if row.delta is not None:
            _whisker(right, at, row.delta[:3], color, None)
    left.set_yticks(range(len(benchmarks)), benchmarks)
    left.invert_yaxis()
    left.set_xlabel("accuracy, %")
    right.set_xlabel(f"difference to {table.baseline}, percentage points")
    right.axvline(0.0, color="grey", linewidth=0.8, linestyle=":")
    left.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _whisker(
    axis: "Axes",
    at: float,
    value_low_high: tuple[float, float, float],
    color: str,
    label: str | None,
) -> None:
    value, low, high = (100 * share for share in value_low_high)
    axis.errorbar(
        [value], [at], xerr=[[max(0.0, value - low)], [max(0.0, high - value)]],
        color=color, label=label, marker="o", capsize=3, linestyle="",
    )  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _points(share: float) -> str:
    """Percentage points; rounding leaves no minus before nothing."""
    text = f"{100 * share:+.2f}"
    return "0.00" if text in ("+0.00", "-0.00") else text


def _between(low: float, high: float) -> str:
    return f"[{100 * low:.2f}, {100 * high:.2f}]"


def _plain(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"
