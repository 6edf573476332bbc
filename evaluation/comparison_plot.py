"""Metrics of groups of runs against a number of their configuration."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.comparison import Group, is_number, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_comparison(path: Path, groups: Sequence[Group], metrics: Sequence[str], x: str) -> None:
    """A panel per metric, a line per combination of the other keys.

    Points with bars are mean and standard deviation over seeds, the small dots single seeds.
    Groups without a number at `x` are lines across.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5 * len(metrics), 4), layout="constrained")
    axes = figure.subplots(1, len(metrics), squeeze=False)[0]
    for axis, metric in zip(axes, metrics, strict=True):
        for color, (label, line) in enumerate(_lines(groups, x).items()):
            _draw(axis, line, metric, x, label, f"C{color % 10}")
        _scale(axis, [float(group.values[x]) for group in groups if is_number(group.values[x])])
        axis.set(xlabel=x, ylabel=metric)
        axis.grid(alpha=0.3)
        if len(_lines(groups, x)) > 1:
            axis.legend(frameon=False, fontsize="small")
    figure.savefig(path, dpi=150)


def _lines(groups: Sequence[Group], x: str) -> dict[str, list[Group]]:
    """Groups by the values of their other keys, those without a number at `x` apart."""
    lines: dict[str, list[Group]] = defaultdict(list)
    for group in groups:
        others = {key: value for key, value in group.values.items() if key != x}
        if not is_number(group.values[x]):
            others[x] = group.values[x]
        lines[", ".join(f"{key}={show(value)}" for key, value in others.items())].append(group)
    return lines


def _draw(
    axis: "Axes", groups: Sequence[Group], metric: str, x: str, label: str, color: str
) -> None:
    present = [group for group in groups if group.metric(metric)]
    values = [list(group.metric(metric).values()) for group in present]
    if not present:
        return
    means = [float(np.mean(column)) for column in values]
    if not is_number(present[0].values[x]):
        axis.axhline(means[0], label=label, color=color, linestyle="--")
        return
    places = [group.values[x] for group in present]
    spread = [float(np.std(column, ddof=1)) if len(column) > 1 else 0.0 for column in values]
    axis.errorbar(places, means, yerr=spread, label=label, color=color, marker="o", capsize=3)
    for place, column in zip(places, values, strict=True):
        axis.plot([place] * len(column), column, ".", color=color, alpha=0.5)


def is_doubling(values: Sequence[float]) -> bool:
    """Powers of two, with or without 0, that span at least a factor of four."""
    positive = [value for value in values if value > 0]
    powers = all(math.log2(value).is_integer() for value in positive)
    no_negative = all(value >= 0 for value in values)
    return bool(positive) and no_negative and powers and max(positive) >= 4 * min(positive)


def _scale(axis: "Axes", values: Sequence[float]) -> None:
    """Powers of two stand at equal distances, 0 one step before the least of them."""
    if not is_doubling(values):
        return
    least = min(value for value in values if value > 0)
    # matplotlib gives the linear part linscale / (1 - 1 / base) steps: here one.
    axis.set_xscale("symlog", base=2, linthresh=least, linscale=0.5)
    axis.set_xticks(sorted(set(values)), [show(value) for value in sorted(set(values))])
    axis.minorticks_off()
