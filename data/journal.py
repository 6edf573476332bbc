"""Rows of JSON that survive a kill: appended as they come, found again by their id.

A row is a line. What a process that was killed left of its last line is dropped, so that row is
simply done again.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, BinaryIO

from data.errors import DataError

Row = dict[str, Any]


def encode_row(row: Row) -> bytes:
    """A row as a line of UTF-8. Half a surrogate pair, which UTF-8 has not, is escaped."""
    try:
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(row).encode() + b"\n"


class Journal:
    """A file of rows, each with a text under "id", which are appended and looked up.

    A row survives the end of this process as soon as it is appended, and the end of the machine
    once `sync` has returned; `append` calls that every so often.

    Args:
        path: the file; made if it is not there.
        sync_rows: rows after which they are brought to disk.
        sync_seconds: the same by time.

    Raises:
        DataError: a path that cannot be opened, such as a folder; a line, other than a broken last
            one, that is no such row, or an id twice.
    """

    def __init__(self, path: Path, sync_rows: int = 32, sync_seconds: float = 2.0) -> None:
        self.path = path
        self._sync_rows, self._sync_seconds = sync_rows, sync_seconds
        self._unsynced, self._synced_at = 0, time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file: BinaryIO = path.open("a+b")
        except OSError as error:
            raise DataError(
                f"{path}: cannot be opened ({error.strerror}); allowed: the path of a file"
            ) from error
        try:
            self.repaired = self._drop_broken_line()
            self._offsets = self._index()
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __contains__(self, row_id: str) -> bool:
        return row_id in self._offsets

    def __len__(self) -> int:
        return len(self._offsets)

    def append(self, row: Row) -> None:
        """Add a row at the end.

        Raises:
            DataError: its id is there already, or the file system refuses.
        """
        if row["id"] in self._offsets:
            raise DataError(f"{self.path}: row {row['id']!r} would be there twice")
        try:
            self._offsets[row["id"]] = self._file.seek(0, os.SEEK_END)
            self._file.write(encode_row(row))
            self._file.flush()
            self._unsynced += 1
            late = time.monotonic() - self._synced_at > self._sync_seconds
            if late or self._unsynced >= self._sync_rows:
                self.sync()
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror})") from error

    def read(self, row_id: str) -> Row:
        """The row of an id."""
        self._file.seek(self._offsets[row_id])
        return json.loads(self._file.readline())

    def sync(self) -> None:
        """Bring every row to disk."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._unsynced, self._synced_at = 0, time.monotonic()

    def close(self) -> None:
        """Bring every row to disk and close the file."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _drop_broken_line(self) -> bool:
        """Cut off what follows the last line end; whether there was something."""
        size = self._file.seek(0, os.SEEK_END)
        end, block = size, 1 << 16
        while end > 0:
            start = max(0, end - block)
            self._file.seek(start)
            found = self._file.read(end - start).rfind(b"\n")
            if found >= 0:
                end = start + found + 1
                break
            end = start
        if end < size:
            self._file.truncate(end)
        return end < size

    def _index(self) -> dict[str, int]:
        offsets: dict[str, int] = {}
        place = self._file.seek(0)
        for number, line in enumerate(self._file, start=1):
            row_id = _id_of(line)
            if row_id is None or row_id in offsets:
                problem = "no row with an id" if row_id is None else f"row {row_id!r} again"
                raise DataError(f"{self.path}:{number}: {problem}; remove the line, or the file")
            offsets[row_id] = place
            place += len(line)
        return offsets


def _id_of(line: bytes) -> str | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    found = row.get("id") if isinstance(row, dict) else None
    return found if isinstance(found, str) else None
