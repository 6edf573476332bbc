"""The token cache: one Arrow file per split, written once, then memory-mapped.

The file holds fixed-size lists of the smallest integers that fit. Its schema carries the key of the
content (what was packed, and how), and an empty last batch the packing report. A checksum
(`data.seal`) is compared before Arrow parses anything, because a damaged file can crash the parser.

Legend: L tokens of a row; N rows.
"""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, SpinnerColumn, TimeElapsedColumn

from data.blocks import IDS, LENGTH, Block, PackingReport
from data.errors import DataError
from data.fingerprint import fingerprint
from data.seal import is_intact, seal
from data.storage import atomic_file, exclusive

_FORMAT = "palimpsest.rows.1"
_BYTES_PER_BATCH = 16 << 20
Key = Mapping[str, str | int | bool | None]


def cache_path(folder: str | Path, key: Key) -> Path:
    """Where the rows of `key` are kept: a readable name, made unique by the hash of the key."""
    shape = "wrap" if key["wrap"] else "rows"
    name = f"{key['source']}-{key['split']}-L{key['length']}-{shape}-{fingerprint(dict(key))}"
    return Path(folder).expanduser() / "rows" / f"{name}.arrow"


def open_or_build(
    path: Path,
    key: Key,
    vocab_size: int,
    build: Callable[[PackingReport], Iterable[Block]],
) -> "Rows":
    """The rows of `key`, packed by `build` unless the file exists; one process builds at a time.

    Raises:
        DataError: the file is damaged or foreign, or cannot be written; whatever `build` raises.
    """
    with exclusive(path):
        if not path.exists():
            report = PackingReport()
            blocks = _with_progress(build(report), f"packing {path.stem}")
            with atomic_file(path) as file:
                write_rows(file, blocks, key, vocab_size, report)
    return Rows(path, key)


