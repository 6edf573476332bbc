"""The rows of a measurement as they come: on disk after every batch, resumed after a kill."""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.journal import encode_row
from data.storage import atomic_file

Row = dict[str, Any]
# Draft, benchmark and prompt.
Key = tuple[str, str, str]


class RowLog:
    """A JSONL file with the rows of prompts, all turns of a prompt or none.

    A last line that a kill cut off is dropped, and so are prompts with fewer rows than `turns`
    says: they are asked again.

    Args:
        path: the file; it need not exist.
        turns: rows that a finished prompt has, by benchmark and prompt.

    Raises:
        DataError: a line that is no row, a row twice, or one of a prompt that is not asked.
    """

    def __init__(self, path: Path, turns: Mapping[tuple[str, str], int]) -> None:
        self.path = path
        self._rows: dict[Key, list[Row]] = {}
        found, whole = read_rows(path)
        for number, row in enumerate(found, start=1):
            key = row_key(row, f"{path}:{number}")
            if key[1:] not in turns:
                raise DataError(
                    f"{path}:{number}: {key[1]} {key[2]} is not among the prompts; start anew in"
                    " another folder, or give the same mode.prompts"
                )
            self._rows.setdefault(key, []).append(row)
        kept = {key: rows for key, rows in self._rows.items() if len(rows) == turns[key[1:]]}
        if not whole or len(kept) < len(self._rows):
            self._rows = kept
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path, "paths.run_dir") as file:
                file.write(_lines(self.rows()))

    def __contains__(self, key: Key) -> bool:
        return key in self._rows

    def rows(self) -> list[Row]:
        """Of all finished prompts, in the order in which they were finished."""
        return [row for rows in self._rows.values() for row in rows]

    def append(self, prompts: Sequence[Sequence[Row]]) -> None:
        """The rows of some prompts; on disk when this returns."""
        for rows in prompts:
            self._rows[row_key(rows[0], "")] = list(rows)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write(_lines(row for rows in prompts for row in rows))
            file.flush()
            os.fsync(file.fileno())


def row_key(row: Row, place: str) -> Key:
    """Whose row it is."""
    try:
        return str(row["draft"]), str(row["benchmark"]), str(row["id"])
    except (KeyError, TypeError) as error:
        raise DataError(f"{place}: not a row of this measurement (no {error})") from error


def _lines(rows: Iterable[Row]) -> bytes:
    return b"".join(map(encode_row, rows))


def read_rows(path: Path) -> tuple[list[Row], bool]:
    """The rows of a file, and whether it ends with a whole line.

    Lines end at b"\\n" alone: answers may hold other characters that count as ends of lines. What
    a kill left of the last line is no row.

    Raises:
        DataError: a line that is no row of a measurement, or a second row of the same draft,
            benchmark, prompt and turn; by file and line.
    """
    if not path.is_file():
        return [], True
    *lines, rest = path.read_bytes().split(b"\n")
    rows, seen = list[Row](), set[tuple[str, ...]]()
    for number, line in enumerate(lines, start=1):
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place}: not JSON ({error})") from error
        key = (*row_key(row, place), str(row.get("turn", 0)))
        if key in seen:
            raise DataError(f"{place}: {', '.join(key)} is there twice; remove one")
        seen.add(key)
        rows.append(row)
    return rows, not rest
