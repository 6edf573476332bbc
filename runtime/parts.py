"""A folder of `torch.save` files that appears whole or not at all, and can say that it still is.

`meta.json`, written last, lists the other files with their sizes and sha256. Everything is written
into a hidden folder beside the place, flushed to the disk and renamed, so that a kill at any moment
leaves no folder or the whole one.
"""

import errno
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any, cast

from runtime.errors import CheckpointError
from runtime.excerpt import shown
from runtime.key_kinds import is_integer

META, FORMAT = "meta.json", 1
UNFINISHED = ".part"
_LONGEST_META = 2**26  # bytes


def write_parts(folder: Path, parts: Mapping[str, Any], facts: Mapping[str, Any]) -> None:
    """Write every part to a file of its name, and `facts` into `meta.json`.

    Args:
        folder: does not exist yet.
        parts: content for `torch.save`, by file name.
        facts: further entries of `meta.json`, plain data.

    Raises:
        CheckpointError: the folder exists, or the file system refuses (disk full, no permission).
    """
    hidden = _hidden(folder)
    try:
        if folder.exists():
            raise FileExistsError("exists already")
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(hidden, ignore_errors=True)
        hidden.mkdir()
        files = {name: _save(hidden / name, content) for name, content in parts.items()}
        text = json.dumps({"format": FORMAT, **facts, "files": files}, indent=2) + "\n"
        with _Recorder(hidden / META) as file:
            file.write(text.encode())
        _sync_folder(hidden)
        hidden.rename(folder)
        _sync_folder(folder.parent)
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        raise CheckpointError(
            f"{folder}: cannot be written ({error.strerror or error}); what was there before is"
            " unharmed; free space or set checkpointing.save_dir to another disk"
        ) from error


def remove_parts(folder: Path) -> None:
    """Delete such a folder; broken off, it leaves no half of one under its name.

    Raises:
        CheckpointError: the file system refuses.
    """
    try:
        shutil.rmtree(folder.rename(_hidden(folder)))
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be deleted ({error.strerror or error})") from error


def remove_unfinished(directory: Path, pattern: str) -> int:
    """Delete what writers and deleters of folders named `pattern` left when they were killed, or
    when the file system refused.

    Returns:
        how many are gone.
    """
    left = list(directory.glob(f".{pattern}{UNFINISHED}"))
    for hidden in left:
        shutil.rmtree(hidden, ignore_errors=True)
    return sum(not hidden.exists() for hidden in left)


def read_meta(folder: Path) -> dict[str, Any]:
    """What `meta.json` says; its list of files has the right form.

    Raises:
        CheckpointError: it is missing, damaged or of a later format.
    """
    path = folder / META
    try:
        with path.open("rb") as file:
            meta = json.loads(file.read(_LONGEST_META))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: missing, so the folder is not whole") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: damaged ({type(error).__name__})") from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else meta
        raise CheckpointError(f"{path}: format={shown(found)}; allowed: {FORMAT}")
    files = meta.get("files")
    if not isinstance(files, dict) or not all(map(_is_entry, files.items())):
        raise CheckpointError(f"{path}: files={shown(files)}; allowed: {{name: {{bytes, sha256}}}}")
    return meta


def _is_entry(entry: tuple[str, Any]) -> bool:
    """A plain name, which leads to no other folder, with a size and a hash."""
    name, facts = entry
    if not isinstance(facts, dict) or Path(name).name != name:
        return False
    return is_integer(facts.get("bytes")) and isinstance(facts.get("sha256"), str)


def check_parts(folder: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare the folder with the list in its `meta.json`.

    Files of another kind beside them (`README.md`) are never read, so they may be there.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or was not saved with the others.
    """
    for path in sorted(folder.glob("*.pt")):
        if path.name not in files:
            raise CheckpointError(f"{path}: foreign, not listed in {META}")
    # Sizes of all first: a copy that broke off shows there, and hashes take their time.
    for name, facts in files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointError(f"{path}: missing, but listed in {META}")
        size = path.stat().st_size
        if size != facts["bytes"]:
            how = "truncated" if size < facts["bytes"] else "foreign"
            raise CheckpointError(f"{path}: {how}, has {size} bytes of {facts['bytes']}")
    for name, facts in files.items():
        if _digest(folder / name) != facts["sha256"]:
            raise CheckpointError(f"{folder / name}: changed or foreign, its sha256 is another one")


def _digest(path: Path) -> str:
    try:
        facts = path.stat()
        return _digest_of(path.resolve(), facts.st_ino, facts.st_mtime_ns, facts.st_ctime_ns)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error


@functools.lru_cache(maxsize=1024)  # a run reads its checkpoint several times when it starts
def _digest_of(path: Path, inode: int, modified: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _hidden(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}{UNFINISHED}")


def _save(path: Path, content: Any) -> dict[str, Any]:
    import torch

    with _Recorder(path) as file:
        torch.save(content, cast(IO[bytes], file))
    return {"bytes": file.size, "sha256": file.hash.hexdigest()}


class _Recorder:
    """A file that hashes what is written, and is on the disk once it is closed.

    An error of the disk waits for the end: on its way through torch's writer it would become
    another one, without its reason.

    Raises:
        OSError: on leaving, if anything was refused.
    """

    def __init__(self, path: Path) -> None:
        self.size, self.hash = 0, hashlib.sha256()
        self._file = path.open("xb")
        self._error: OSError | None = None

    def write(self, data: Any) -> int:
        """Append bytes."""
        length = memoryview(data).nbytes
        if self._error is None:
            self.hash.update(data)
            self.size += length
            try:
                self._file.write(data)
            except OSError as error:
                self._error = error
        return length

    def flush(self) -> None:
        """What is left goes out at the end."""

    def __enter__(self) -> "_Recorder":
        return self

    def __exit__(self, *problem: object) -> None:
        try:
            with self._file:
                if self._error is None:
                    self._file.flush()
                    os.fsync(self._file.fileno())
        except OSError as error:
            self._error = self._error or error
        if self._error is not None:
            raise self._error


def _sync_folder(folder: Path) -> None:
    """Names are on the disk only after this."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems know this for files only.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)
