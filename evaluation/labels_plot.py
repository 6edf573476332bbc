"""The picture of a label audit: how long the answers of every source are."""

from collections.abc import Mapping, Sequence
from typing import BinaryIO

from evaluation.labels import histogram


def plot_lengths(file: BinaryIO, lengths: Mapping[str, Sequence[int]], unit: str) -> None:
    """Draw a histogram per source, below one another with one axis of lengths.

    Args:
        file: where the PNG goes.
        lengths: of the answers, by source.
        unit: what they are measured in.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1 + 1.6 * len(lengths)), layout="constrained")
    axes = figure.subplots(len(lengths), 1, squeeze=False, sharex=True)[:, 0]
    for axis, (source, values) in zip(axes, lengths.items(), strict=True):
        counts, edges = histogram(values)
        axis.stairs(counts, edges, fill=True)
        axis.set_ylabel("answers")
        axis.set_title(f"{source}: {len(values)} answers", fontsize="medium", loc="left")
        axis.grid(alpha=0.3)
    axes[-1].set_xlabel(f"length in {unit}")
    figure.savefig(file, format="png", dpi=150)