def write_rows(
    file: BinaryIO, blocks: Iterable[Block], key: Key, vocab_size: int, report: PackingReport
) -> None:
    """Write blocks [N, L] as record batches of equal size, and `report` behind the last one."""
    length = int(key["length"] or 0)
    metadata = {"format": _FORMAT, "key": json.dumps(dict(key))}
    rows_per_batch = max(1, _BYTES_PER_BATCH // (length * np.dtype(np.uint32).itemsize))
    writer = schema = None
    for block in regroup(blocks, rows_per_batch):
        small = _smallest(block, length, vocab_size)
        batch = pa.record_batch({name: _to_arrow(column) for name, column in small.items()})
        batch = batch.replace_schema_metadata(metadata)
        if writer is None:
            schema = batch.schema
            writer = pa.ipc.new_file(file, schema)
        writer.write_batch(batch)
    if writer is None:
        schema = pa.schema({IDS: pa.list_(pa.uint8(), length)}, metadata=metadata)
        writer = pa.ipc.new_file(file, schema)
    summary = {"report": json.dumps(vars(report))}
    writer.write_batch(pa.RecordBatch.from_pylist([], schema), custom_metadata=summary)
    writer.close()
    seal(file)


class Rows:
    """The rows of a split, memory-mapped: opening reads each byte once to check it.

    Attributes:
        path: the file.
        key: what was packed, and how.
        report: what became of the documents.
        names: the columns.

    Raises:
        DataError: the file is incomplete, damaged, or holds something other than `expected`.
    """

    def __init__(self, path: Path, expected: Key | None = None) -> None:
        self.path = path
        self._open(verify=True)
        if expected is not None and dict(expected) != self.key:
            raise self._unusable("it holds other data than its name says")

    def __len__(self) -> int:
        return self._size

    def __getstate__(self) -> Path:
        # A worker process maps the file itself; arrays would be copied to it.
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.path = path
        self._open(verify=False)

    def take(self, indices: np.ndarray) -> Block:
        """The rows at `indices` [N], in that order: columns [N, L] and [N]."""
        indices = np.asarray(indices, dtype=np.int64)
        if len(indices) and (indices.min() < 0 or indices.max() >= self._size):
            raise IndexError(f"rows {indices.min()}..{indices.max()} of {self._size}")
        if len(self._batches) == 1:
            return {name: column[indices] for name, column in self._batches[0].items()}
        which, place = np.divmod(indices, self._rows_per_batch)
        taken = {
            name: np.empty((len(indices), *column.shape[1:]), column.dtype)
            for name, column in self._batches[0].items()
        }
        for number in np.unique(which):
            here = which == number
            for name, column in self._batches[number].items():
                taken[name][here] = column[place[here]]
        return taken

    def blocks(self, limit: int | None = None) -> Iterator[Block]:
        """All rows (the first `limit`) in order, in large blocks of views into the file."""
        left = self._size if limit is None else min(limit, self._size)
        for batch in self._batches:
            if left > 0:
                yield {name: column[:left] for name, column in batch.items()}
            left -= len(batch[IDS])

    def _open(self, verify: bool) -> None:
        try:
            self._map(verify)
        except (pa.ArrowException, OSError, KeyError) as error:
            reason = (str(error).splitlines() or [""])[0]
            raise self._unusable(f"it cannot be read ({reason})") from error

    def _map(self, verify: bool) -> None:
        if verify and not is_intact(self.path):
            raise self._unusable("it is incomplete, damaged or foreign (wrong checksum)")
        reader = pa.ipc.open_file(pa.memory_map(str(self.path)))
        metadata = reader.schema.metadata or {}
        if metadata.get(b"format") != _FORMAT.encode():
            raise self._unusable("it is no token cache of this format")
        self.key: dict[str, Any] = json.loads(metadata[b"key"])
        self.names = tuple(reader.schema.names)
        self._batches: list[Block] = []
        for number in range(reader.num_record_batches - 1):
            batch = reader.get_batch(number)
            self._batches.append({name: _to_numpy(batch.column(name)) for name in self.names})
        _, summary = reader.get_batch_with_custom_metadata(reader.num_record_batches - 1)
        self.report = PackingReport(**json.loads(summary[b"report"]))
        self._size = sum(len(batch[IDS]) for batch in self._batches)
        self._rows_per_batch = len(self._batches[0][IDS]) if self._batches else 1

    def _unusable(self, reason: str) -> DataError:
        return DataError(f"{self.path}: {reason}; delete it and run again")


def regroup(blocks: Iterable[Block], size: int) -> Iterator[Block]:
    """The same rows in blocks of exactly `size` rows (the last one may be smaller)."""
    waiting: list[Block] = []
    count = 0
    for block in blocks:
        waiting.append(block)
        count += len(block[IDS])
        if count < size:
            continue
        joined = _join(waiting)
        whole = count // size * size
        for start in range(0, whole, size):
            yield {name: column[start : start + size] for name, column in joined.items()}
        waiting = [{name: column[whole:] for name, column in joined.items()}]
        count -= whole
    if count:
        yield _join(waiting)


def _join(blocks: list[Block]) -> Block:
    return {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}


def _smallest(block: Block, length: int, vocab_size: int) -> Block:
    """Ids and lengths in the smallest unsigned integers that hold every allowed value."""
    assert block[IDS].shape[1] == length and block[IDS].max(initial=0) < vocab_size
    dtypes = {IDS: np.min_scalar_type(vocab_size - 1), LENGTH: np.min_scalar_type(length)}
    return {
        name: np.ascontiguousarray(column, dtypes.get(name, column.dtype))
        for name, column in block.items()
    }


def _to_arrow(column: np.ndarray) -> pa.Array:
    values = pa.array(column.reshape(-1))
    return (
        pa.FixedSizeListArray.from_arrays(values, column.shape[1]) if column.ndim == 2 else values
    )


def _to_numpy(column: pa.Array) -> np.ndarray:
    if not isinstance(column, pa.FixedSizeListArray):
        return column.to_numpy(zero_copy_only=True)
    flat = column.values.to_numpy(zero_copy_only=True)
    return flat.reshape(len(column), column.type.list_size)


def _with_progress(blocks: Iterable[Block], description: str) -> Iterator[Block]:
    """Count rows on the terminal, if there is one."""
    columns = (SpinnerColumn(), "{task.description}", MofNCompleteColumn(), "rows")
    with contextlib.ExitStack() as stack:
        progress = Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True))
        if sys.stderr.isatty():
            stack.enter_context(progress)
        task = progress.add_task(description, total=None)
        for block in blocks:
            yield block
            progress.advance(task, len(block[IDS]))
