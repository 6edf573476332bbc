"""The picture of a breakdown: a panel per question."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Lines = Sequence[Mapping[str, Any]]


def plot_breakdown(
    path: Path, depth: Lines, weights: Lines, ranks: Lines, position: Lines, inside: Lines
) -> None:
    """Draw the panels that have something to show; bars are 95 % intervals.

    Args:
        path: the PNG.
        depth: nats per token by depth (`evaluation.breakdown.nll_lines`).
        weights: training weight by depth.
        ranks: reveal rank by depth (`evaluation.unmasking.rank_lines`).
        position: nats per token by place in the row.
        inside: by place in the block.
    """
    from matplotlib.figure import Figure

    panels = [
        ("depth", "nats per token", depth, "nll"),
        ("depth", "training weight", weights, "weight"),
        ("depth", "reveal rank in the block (0 = first)", ranks, "rank"),
        ("position in the row", "nats per token", position, "nll"),
        ("position in the block", "nats per token", inside, "nll"),
    ]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(4 * len(panels), 3.4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (xlabel, ylabel, lines, name) in zip(axes, panels, strict=True):
        _draw(axis, lines, xlabel.split()[0], name)
        axis.set(xlabel=xlabel, ylabel=ylabel)
        axis.grid(alpha=0.3)
    for axis, (_, _, _, name) in zip(axes, panels, strict=True):
        if name == "rank":
            axis.axhline(0.5, color="grey", linestyle="--", linewidth=1)
    figure.savefig(path, dpi=150)


def _draw(axis: "Axes", lines: Lines, key: str, name: str) -> None:
    """Numbered classes as points with intervals; classes with names as lines across."""
    numbered = [line for line in lines if not isinstance(line[key], str)]
    x = [line[key] for line in numbered]
    values = [line[name] for line in numbered]
    if f"{name}_se" in (numbered or [{}])[0]:
        low = high = [1.96 * line[f"{name}_se"] for line in numbered]
    else:
        low = [line[name] - line[f"{name}_low"] for line in numbered]
        high = [line[f"{name}_high"] - line[name] for line in numbered]
    axis.errorbar(x, values, yerr=[low, high], marker="o", markersize=3, linewidth=1, capsize=2)
    named = [line for line in lines if isinstance(line[key], str)]
    for line, style in zip(named, (":", "--"), strict=False):
        axis.axhline(line[name], linestyle=style, color="grey", linewidth=1, label=line[key])
    if named:
        axis.legend(frameon=False)
