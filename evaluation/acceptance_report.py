"""Acceptance as Markdown and as a picture: tables of drafts, bars with intervals, slots."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.acceptance import Acceptance, SlotAcceptance
from evaluation.acceptance_table import AcceptanceTable, Difference
from evaluation.speedup import Speedup
from evaluation.statistics import Interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

NOTE = (
    "tau: tokens per verify cycle without the prefill's token, pooled over all cycles, with a 95 %"
    " bootstrap interval over prompts; macro: mean over answers; as served: the prefill's token"
    " counted; uncut: the last cycle before the end token or the limit cut it. The ceiling is one"
    " more than the drafted tokens of a cycle. By position: Wilson intervals, which take cycles for"
    " independent."
)


def write_report(
    folder: Path,
    label: str,
    found: Mapping[str, Mapping[str, Acceptance]],
    speedup: Mapping[str, Speedup],
    failed: int,
    table: AcceptanceTable | None,
) -> str:
    """acceptance.md and acceptance.png of one measurement; returns the text.

    Args:
        folder: of the run.
        label: what the draft is called.
        found: acceptance by draft and benchmark.
        speedup: by benchmark.
        failed: prompts without an answer.
        table: the draft beside its reference.
    """
    parts = [f"# {label}", NOTE, f"Prompts without an answer: {failed}."]
    for draft, by_benchmark in found.items():
        parts += [f"## {draft}", benchmark_table(by_benchmark)]
        for benchmark, one in by_benchmark.items():
            if one.slots:
                parts += [f"### {draft}: {benchmark}, by position", slot_table(one.slots)]
    if speedup:
        parts += ["## Speed at batch 1", speed_table(speedup)]
    if table is not None:
        parts += ["## Against the reference", markdown_table(table), gap_table(table)]
    text = "\n\n".join(part.strip() for part in parts) + "\n"
    (folder / "acceptance.md").write_text(text, encoding="utf-8")
    taus = {d: {k: one.tau or 0.0 for k, one in ones.items()} for d, ones in found.items()}
    ends = {d: {k: _ends(one) for k, one in ones.items()} for d, ones in found.items()}
    plot_averages(folder / "acceptance.png", taus, ends)
    return text


def _ends(found: Acceptance) -> Interval | None:
    if found.tau_low is None or found.tau_high is None:
        return None
    return Interval(found.tau_low, found.tau_high)


def speed_table(speedup: Mapping[str, Speedup]) -> str:
    """Tokens per second with and without the draft."""
    header = ["benchmark", "prompts", "plain tokens/s", "tokens/s", "speed-up", "other answers"]
    lines = [header, ["---", *(["---:"] * (len(header) - 1))]]
    for name, one in speedup.items():
        value = f"{one.value:.2f}"
        if one.low is not None and one.high is not None:
            value += f" [{one.low:.2f}, {one.high:.2f}]"
        rates = [f"{one.plain_tokens_per_s:.1f}", f"{one.tokens_per_s:.1f}"]
        lines.append([name, str(one.prompts), *rates, value, str(one.different)])
    return _markdown(lines)


def benchmark_table(found: Mapping[str, Acceptance]) -> str:
    """One row per benchmark of one draft, with every count."""
    header = ["benchmark", "prompts", "answers", "no cycle", "tokens", "cycles", "tau", "macro",
              "as served", "uncut", "capped", "loops", "tau without loops"]  # fmt: skip
    lines = [header, ["---", *(["---:"] * (len(header) - 1))]]
    for name, one in found.items():
        tau = _plain(one.tau)
        if one.tau_low is not None and one.tau_high is not None:
            tau += f" [{one.tau_low:.2f}, {one.tau_high:.2f}]"
        counts = [one.prompts, one.answers, one.without_cycles, one.tokens, one.cycles]
        rates = [_plain(one.tau_macro), _plain(one.tau_served), _plain(one.tau_uncut)]
        lines.append([name, *map(str, counts), tau, *rates, str(one.capped), str(one.degenerate),
                      _plain(one.tau_without_degenerate)])  # fmt: skip
    return _markdown(lines)


def slot_table(slots: Sequence[SlotAcceptance]) -> str:
    """Acceptance by position in the block."""
    lines = [["draft", "reached", "accepted", "given the ones before", "cumulative"], ["---:"] * 5]
    for slot in slots:
        rate = _plain(slot.conditional, 3)
        if slot.conditional_low is not None and slot.conditional_high is not None:
            rate += f" [{slot.conditional_low:.3f}, {slot.conditional_high:.3f}]"
        counts = [str(slot.slot), str(slot.reached), str(slot.accepted)]
        lines.append([*counts, rate, _plain(slot.cumulative, 3)])
    return _markdown(lines)


def markdown_table(table: AcceptanceTable) -> str:
    """The table in the form of a training journey: benchmarks, average, step, gap closed."""
    benchmarks = list(table.prompts)
    header = ["run", *benchmarks, "average", "step", "p", "gap closed"]
    lines = [header, ["---", *(["---:"] * (len(header) - 1))]]
    for row in table.rows:
        is_reference = row.name == table.reference
        step = "-" if is_reference else _signed(row.delta)
        closed = "-" if row.closed is None else f"{row.closed:.0%}"
        if row.closed_interval is not None and not is_reference and row.delta is not None:
            closed += f" [{row.closed_interval.low:.0%}, {row.closed_interval.high:.0%}]"
        p = "-" if is_reference or row.delta is None else f"{row.delta.p:.2g}"
        cells = [_with_interval(row.tau[key], row.tau_interval[key]) for key in benchmarks]
        average = _with_interval(row.average, row.average_interval)
        label = f"{row.name} (reference)" if is_reference else row.name
        lines.append([label, *cells, average, step, p, closed])
    return _markdown(lines)


def gap_table(table: AcceptanceTable) -> str:
    """What is left to the reference: best run, reference and gap, by benchmark; "" without one."""
    if table.reference is None:
        return ""
    *runs, bar = table.rows
    lines = [["benchmark", "best run", "tau", bar.name, "gap (95 % interval)"], ["---"] * 5]
    for key in table.prompts:
        best = max(runs, key=lambda row, key=key: row.tau[key])  # type: ignore[misc]
        assert best.gap is not None
        cells = [key, best.name, f"{best.tau[key]:.2f}", f"{bar.tau[key]:.2f}"]
        lines.append([*cells, _signed(best.gap[key])])
    return _markdown(lines)


def plot_averages(
    path: Path,
    taus: Mapping[str, Mapping[str, float]],
    intervals: Mapping[str, Mapping[str, Interval | None]],
) -> None:
    """Bars of pooled tau by benchmark, one colour per draft, with 95 % intervals.

    Args:
        path: the PNG to write.
        taus: pooled tau by draft and benchmark.
        intervals: of these; None draws no whisker.
    """
    from matplotlib.figure import Figure

    benchmarks = list(next(iter(taus.values())))
    figure = Figure(figsize=(1.5 + 1.6 * len(benchmarks), 4), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(taus)
    for place, (draft, values) in enumerate(taus.items()):
        at = [group + (place - (len(taus) - 1) / 2) * width for group in range(len(benchmarks))]
        _bars(axis, at, width, [values[key] for key in benchmarks],
              [intervals[draft][key] for key in benchmarks], draft)  # fmt: skip
    axis.set_xticks(range(len(benchmarks)), benchmarks)
    axis.set_ylabel("tokens per verify cycle")
    axis.axhline(1.0, color="grey", linewidth=0.8, linestyle=":")
    axis.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _bars(
    axis: "Axes",
    at: Sequence[float],
    width: float,
    values: Sequence[float],
    intervals: Sequence[Interval | None],
    label: str,
) -> None:
    ends = [found or (value, value) for found, value in zip(intervals, values, strict=True)]
    below = [value - low for (low, _), value in zip(ends, values, strict=True)]
    above = [high - value for (_, high), value in zip(ends, values, strict=True)]
    axis.bar(at, values, width, yerr=[below, above], capsize=3, label=label)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _plain(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _with_interval(value: float, interval: Interval) -> str:
    return f"{value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _signed(difference: Difference | None) -> str:
    if difference is None:
        return "-"
    return f"{difference.value:+.2f} [{difference.low:+.2f}, {difference.high:+.2f}]"
