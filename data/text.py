"""Text files of the user's own: .txt, .md and .jsonl, plain or gzipped."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import FileSource, file_type, read_lines, read_objects
from data.source import Document

_PLAIN = (".txt", ".md")
TYPES = (*_PLAIN, ".jsonl")
_LARGE_FILE = 2**20  # bytes; a file is held in memory as a whole if it is one document


class TextFiles(FileSource):
    """Documents from UTF-8 files.

    A row of a .jsonl file is a document. A .txt or .md file is one document if there are many
    small files, and a sequence of paragraphs (documents between blank lines; lines if there is but
    one paragraph) if there are few or if they are large: `split_paragraphs=None` calls fewer than
    `1 / valid_fraction` files few, because one cannot hold out a share of them, and more than 1 MiB
    on average large.

    Args:
        files, valid_files, valid_fraction: see `data.files.FileSource`.
        text_column: key of the text in .jsonl rows.
        split_paragraphs: force or forbid paragraphs as documents.

    Raises:
        DataError: a file is missing, empty, of unknown type, not UTF-8, or a row has no text.
    """

    name = "text"
    types = TYPES

    def __init__(
        self,
        files: str | Sequence[str] | None,
        valid_files: str | Sequence[str] | None = None,
        valid_fraction: float = 0.05,
        text_column: str = "text",
        split_paragraphs: bool | None = None,
    ) -> None:
        super().__init__(files, valid_files, valid_fraction)
        self.text_column = text_column
        sizes = [path.stat().st_size for path in self.paths if file_type(path) in _PLAIN]
        few = len(sizes) < 1 / valid_fraction
        large = bool(sizes) and sum(sizes) / len(sizes) > _LARGE_FILE
        self.split_paragraphs = few or large if split_paragraphs is None else split_paragraphs

    def read(self, path: Path) -> Iterator[Document]:
        """The documents of one file."""
        for text in self._texts(path):
            yield {"text": text}

    def identity(self) -> dict[str, Any]:
        """The files, and how they are cut into documents."""
        return {
            **super().identity(),
            "suffixes": [file_type(path) for path in [*self.paths, *self.valid_paths]],
            "text_column": self.text_column,
            "split_paragraphs": self.split_paragraphs,
        }

    def _texts(self, path: Path) -> Iterator[str]:
        if file_type(path) == ".jsonl":
            yield from read_jsonl(path, self.text_column)
        elif self.split_paragraphs:
            yield from read_paragraphs(path)
        else:
            yield "".join(read_lines(path))


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
    for place, row in read_objects(path):
        if not isinstance(row.get(column), str):
            raise DataError(
                f"{place}: no text under {column!r} (keys: {', '.join(row)}); set data.text_column"
            )
        yield _require_unicode(row[column], place)


def _require_unicode(text: str, place: str) -> str:
    r"""JSON may spell half of a surrogate pair, such as "\ud83d", which is no character."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(f"{place}: not a character at place {error.start} of the text") from error
    return text
