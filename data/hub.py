"""Published corpora through the `datasets` library: from the hub, or from a copy on disk."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from data.detokenize import DETOKENIZERS
from data.errors import DataError
from data.fingerprint import files_fingerprint, fingerprint
from data.source import Document, require_split

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict, IterableDataset

_FORMATS = {".parquet": "parquet", ".jsonl": "json", ".json": "json", ".arrow": "arrow"}
_SLICE = re.compile(r"^(?P<split>[^\[]+)(\[(?P<start>-?\d+)?:(?P<stop>-?\d+)?\])?$")

Files = str | Sequence[str]


class HubDataset:
    """One text column of a dataset, detokenised.

    Args:
        name: short name, used in messages and cache files.
        path: dataset on the hub, `owner/name`.
        split_map: for each of train, validation, test that exists, the split of the dataset to
            read, with an optional slice: `{"train": "train[:-1000]", "validation": "test"}`.
        config: configuration (subset) of the dataset.
        revision: git revision of the dataset.
        column: name of the text column.
        detokenizer: a key of `data.detokenize.DETOKENIZERS`, or None.
        files: a local copy instead of the hub: a folder (as `save_to_disk` writes it, or holding
            parquet / jsonl / arrow files), or a dict from split to such files.
        streaming: read while training instead of downloading first.
        setting: the configuration key of this dataset, for messages.

    Raises:
        DataError: `datasets` is not installed, the hub or a file cannot be read, or a split,
            column or detokenizer does not exist.
    """

    def __init__(
        self,
        name: str,
        path: str,
        split_map: Mapping[str, str],
        config: str | None = None,
        revision: str | None = None,
        column: str = "text",
        detokenizer: str | None = None,
        files: str | Mapping[str, Files] | None = None,
        streaming: bool = False,
        setting: str = "data.source",
    ) -> None:
        if detokenizer is not None and detokenizer not in DETOKENIZERS:
            allowed = ", ".join(DETOKENIZERS)
            raise DataError(f"detokenizer={detokenizer!r}: unknown; allowed are {allowed} and null")
        self.name = name
        self.path = path
        self.split_map = dict(split_map)
        self.config = config
        self.revision = revision
        self.column = column
        self.detokenizer = detokenizer
        self.files = files if files is None or isinstance(files, str) else dict(files)
        self.streaming = streaming
        self.setting = setting

    @property
    def splits(self) -> tuple[str, ...]:
        """The keys of `split_map`."""
        return tuple(self.split_map)

    def documents(self, split: str) -> Iterator[Document]:
        """The rows of the split, in their order."""
        require_split(self, split)
        detokenize = DETOKENIZERS[self.detokenizer] if self.detokenizer else str
        rows = self._rows(self.split_map[split])
        for number, text in enumerate(self._texts(rows)):
            if not isinstance(text, str):
                raise DataError(f"{self.name}: row {number} of {split}: {self.column} is no text")
            yield {"text": detokenize(text)}

    def rows(self, split: str) -> Iterator[Mapping[str, object]]:
        """The rows of the split with all their columns."""
        require_split(self, split)
        try:
            yield from self._rows(self.split_map[split])
        except OSError as error:
            raise self._unreadable(error) from error

    def fingerprint(self) -> str:
        """Hash of what is read: the files' bytes, or the identity and size of the hub's copy."""
        identity = {
            "split_map": self.split_map,
            "column": self.column,
            "detokenizer": self.detokenizer,
        }
        if self.files is not None:
            return fingerprint(identity | {"files": _files_by_place(self.files)})
        sizes = {name: _size(dataset) for name, dataset in self._datasets.items()}
        place = {"path": self.path, "config": self.config, "revision": self.revision}
        return fingerprint(identity | place | {"sizes": sizes})

    @cached_property
    def _datasets(self) -> "DatasetDict":
        datasets = _import_datasets()
        try:
            if self.files is None:
                return datasets.load_dataset(
                    self.path, self.config, revision=self.revision, streaming=self.streaming
                )
            return _load_local(datasets, self.files, self.streaming)
        except DataError:
            raise
        # The library lets through errors of several network, file and format libraries.
        except Exception as error:
            raise self._unreadable(error) from error

    def _rows(self, expression: str) -> "Dataset | IterableDataset":
        """Evaluate `split` or `split[start:stop]` as Python slices do."""
        match = _SLICE.match(expression)
        if match is None:
            raise DataError(f"{self.name}: split {expression!r} is not NAME or NAME[a:b]")
        if match["split"] not in self._datasets:
            found = ", ".join(self._datasets)
            raise DataError(f"{self.name}: no split {match['split']!r}; the dataset has {found}")
        rows = self._datasets[match["split"]]
        start, stop = (int(match[key]) if match[key] else None for key in ("start", "stop"))
        if start is None and stop is None:
            return rows
        if isinstance(rows, _import_datasets().Dataset):
            return rows.select(range(*slice(start, stop).indices(len(rows))))
        return _stream_slice(rows, start, stop, expression)

    def _texts(self, rows: "Dataset | IterableDataset") -> Iterator[object]:
        columns = rows.column_names
        if columns is not None and self.column not in columns:
            found = ", ".join(columns)
            raise DataError(f"{self.name}: no column {self.column!r}; the dataset has {found}")
        try:
            for row in rows:
                yield row[self.column]
        except OSError as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        reason = (str(error).splitlines() or [""])[0]
        place = self.path if self.files is None else self.files
        return DataError(
            f"{self.name}: cannot read {place} ({type(error).__name__}: {reason}); "
            f"without network, set {self.setting}.files to a local copy"
        )


def local_files(files: str | Mapping[str, Files]) -> list[Path]:
    """Every data file of a local copy, sorted within a folder.

    Raises:
        DataError: nothing of a readable type is there.
    """
    if isinstance(files, str):
        folder = Path(files).expanduser()
        paths = sorted(path for path in folder.rglob("*") if path.suffix in _FORMATS)
        if not paths:
            raise DataError(f"{files}: no folder with {', '.join(_FORMATS)} files")
        return paths
    return [path for entry in files.values() for path in _listed(entry)]


def _files_by_place(files: str | Mapping[str, Files]) -> dict[str, str]:
    """Digests of a local copy: by name in a folder, where names decide on splits, else by split."""
    if isinstance(files, str):
        folder = Path(files).expanduser()
        paths = local_files(files)
        return {str(path.relative_to(folder)): files_fingerprint([path]) for path in paths}
    return {split: files_fingerprint(_listed(entry)) for split, entry in files.items()}


def _listed(entry: Files) -> list[Path]:
    paths = [Path(item).expanduser() for item in ([entry] if isinstance(entry, str) else entry)]
    for path in paths:
        if path.suffix not in _FORMATS:
            raise DataError(f"{path}: unknown type; allowed are {', '.join(_FORMATS)}")
        if not path.is_file():
            raise DataError(f"{path}: no such file")
    return paths


def _load_local(
    datasets: ModuleType, files: str | Mapping[str, Files], streaming: bool
) -> "DatasetDict":
    paths = local_files(files)
    if isinstance(files, str):
        folder = Path(files).expanduser()
        if (folder / "dataset_dict.json").exists():
            # Memory-mapped already, so there is nothing to stream.
            return datasets.load_from_disk(str(folder))
        return datasets.load_dataset(str(folder), streaming=streaming)
    data_files = {name: [str(path) for path in _listed(entry)] for name, entry in files.items()}
    kind = _FORMATS[paths[0].suffix]
    return datasets.load_dataset(kind, data_files=data_files, streaming=streaming)


def _stream_slice(
    rows: "IterableDataset", start: int | None, stop: int | None, expression: str
) -> "IterableDataset":
    """`rows[start:stop]` for a stream, which has no end to count from."""
    if (start or 0) < 0 or (stop or 0) < 0:
        raise DataError(
            f"split {expression!r} counts from the end, which a stream cannot; "
            "set data.source.split_map to slices from the start"
        )
    rows = rows if stop is None else rows.take(stop)
    return rows.skip(start) if start else rows


def _size(dataset: "Dataset | IterableDataset") -> list[int | None]:
    info = (dataset.info.splits or {}).get(str(dataset.split))
    return [info.num_examples, info.num_bytes] if info else [None, None]


def _import_datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as error:
        raise DataError("this data needs the library `datasets`: pip install datasets") from error
    return datasets
