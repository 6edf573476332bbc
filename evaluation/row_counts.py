"""What a data tool did to the rows of each source, as a table and as metrics."""

from collections.abc import Mapping
from typing import Any

from evaluation.tables import text_table

Counts = Mapping[str, Any]


def place(folder: str, manifest: Counts) -> str:
    """The folder of a tool's outputs, and whether they were there before."""
    return f"{folder} (as it was: nothing has changed)" if manifest["reused"] else folder


def counts_table(title: str, counts: Counts) -> str:
    """A line per source: rows in, removed by reason, out; then the sums.

    Args:
        title: of the first column.
        counts: {"in", "out", "removed"} of `data.manifest.Tally.as_dict`.
    """
    reasons = list(counts["removed"])
    rows = [
        [
            source,
            came,
            *(counts["removed"][reason].get(source, 0) for reason in reasons),
            counts["out"].get(source, 0),
        ]
        for source, came in counts["in"].items()
    ]
    sums = [sum(row[place] for row in rows) for place in range(1, len(reasons) + 3)]
    return text_table([title, "in", *reasons, "out"], [*rows, ["all", *sums]])


def count_metrics(counts: Counts) -> dict[str, float]:
    """{"rows_in", "rows_out", "removed/REASON", "SOURCE/in", "SOURCE/out"}."""
    metrics: dict[str, float] = {
        "rows_in": sum(counts["in"].values()),
        "rows_out": sum(counts["out"].values()),
    }
    for reason, by_source in counts["removed"].items():
        metrics[f"removed/{reason}"] = sum(by_source.values())
    for source, came in counts["in"].items():
        metrics |= {f"{source}/in": came, f"{source}/out": counts["out"].get(source, 0)}
    return metrics
