"""Text files of the user's own: .txt, .md and .jsonl, plain or gzipped."""

import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path

from data.errors import DataError
from data.fingerprint import files_fingerprint, fingerprint, unit_hash
from data.source import Document, require_split

_PLAIN = (".txt", ".md")
_LARGE_FILE = 2**20  # bytes; a file is held in memory as a whole if it is one document


class TextFiles:
    """Documents from UTF-8 files.

    A row of a .jsonl file is a document. A .txt or .md file is one document if there are many
    small files, and a sequence of paragraphs (documents between blank lines; lines if there is but
    one paragraph) if there are few or if they are large: `split_paragraphs=None` calls fewer than
    `1 / valid_fraction` files few, because one cannot hold out a share of them, and more than 1 MiB
    on average large. Without `valid_files`, the documents with the
    smallest hashes, about `valid_fraction` of them and at least one, become validation; a
    document's side depends on its text alone, so copies never straddle the split.

    Args:
        files: path, glob pattern (`**` and `~` work), or a list of those.
        valid_files: the same, for validation.
        valid_fraction: share held out where there are no `valid_files`, in (0, 1).
        text_column: key of the text in .jsonl rows.
        split_paragraphs: force or forbid paragraphs as documents.

    Raises:
        DataError: a file is missing, empty, of unknown type, not UTF-8, or a row has no text.
    """

    name = "text"
    splits = ("train", "validation")

    def __init__(
        self,
        files: str | Sequence[str] | None,
        valid_files: str | Sequence[str] | None = None,
        valid_fraction: float = 0.05,
        text_column: str = "text",
        split_paragraphs: bool | None = None,
    ) -> None:
        if not 0 < valid_fraction < 1:
            raise DataError(f"valid_fraction={valid_fraction}: must lie between 0 and 1")
        if not files:
            raise DataError("data.files is not set; give a path, a glob pattern or a list of them")
        self.paths = expand_paths(files)
        self.valid_paths = expand_paths(valid_files) if valid_files else []
        self.valid_fraction = valid_fraction
        self.text_column = text_column
        sizes = [path.stat().st_size for path in self.paths if _suffix(path) in _PLAIN]
        few = len(sizes) < 1 / valid_fraction
        large = bool(sizes) and sum(sizes) / len(sizes) > _LARGE_FILE
        self.split_paragraphs = few or large if split_paragraphs is None else split_paragraphs

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
        """Hash of the files' bytes and of how they are cut into documents."""
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        return fingerprint(
            {
                "files": files_fingerprint(self.paths),
                "valid_files": files_fingerprint(self.valid_paths),
                "suffixes": [_suffix(path) for path in [*self.paths, *self.valid_paths]],
                "valid_fraction": self.valid_fraction,
                "text_column": self.text_column,
                "split_paragraphs": self.split_paragraphs,
            }
        )

    @cached_property
    def _threshold(self) -> float:
        texts = (document["text"] for document in self._read(self.paths))
        return held_out_threshold(texts, self.valid_fraction, self.paths[0])

    def _read(self, paths: Sequence[Path]) -> Iterator[Document]:
        for path in paths:
            for text in self._texts(path):
                yield {"text": text}

    def _texts(self, path: Path) -> Iterator[str]:
        if _suffix(path) == ".jsonl":
            yield from read_jsonl(path, self.text_column)
        elif self.split_paragraphs:
            yield from read_paragraphs(path)
        else:
            yield "".join(read_lines(path))


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


def expand_paths(
    patterns: str | Sequence[str], types: Sequence[str] = (*_PLAIN, ".jsonl")
) -> list[Path]:
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


def read_paragraphs(path: Path) -> Iterator[str]:
    """Blocks of lines between blank lines; the single lines, if there is only one block."""
    line_is_document = not _has_paragraphs(path)
    paragraph: list[str] = []
    for line in read_lines(path):
        if line.strip():
            paragraph.append(line)
        if paragraph and (line_is_document or not line.strip()):
            yield "".join(paragraph).rstrip()
            paragraph = []
    if paragraph:
        yield "".join(paragraph).rstrip()


def _has_paragraphs(path: Path) -> bool:
    """Whether a blank line lies between two lines of text."""
    text_seen = blank_seen = False
    for line in read_lines(path):
        if line.strip() and blank_seen:
            return True
        text_seen = text_seen or bool(line.strip())
        blank_seen = text_seen and not line.strip()
    return False


def read_jsonl(path: Path, column: str) -> Iterator[str]:
    """The texts under `column`, one per line; blank lines are no rows.

    Raises:
        DataError: a line that is not a JSON object, or has no text under `column`, by file:line.
    """
    for number, line in enumerate(read_lines(path), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}:{number}: a row must be a JSON object, not {line.strip()!r}")
        if not isinstance(row.get(column), str):
            raise DataError(
                f"{path}:{number}: no text under {column!r} (keys: {', '.join(row)}); "
                "set data.text_column"
            )
        yield _require_unicode(row[column], f"{path}:{number}")


def _require_unicode(text: str, place: str) -> str:
    r"""JSON may spell half of a surrogate pair, such as "\ud83d", which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: not a character at place {error.start} of the text") from error
    return text


def _decode(path: Path, raw: bytes, number: int, offset: int) -> str:
    try:
        return raw.decode("utf-8-sig" if number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        place = f"line {number}, byte {offset + error.start}"
        raise DataError(f"{path}: not UTF-8 at {place}; convert the file") from error


def _suffix(path: Path) -> str:
    """The type of a file, whether it is gzipped or not."""
    return (path.with_suffix("") if path.suffix == ".gz" else path).suffix


def _require_readable(path: Path, types: Sequence[str]) -> None:
    if _suffix(path) not in types:
        allowed = " and ".join([", ".join(types[:-1]), types[-1]])
        raise DataError(f"{path}: unknown type; allowed are {allowed}, plain or .gz")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
