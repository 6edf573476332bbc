"""Pictures of a scorer: what every alpha picks, and whether its probabilities come true."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evaluation.grouped import Measure
from evaluation.scorer import Selection
from evaluation.scorer_quality import Calibration

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_sweep(path: Path, found: Sequence[Selection]) -> None:
    """Two panels over alpha: bon@1 between greedy and oracle, and the gain with its zero.

    The alphas stand at equal distances in their order, the score alone last. Whiskers are 95 %.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    rates, gains = figure.subplots(1, 2)
    _whiskers(rates, [one.bon for one in found], "bon@1")
    first = found[0]
    for level, label, style in ((first.greedy, "greedy@1", "--"), (first.oracle, "oracle@n", ":")):
        if level.value is not None:
            rates.axhline(level.value, color="grey", linestyle=style, linewidth=1, label=label)
    rates.set_ylabel("picked = truth")
    rates.legend(frameon=False)
    _whiskers(gains, [one.gain for one in found], "gain")
    gains.axhline(0.0, color="grey", linewidth=1)
    gains.set_ylabel("bon@1 - greedy@1")
    names = ["score\nalone" if one.alpha == math.inf else f"{one.alpha:g}" for one in found]
    for axis in (rates, gains):
        axis.set_xticks(range(len(found)), names)
        axis.set_xlabel("alpha")
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)


def _whiskers(axis: "Axes", measures: Sequence[Measure], label: str) -> None:
    places = [place for place, one in enumerate(measures) if one.value is not None]
    values = [one.value for one in measures if one.value is not None]
    ends = [
        (one.value if one.low is None else one.low, one.value if one.high is None else one.high)
        for one in measures
        if one.value is not None
    ]
    below = [value - low for value, (low, _) in zip(values, ends, strict=True)]
    above = [high - value for value, (_, high) in zip(values, ends, strict=True)]
    axis.errorbar(places, values, yerr=[below, above], marker="o", capsize=3, label=label)


def plot_reliability(path: Path, found: Calibration) -> None:
    """How often candidates of every bin are the truth against their mean p, and how many they are.

    Whiskers are Wilson's 95 %; on the diagonal the softmax means what it says.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.6, 5.2), layout="constrained")
    curve, counts = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    curve.plot([0, 1], [0, 1], color="grey", linestyle="--", linewidth=1)
    for one in found.bins:
        if one.mean is not None and one.rate is not None and one.interval is not None:
            ends = [[max(one.rate - one.interval.low, 0)], [max(one.interval.high - one.rate, 0)]]
            curve.errorbar([one.mean], [one.rate], yerr=ends, marker="o", capsize=3, color="C0")
    value = "-" if found.ece.value is None else f"{found.ece.value:.3f}"
    curve.set_title(f"ECE {value}, {found.decidable} blocks", fontsize="medium")
    curve.set_ylabel("is the truth")
    edges = [found.bins[0].low, *(one.high for one in found.bins)]
    counts.stairs([one.observations for one in found.bins], edges, fill=True)
    counts.set(xlabel="softmax of the scores", ylabel="candidates")
    for axis in (curve, counts):
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=150)
