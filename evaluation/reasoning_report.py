"""Reasoning evaluations as text tables, as Markdown and as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.benchmark_report import markdown
from evaluation.reasoning import MACRO, Change, ReasoningTable, Value
from evaluation.tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Cells = tuple[list[str], list[list[str]]]


def arm_cells(table: ReasoningTable) -> Cells:
    """Header and rows of arms and benchmarks."""
    n = table.samples
    header = ["Arm", "Benchmark", f"Mean@{n}", "Correct / Samples", f"Pass@{n} Any",
              "Pass / Problems", "Avg Completion Tokens", f"95 % of Mean@{n}", f"95 % of Pass@{n}",
              f"Chance Mean@{n}", f"Chance Pass@{n}"]  # fmt: skip
    return header, [
        [
            row.arm, row.benchmark, _six(row.mean.value), f"{row.correct} / {row.samples}",
            _six(row.any.value), f"{row.passed} / {row.problems}", f"{row.tokens.value:.1f}",
            _between(row.mean), _between(row.any),
            _six(row.chance.mean if row.chance else None),
            _six(row.chance.passed if row.chance else None),
        ]
        for row in table.rows
    ]  # fmt: skip


def macro_cells(table: ReasoningTable) -> Cells:
    """Header and rows of the macro averages."""
    n = table.samples
    header = ["Arm", f"Macro Mean@{n}", f"Macro Pass@{n} Any", "Macro Avg Completion Tokens",
              f"95 % of Mean@{n}", f"95 % of Pass@{n}"]  # fmt: skip
    return header, [
        [row.arm, _six(row.mean.value), _six(row.any.value), f"{row.tokens.value:.1f}",
         _between(row.mean), _between(row.any)]
        for row in table.macro
    ]  # fmt: skip


def delta_cells(table: ReasoningTable) -> Cells:
    """Header and rows of the comparisons, right minus left."""
    n = table.samples
    header = ["Comparison", "Benchmark", f"Mean@{n} Delta", f"Pass@{n} Any Delta",
              "Avg Token Delta", "95 % of Mean", "p", "95 % of Pass", "p", "95 % of Tokens",
              "p"]  # fmt: skip
    return header, [
        [
            f"{row.right} vs {row.left}", row.benchmark, f"{row.mean.value:+.6f}",
            f"{row.any.value:+.6f}", f"{row.tokens.value:+.1f}",
            _between(row.mean, "+.4f"), _p(row.mean), _between(row.any, "+.4f"), _p(row.any),
            _between(row.tokens, "+.1f"), _p(row.tokens),
        ]
        for row in table.deltas
    ]  # fmt: skip


def pass_cells(table: ReasoningTable) -> Cells:
    """Header and rows of Pass@k for k up to n."""
    ks = list(table.macro[0].pass_at)
    return ["Arm", "Benchmark", *(f"Pass@{k}" for k in ks)], [
        [row.arm, name, *(_six(row.pass_at[k].value) for k in ks)]
        for name, row in table.every_row()
    ]


def said(table: ReasoningTable) -> list[str]:
    """What a reader must know, a sentence each."""
    n, lines = table.samples, []
    lines.append(
        f"Mean@{n}: right samples of all. Pass@{n} Any: problems with a right sample. Pass@k: the"
        " unbiased estimate, which at k = 1 is the mean. Macro: unweighted means over benchmarks."
    )
    lines.append(
        f"95 %: {table.resamples} resamples of whole problems, percentiles (Pass@{n} of an arm:"
        " Wilson). Comparisons are right minus left on the same problems; p: twice the smaller"
        f" share of resamples on either side of zero, not below 1/{table.resamples}, nor below"
        " 2^(1 - m) where m problems differ."
    )
    if any(row.mean.low == row.mean.high for row in table.rows):
        lines.append("An interval of resamples has no width where all problems came out alike.")
    if any(row.chance for row in table.rows):
        lines.append(
            "Chance: of guessing among c choices, the means of 1/c and of 1 - (1 - 1/c)^"
            f"{n}. A Pass@{n} below the latter is no evidence of skill."
        )
    return [*lines, *table.notes]


def report_text(table: ReasoningTable) -> str:
    """All tables for a terminal."""
    parts = [text_table(*cells) for _, cells in _sections(table)]
    return "\n\n".join(parts) + "\n\n" + _listed(table)


def report_markdown(table: ReasoningTable, title: str) -> str:
    """The same as Markdown."""
    parts = [f"## {name}\n\n{markdown(*cells)}" for name, cells in _sections(table)]
    return f"# {title}\n\n" + "\n".join(parts) + "\n" + _listed(table)


def _sections(table: ReasoningTable) -> list[tuple[str, Cells]]:
    sections = [
        ("Arms and benchmarks", arm_cells(table)),
        ("Macro averages", macro_cells(table)),
        ("Pass@k", pass_cells(table)),
    ]
    if table.deltas:
        sections.insert(2, ("Direct comparisons", delta_cells(table)))
    return sections


def _listed(table: ReasoningTable) -> str:
    return "".join(f"- {line}\n" for line in said(table))


def plot_reasoning(path: Path, table: ReasoningTable) -> None:
    """Mean@n above and Pass@n below, benchmarks side by side, arms by colour, chance as ticks."""
    from matplotlib.figure import Figure

    benchmarks = [*dict.fromkeys(row.benchmark for row in table.rows), MACRO]
    arms = [row.arm for row in table.macro]
    width = 2 + 0.35 * len(benchmarks) * (len(arms) + 1)
    figure = Figure(figsize=(max(6.0, width), 7), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for name, row in table.every_row():
        number = arms.index(row.arm)
        at = benchmarks.index(name) + (number + 1) / (len(arms) + 1) - 0.5
        label = row.arm if name == MACRO else None
        _whisker(above, at, row.mean, f"C{number % 10}", label)
        _whisker(below, at, row.any, f"C{number % 10}", None)
    for row in table.rows:
        if row.chance and row.arm == arms[0]:
            _chance(above, benchmarks.index(row.benchmark), row.chance.mean)
            _chance(below, benchmarks.index(row.benchmark), row.chance.passed)
    below.set_xticks(range(len(benchmarks)), benchmarks)
    above.set_ylabel(f"Mean@{table.samples}")
    below.set_ylabel(f"Pass@{table.samples}")
    for axis in (above, below):
        axis.set_ylim(bottom=0.0)
        axis.grid(axis="y", alpha=0.3)
    above.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _whisker(axis: "Axes", at: float, one: Value, color: str, label: str | None) -> None:
    low, high = (one.value if end is None else end for end in (one.low, one.high))
    # Percentiles need not enclose the value.
    lengths = [[max(0.0, one.value - low)], [max(0.0, high - one.value)]]
    axis.errorbar([at], [one.value], yerr=lengths, color=color, label=label, marker="o",
                  capsize=3, linestyle="")  # fmt: skip


def _chance(axis: "Axes", place: int, rate: float) -> None:
    axis.hlines(rate, place - 0.45, place + 0.45, color="grey", linewidth=0.8, linestyle=":")


def _six(value: float | None) -> str:
    return "-" if value is None else f"{value:.6f}"


def _between(one: Value | Change, form: str = ".4f") -> str:
    if one.low is None or one.high is None:
        return "-"
    return f"[{one.low:{form}}, {one.high:{form}}]"


def _p(one: Change) -> str:
    return "-" if one.p is None else f"{one.p:.2g}"
