"""The picture of training runs of thoughts: what every step was measured by, run beside run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evaluation.comparison import is_number
from evaluation.rlmt_table import REWARD

# What tells whether a run learns, and at which price, by panel.
PANELS = {
    REWARD: "mean reward",
    "mixed_group_rate": "groups with both rewards",
    "avg_total_new_tokens": "new tokens of a sample",
    "kl": "KL to the reference",
}
_WINDOW = 10  # steps of the running mean

History = Sequence[Mapping[str, Any]]


def plot_runs(path: Path, histories: Mapping[str, History]) -> list[str]:
    """A panel for each of `PANELS` that a run has: thin the steps, thick their running mean.

    Args:
        path: of the PNG.
        histories: numbers of every step, from the first on, by the name of the run.

    Returns:
        the names of the panels; without any nothing is drawn.
    """
    from matplotlib.figure import Figure

    shown = [
        name for name in PANELS if any(len(series(one, name)[0]) for one in histories.values())
    ]
    if not shown:
        return shown
    figure = Figure(figsize=(4.2 * len(shown), 3.4), layout="constrained")
    for axis, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        for color, (label, history) in enumerate(histories.items()):
            steps, values = series(history, name)
            if len(values):
                axis.plot(steps, values, color=f"C{color % 10}", alpha=0.25, linewidth=0.8)
                axis.plot(steps, running_mean(values), color=f"C{color % 10}", label=label)
        axis.set(xlabel="step", ylabel=PANELS[name])
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return shown


def series(history: History, name: str) -> tuple[np.ndarray, np.ndarray]:
    """Steps, counted from 1, that have a number, and the numbers."""
    found = [(n, row[name]) for n, row in enumerate(history, 1) if is_number(row.get(name))]
    table = np.array(found, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def running_mean(values: np.ndarray, window: int = _WINDOW) -> np.ndarray:
    """Mean of a value and of the up to `window` - 1 before it."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    last = np.arange(1, len(values) + 1)
    first = np.maximum(0, last - window)
    return (sums[last] - sums[first]) / (last - first)
