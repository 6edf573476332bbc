"""Rows whose prompts were not seen before: the difference of two sets of prompts.

A later stage of training has to be new to the draft, so what an earlier stage was trained on is
taken out of it, the same prompts and the nearly same ones (`data.near`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path

from data.chat import Row, prompt_key
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
from data.near import NearRule, PromptIndex

REMOVED = "removed.jsonl"
INPUT, AGAINST = "mode.input", "mode.against"


def subtract(
    folder: Path,
    rows: Sequence[Path],
    against: Sequence[Path],
    rule: NearRule | None = None,
    within: bool = False,
    tick: Tick = no_tick,
) -> Manifest:
    """Write the rows whose prompts are not in `against`.

    Files: `rows.jsonl`, what is left, in order; `removed.jsonl`, a line per other row: its id,
    source and place, the reason (exact | near), which set it repeats, the id and place of the
    prompt found there, and the similarity of the two.

    Args:
        folder: where the files go.
        rows: files of the rows.
        against: files of the rows whose prompts count as seen.
        rule: what counts as nearly the same; None: exact repetitions only.
        within: also remove rows that repeat an earlier row of the input that was kept.
        tick: told of every row read.

    Raises:
        DataError: a bad row or file, or a file that is input and earlier set at once.
    """
    _refuse_common(rows, against)
    options = {"near": asdict(rule) if rule is not None else None, "within": within}
    plan = Plan(
        "subtract", folder, (ROWS, REMOVED), {INPUT: rows, AGAINST: against}, options,
        libraries=("datasketch",) if rule is not None else (),
    )  # fmt: skip

    def work(files: dict[str, Output]) -> Manifest:
        """Learn what was seen, then keep what was not."""
        index, tally = PromptIndex(rule), Tally()
        seen = 0
        for place, row in _all(against, AGAINST):
            index.add(index.sketch(prompt_key(row)), _name(AGAINST, place, row))
            seen += 1
            tick(1)
        distinct = len(index)
        for place, row in read_files(rows, INPUT):
            sketch = index.sketch(prompt_key(row))
            match = index.find(sketch)
            if match is None:
                tally.keep(row["source"])
                files[ROWS].write_row(row)
                if within:
                    index.add(sketch, _name(INPUT, place, row))
            else:
                tally.remove(row["source"], match.reason)
                found = _parts(match.name) | {"similarity": round(match.similarity, 6)}
                line = {"id": row["id"], "source": row["source"], "place": place}
                files[REMOVED].write_row(line | {"reason": match.reason} | found)
            tick(1)
        return {"rows": tally.as_dict(), "against": {"rows": seen, "prompts": distinct}}

    return perform(plan, work)


def _all(paths: Sequence[Path], key: str) -> Iterator[tuple[str, Row]]:
    return read_files(paths, key) if paths else iter(())


def _refuse_common(rows: Sequence[Path], against: Sequence[Path]) -> None:
    common = {path.resolve() for path in rows} & {path.resolve() for path in against}
    if common:
        raise DataError(
            f"{AGAINST}={min(common)}: is also in {INPUT}, of which nothing would be left;"
            " allowed: other files, or mode.within=true for repetitions inside the input"
        )


def _name(key: str, place: str, row: Row) -> str:
    # One text for each of what may be a million prompts; a place has no line break.
    return f"{key.removeprefix('mode.')}\n{place}\n{row['id']}"


def _parts(name: str) -> Row:
    found_in, place, identifier = name.split("\n", 2)
    return {"match": identifier, "match_in": found_in, "match_place": place}
