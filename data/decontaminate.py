"""Training rows without the items of evaluation sets: every overlap is reported, and removed.

What counts as an overlap stands in `data.overlap`.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.manifest import (
    ROWS,
    Manifest,
    Output,
    Plan,
    Tally,
    Tick,
    no_tick,
    perform,
    read_files,
)
from data.overlap import KINDS, EvaluationIndex, Hit, OverlapRule, reason

HITS = "hits.jsonl"
INPUT, AGAINST = "mode.input", "mode.against"


def decontaminate(
    folder: Path,
    rows: Sequence[Path],
    against: Sequence[Path],
    rule: OverlapRule,
    tick: Tick = no_tick,
) -> Manifest:
    """Write the rows that overlap with no evaluation item.

    Files: `rows.jsonl`, what is left, in order; `hits.jsonl`, a line per overlap (so several for
    a row, perhaps): row, source, place, evaluation set, item, the parts of both, kind, text.

    Args:
        folder: where the files go.
        rows: files of the rows.
        against: files of evaluation sets, as mode=prompts writes them; a set is a `source`.
        rule: what counts as an overlap.
        tick: told of every row read.

    Raises:
        DataError: a bad row or file, or a file that is both.
    """
    common = {path.resolve() for path in rows} & {path.resolve() for path in against}
    if common:
        raise DataError(f"{AGAINST}={min(common)}: is also in {INPUT}; allowed: other files")
    fields = {"item_fields": list(rule.item_fields), "row_fields": list(rule.row_fields)}
    options = asdict(rule) | fields
    inputs = {INPUT: rows, AGAINST: against}
    plan = Plan("decontaminate", folder, (ROWS, HITS), inputs, options)

    def work(files: dict[str, Output]) -> Manifest:
        """Look for every evaluation item in every row."""
        index, tally = EvaluationIndex(rule), Tally()
        for _, item in read_files(against, AGAINST):
            index.add(item)
            tick(1)
        report = SetReport(index.items)
        for place, row in read_files(rows, INPUT):
            hits = index.hits(row)
            for hit in hits:
                line = {"row": row["id"], "source": row["source"], "place": place}
                files[HITS].write_row(line | _line(hit))
            if hits:
                tally.remove(row["source"], reason(hits))
                report.add(hits)
            else:
                tally.keep(row["source"])
                files[ROWS].write_row(row)
            tick(1)
        return {"rows": tally.as_dict(), "sets": report.as_dict()}

    return perform(plan, work)


class SetReport:
    """For each evaluation set: how many of its items, and how many rows, were hit.

    Args:
        items: number of items by set.
    """

    def __init__(self, items: Mapping[str, int]) -> None:
        self.items = items
        self._hit_items: dict[str, set[str]] = defaultdict(set)
        self._rows: dict[str, int] = defaultdict(int)
        self._kinds: dict[tuple[str, str], int] = defaultdict(int)

    def add(self, hits: Sequence[Hit]) -> None:
        """The hits of one row."""
        for hit in hits:
            self._hit_items[hit.part.set].add(hit.part.item)
            self._kinds[hit.part.set, hit.kind] += 1
        for name in {hit.part.set for hit in hits}:
            self._rows[name] += 1

    def as_dict(self) -> dict[str, dict[str, int]]:
        """{set: {"items", "items_hit", "rows_hit", "whole", "containment", "ngram"}}; the last
        three count hits."""
        return {
            name: {
                "items": count,
                "items_hit": len(self._hit_items[name]),
                "rows_hit": self._rows[name],
                **{kind: self._kinds[name, kind] for kind in KINDS},
            }
            for name, count in sorted(self.items.items())
        }


def _line(hit: Hit) -> dict[str, Any]:
    return {
        "set": hit.part.set, "item": hit.part.item, "item_part": hit.part.name,
        "row_part": hit.row_part, "kind": hit.kind, "text": hit.text, "words": hit.words,
        "ngrams": hit.ngrams,
    }  # fmt: skip
