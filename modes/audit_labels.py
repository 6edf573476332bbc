"""mode=audit_labels: what the answers of a training set look like, by source."""

import io
import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.manifest import Manifest, Output, Plan, Tally, perform, read_files, row_files
from evaluation.degeneration import LoopRule
from evaluation.labels import (
    TOKENS,
    audit_labels,
    language_detector,
    metrics_of,
    summary,
    unit_of,
)
from evaluation.labels_plot import plot_lengths
from evaluation.row_counts import place
from evaluation.tables import Cell, text_table
from runtime.checkpoint import provenance
from runtime.config import instantiate
from runtime.progress import Tick, counting
from runtime.run import write_provenance

INPUT = "mode.input"
FIGURES, PICTURE = "labels.json", "labels.png"
RATES = ("capped", "boxed", "degenerate")


def run(cfg: DictConfig) -> dict[str, float]:
    """Write labels.json and labels.png to `mode.output`, and print the table.

    Returns:
        `SOURCE/NAME` of every figure, `all/NAME` over all sources; whether outputs were kept.
    """
    mode = cfg.mode
    with counting("looking at answers", "rows") as tick:
        manifest = audit(cfg, tick)
    figures = json.loads((Path(mode.output) / FIGURES).read_text())
    print(place(mode.output, manifest))
    print(table(figures["sources"], figures["unit"]))
    write_provenance(Path(cfg.paths.run_dir), provenance(cfg, manifest["key"]))
    return metrics_of(figures["sources"]) | {"reused": float(manifest["reused"])}


def audit(cfg: DictConfig, tick: Tick) -> Manifest:
    """Make the outputs, or find them made."""
    mode = cfg.mode
    rows = row_files(mode.input, INPUT)
    rule: LoopRule = instantiate(mode.loop)
    options = {"loop": dict(mode.loop), "language_share": mode.language_share}
    libraries = ("langdetect",) if mode.language_share else ()
    plan = Plan(
        "audit_labels", Path(mode.output), (FIGURES, PICTURE), {INPUT: rows}, options,
        libraries=(*libraries, "matplotlib"),
    )  # fmt: skip

    def work(files: dict[str, Output]) -> Manifest:
        """Count every answer, then write what they look like."""
        tally = Tally()

        def counted() -> Any:
            for _, row in read_files(rows, INPUT, answered=True):
                tally.keep(row["source"])
                tick(1)
                yield row

        detect = language_detector() if mode.language_share else None
        labels = audit_labels(counted(), rule, detect, mode.language_share)
        unit = unit_of(labels)
        sources = {name: summary(found, unit) for name, found in labels.items()}
        content = json.dumps({"unit": unit, "sources": sources}, indent=2)
        files[FIGURES].write((content + "\n").encode())
        lengths = {n: x.tokens if unit == TOKENS else x.words for n, x in labels.items()}
        picture = io.BytesIO()
        plot_lengths(picture, lengths, unit)
        files[PICTURE].write(picture.getvalue())
        return {"rows": tally.as_dict()}

    return perform(plan, work)


def table(sources: dict[str, Any], unit: str) -> str:
    """A line per source; a rate with its 95 % interval in percent."""
    header = ["source", "answers", f"mean {unit}", "p10", "median", "p90", "max",
              *(f"{name} %" for name in RATES), "LaTeX marks", "empty", "languages"]  # fmt: skip
    lines: list[list[Cell]] = [
        [
            name, line["rows"], f"{line['mean']:.1f}", *(round(line[q]) for q in
            ("p10", "median", "p90")), line["max"], *(percent(line[rate]) for rate in RATES),
            f"{line['latex_per_answer']:.1f}", line["empty"], _languages(line["languages"]),
        ]
        for name, line in sources.items()
    ]  # fmt: skip
    return text_table(header, lines)


def percent(rate: dict[str, Any]) -> str:
    """`22.0 [20.1, 24.0]`, or a dash where nobody can say."""
    if rate["rate"] is None:
        return "-"
    value, low, high = (100 * rate[name] for name in ("rate", "low", "high"))
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _languages(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    shown = [f"{name} {100 * count / total:.1f} %" for name, count in list(counts.items())[:3]]
    return ", ".join(shown) or "-"
