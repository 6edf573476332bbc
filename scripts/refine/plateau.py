"""How the scale, the loss and the floor under it go, for scorers that differ in their scale."""

from collections.abc import Mapping
from pathlib import Path

from callbacks.metrics_csv import read_metrics

# Column, title.
PANELS = (
    ("train/gamma", "scale gamma"),
    ("train/nce_loss", "loss, nats per block"),
    ("train/rank_accuracy", "truth ranked first"),
)


def plot_plateau(file: Path, runs: Mapping[str, Path]) -> None:
    """Draw gamma, the loss with its floor (dotted), and the rank accuracy of several runs.

    The floor is the larger of what a bounded scale and unmasked copies of the truth allow.

    Args:
        file: the picture.
        runs: metrics.csv by name.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.8), layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for number, (name, table) in enumerate(runs.items()):
        rows = [row for row in read_metrics(table) if "train/gamma" in row]
        steps = [row["step"] for row in rows]
        for panel, (column, title) in zip(axes, PANELS, strict=True):
            values = _smooth([row[column] for row in rows])
            panel.plot(steps, values, label=name, color=f"C{number}", linewidth=1.3)
            panel.set(title=title, xlabel="optimiser steps")
            panel.grid(alpha=0.3)
        floors = [max(row["train/scale_floor"], row["train/duplicate_floor"]) for row in rows]
        axes[1].plot(steps, _smooth(floors), color=f"C{number}", linestyle=":", linewidth=1.2)
    axes[0].legend(frameon=False, fontsize=8)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130)


def plateau_table(runs: Mapping[str, Path]) -> str:
    """Where every run ended: its last validation, and gamma, as Markdown.

    Args:
        runs: metrics.csv by name.
    """
    header = ["scale", "gamma", "val loss", "floor by copies", "floor by gamma", "truth first"]
    columns = ("gamma", "nce_loss", "duplicate_floor", "scale_floor", "rank_accuracy")
    lines = [header, ["---", *["---:"] * len(columns)]]
    for name, table in runs.items():
        last = [row for row in read_metrics(table) if "val/nce_loss" in row][-1]
        lines.append([name, *(f"{last[f'val/{column}']:.3f}" for column in columns)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _smooth(values: list[float], window: int = 5) -> list[float]:
    """Running means: a step sees a few hundred blocks."""
    return [
        sum(values[max(0, place - window + 1) : place + 1]) / min(place + 1, window)
        for place in range(len(values))
    ]
