"""Files of the user's own: finding them, reading their lines, holding a share of them out."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.fingerprint import files_fingerprint, fingerprint, unit_hash
from data.source import Document, require_split


class FileSource:
    """Documents from files; a subclass says how one is read, its `name` and its
    `types`: the endings of files that it reads, plain or gzipped.

    Without `valid_files`, the documents with the smallest hashes, about `valid_fraction` of them
    and at least one, become validation; a document's side depends on its text alone, so copies
    never straddle the split.

    Args:
        files: path, glob pattern (`**` and `~` work), or a list of those.
        valid_files: the same, for validation.
        valid_fraction: share held out where there are no `valid_files`, in (0, 1).

    Raises:
        DataError: a file is missing, empty or of unknown type, or the share is none.
    """

    name: str
    types: tuple[str, ...]
    splits = ("train", "validation")

    def __init__(
        self,
        files: str | Sequence[str] | None,
        valid_files: str | Sequence[str] | None = None,
        valid_fraction: float = 0.05,
    ) -> None:
        if not 0 < valid_fraction < 1:
            raise DataError(f"valid_fraction={valid_fraction}: must lie between 0 and 1")
        if not files:
            raise DataError("data.files is not set; give a path, a glob pattern or a list of them")
        self.paths = expand_paths(files, self.types)
        self.valid_paths = expand_paths(valid_files, self.types) if valid_files else []
        self.valid_fraction = valid_fraction

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file."""
        raise NotImplementedError

    def documents(self, split: str) -> Iterator[Document]:
        """The documents of the split, file by file."""
        require_split(self, split)
        if self.valid_paths:
            yield from self._read(self.paths if split == "train" else self.valid_paths)
            return
        threshold = self._threshold
        for document in self._read(self.paths):
            held_out = unit_hash(document["text"]) <= threshold
            if held_out == (split == "validation"):
                yield document

    def fingerprint(self) -> str:
        """Hash of the files' bytes and of how they become documents."""
        return self._fingerprint

    def identity(self) -> dict[str, Any]:
        """What determines the documents, beside the code."""
        return {
            "files": files_fingerprint(self.paths),
            "valid_files": files_fingerprint(self.valid_paths),
            "valid_fraction": self.valid_fraction,
        }

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(self.identity())

    @cached_property
    def _threshold(self) -> float:
        texts = (document["text"] for document in self._read(self.paths))
        return held_out_threshold(texts, self.valid_fraction, self.paths[0])

    def _read(self, paths: Sequence[Path]) -> Iterator[Document]:
        for path in paths:
            yield from self.read(path)


def held_out_threshold(texts: Iterable[str], fraction: float, path: Path) -> float:
    """The `unit_hash` up to which a text is held out: about `fraction` of them, at least one.

    Raises:
        DataError: that would be all texts; `path` is where they are from.
    """
    hashes = [unit_hash(text) for text in texts]
    threshold = max(fraction, min(hashes, default=0.0))
    if max(hashes, default=0.0) <= threshold:
        raise DataError(
            f"{path}: {len(hashes)} document(s) are too few to hold some out for validation; "
            "give data.valid_files"
        )
    return threshold


def expand_paths(patterns: str | Sequence[str], types: Sequence[str]) -> list[Path]:
    """The files that paths and glob patterns name, each once, sorted within a pattern.

    Raises:
        DataError: nothing there, an empty file, or a type that cannot be read.
    """
    paths: dict[Path, None] = {}
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        expanded = os.path.expanduser(pattern)
        matches = sorted(glob.glob(expanded, recursive=True))
        found = [Path(expanded)] if os.path.isfile(expanded) else [Path(m) for m in matches]
        found = [path for path in found if path.is_file()]
        if not found:
            raise DataError(f"{pattern}: no such file")
        paths.update(dict.fromkeys(found))
    for path in paths:
        _require_readable(path, types)
    return list(paths)


def read_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file with their line ends; a byte order mark is dropped.

    Raises:
        DataError: a byte that is not UTF-8, by file, line and byte offset; a damaged .gz.
    """
    offset = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                yield _decode(path, raw, number, offset)
                offset += len(raw)
    except (EOFError, OSError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read ({error})") from error


def read_objects(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The JSON objects of a file, one per line, each after its place `FILE:LINE`; blank lines are
    no rows.

    Raises:
        DataError: a line that is no JSON object, by its place.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        place = f"{path}:{number}"
        try:
            row = json.loads(line)
        # Brackets nested a thousand deep exhaust the stack.
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not JSON ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f"{place}: a row must be a JSON object, not {line.strip()[:40]!r}")
        yield place, row


def _decode(path: Path, raw: bytes, number: int, offset: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        place = f"line {number}, byte {offset + error.start}"
        raise DataError(f"{path}: not UTF-8 at {place}; convert the file") from error


def file_type(path: Path) -> str:
    """The type of a file, whether it is gzipped or not."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _require_readable(path: Path, types: Sequence[str]) -> None:
    if file_type(path) not in types:
        allowed = " and ".join(filter(None, [", ".join(types[:-1]), types[-1]]))
        raise DataError(f"{path}: unknown type; allowed are {allowed}, plain or .gz")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
