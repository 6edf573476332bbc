"""What a data tool did: files that appear together, counts that balance, and manifest.json.

The manifest names every input and output by its SHA-256, the options, the versions of the
libraries, and how many rows of every source came in, went out and were removed for which reason.
Its key is a hash of all that determines the outputs: if the folder holds outputs of the same key,
unchanged, they are kept and nothing is done again.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, BinaryIO

from data.chat import Row, read_placed, to_line
from data.errors import DataError
from data.files import expand_paths
from data.fingerprint import fingerprint
from data.storage import atomic_file, exclusive

MANIFEST = "manifest.json"
ROWS = "rows.jsonl"
FOLDER_KEY = "mode.output"
TYPES = (".jsonl",)

Manifest = dict[str, Any]
Tick = Callable[[int], None]


def no_tick(done: int) -> None:
    """Progress that nobody looks at."""


class Tally:
    """Rows by source: what came, what was kept, what was removed and why."""

    def __init__(self) -> None:
        self.came: Counter[str] = Counter()
        self.kept: Counter[str] = Counter()
        self.removed: dict[str, Counter[str]] = {}

    def keep(self, source: str) -> None:
        """A row that came and goes on."""
        self.came[source] += 1
        self.kept[source] += 1

    def remove(self, source: str, reason: str) -> None:
        """A row that came and ends here."""
        self.came[source] += 1
        self.removed.setdefault(reason, Counter())[source] += 1

    def as_dict(self) -> dict[str, Any]:
        """{"in": {source: n}, "out": ..., "removed": {reason: {source: n}}}; the sums balance."""
        left = Counter(self.kept)
        for counts in self.removed.values():
            left.update(counts)
        assert left == self.came, f"{self.came} came, {left} are accounted for"
        removed = {reason: _sorted(counts) for reason, counts in sorted(self.removed.items())}
        return {"in": _sorted(self.came), "out": _sorted(self.kept), "removed": removed}


def _sorted(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items()))


class Output:
    """An output file that knows its hash and number of lines.

    Args:
        file: where the bytes go.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self.lines = 0

    def write(self, content: bytes) -> None:
        """Append bytes."""
        self._file.write(content)
        self._digest.update(content)
        self.lines += content.count(b"\n")

    def write_row(self, row: Row) -> None:
        """Append a line of JSON."""
        self.write(to_line(row).encode())

    @property
    def sha256(self) -> str:
        """Of what was written so far."""
        return self._digest.hexdigest()


@dataclass(frozen=True)
class Plan:
    """What is asked of a data tool.

    Attributes:
        tool: its name.
        folder: where the outputs go.
        outputs: their names.
        inputs: its files, by the key that named them, such as "mode.input".
        options: whatever else determines the outputs, as plain values.
        libraries: distributions whose version may change the outputs.
        edition: counts changes of the tool that change its outputs.
    """

    tool: str
    folder: Path
    outputs: Sequence[str]
    inputs: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    libraries: Sequence[str] = ()
    edition: int = 1

    @cached_property
    def hashes(self) -> dict[str, list[dict[str, str]]]:
        """Every input with its SHA-256."""
        return {
            key: [{"path": str(path), "sha256": file_sha256(path)} for path in paths]
            for key, paths in self.inputs.items()
        }

    @cached_property
    def versions(self) -> dict[str, str | None]:
        """Of the libraries; None: not installed."""
        return {name: _version(name) for name in self.libraries}

    @cached_property
    def key(self) -> str:
        """16 hexadecimal digits that identify the outputs; names of input files do not count."""
        hashes = {key: [file["sha256"] for file in files] for key, files in self.hashes.items()}
        facts = [self.tool, self.edition, hashes, dict(self.options), self.versions]
        return fingerprint(facts)


def perform(plan: Plan, work: Callable[[dict[str, Output]], Manifest]) -> Manifest:
    """Do the work of a plan, unless its outputs are there already.

    Args:
        plan: what is asked.
        work: writes the outputs it is given, by name, and returns what the manifest shall say.

    Returns:
        The manifest, and in it under "reused" whether it was there already.

    Raises:
        DataError: an output would overwrite an input, or cannot be written.
    """
    _refuse_overwriting(plan)
    place = plan.folder / MANIFEST
    with exclusive(place, FOLDER_KEY):
        found = finished(plan)
        if found is not None:
            return found | {"reused": True}
        with ExitStack() as stack:
            files = {
                name: Output(stack.enter_context(atomic_file(plan.folder / name, FOLDER_KEY)))
                for name in plan.outputs
            }
            facts = work(files)
        outputs = {
            name: {"sha256": file.sha256, "lines": file.lines} for name, file in files.items()
        }
        manifest = {
            "tool": plan.tool, "edition": plan.edition, "key": plan.key,
            "options": dict(plan.options), "inputs": plan.hashes, "outputs": outputs,
            "versions": plan.versions, **facts,
        }  # fmt: skip
        with atomic_file(place, FOLDER_KEY) as file:
            file.write((json.dumps(manifest, indent=2, ensure_ascii=True) + "\n").encode())
    return manifest | {"reused": False}


def finished(plan: Plan) -> Manifest | None:
    """The manifest in the folder, if it is of this plan and its outputs are as it says."""
    try:
        manifest = json.loads((plan.folder / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    if not isinstance(manifest, dict) or manifest.get("key") != plan.key:
        return None
    for name in plan.outputs:
        path = plan.folder / name
        if not path.is_file() or file_sha256(path) != manifest["outputs"][name]["sha256"]:
            return None
    return manifest


def _refuse_overwriting(plan: Plan) -> None:
    outputs = {(plan.folder / name).resolve() for name in (*plan.outputs, MANIFEST)}
    for key, paths in plan.inputs.items():
        for path in paths:
            if path.resolve() in outputs:
                raise DataError(
                    f"{FOLDER_KEY}={plan.folder}: would overwrite {path} of {key};"
                    " allowed: another folder"
                )


def row_files(patterns: Any, key: str) -> list[Path]:
    """The .jsonl files that paths and globs name, each once, whatever it is called.

    Args:
        patterns: a text or a list of texts.
        key: the configuration key that says so.

    Raises:
        DataError: nothing there, an empty file or one of another type, after the key.
    """
    try:
        paths = expand_paths(patterns if isinstance(patterns, str) else list(patterns), TYPES)
    except DataError as error:
        raise DataError(f"{key}: {error}") from error
    return list({path.resolve(): path for path in reversed(paths)}.values())[::-1]


def read_files(
    paths: Sequence[Path], key: str, answered: bool = False
) -> Iterator[tuple[str, Row]]:
    """The rows of several files, each after its place.

    Raises:
        DataError: a bad row, by file and line, or no row at all.
    """
    empty = True
    for path in paths:
        for place, row in read_placed(path, answered):
            empty = False
            yield place, row
    if empty:
        raise DataError(f"{key}={', '.join(map(str, paths))}: no rows there")


def file_sha256(path: Path) -> str:
    """64 hexadecimal digits.

    Raises:
        DataError: the file cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
