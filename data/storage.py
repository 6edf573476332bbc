"""Writing cache files so that a reader only ever sees whole ones."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from filelock import FileLock

from data.errors import DataError

CACHE = "paths.cache_dir"  # the key that says where most of these files lie


@contextlib.contextmanager
def exclusive(path: Path, setting: str = CACHE) -> Iterator[None]:
    """Hold the lock of `path`, so that of several ranks one builds and the others then read.

    Args:
        path: the file.
        setting: the key that says where it lies.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(f"{path}.lock")
        lock.acquire()
    except OSError as error:
        raise _cannot_write(path, setting, error) from error
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def atomic_file(path: Path, setting: str = CACHE) -> Iterator[BinaryIO]:
    """A file that appears at `path` complete and on disk, or not at all.

    The caller holds `exclusive(path)`: temporary files found beside `path` belong to a writer
    that was killed, and are removed.

    Args:
        path: the file.
        setting: the key that says where it lies.

    Raises:
        DataError: the file system refuses; a full disk is reported with the bytes needed.
    """
    for stale in path.parent.glob(f".{path.name}.*.tmp"):
        stale.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    written = 0
    try:
        with temporary.open("w+b") as file:
            try:
                yield file
                file.flush()
            finally:
                written = os.fstat(file.fileno()).st_size
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        raise _cannot_write(path, setting, error, written) from error
    finally:
        temporary.unlink(missing_ok=True)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable: the name of a file is data of its folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, setting: str, error: OSError, written: int = 0) -> DataError:
    advice = f"free space or set {setting} to another disk"
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DataError(f"{path}: disk full, more than {written} bytes needed; {advice}")
    return DataError(f"{path}: cannot be written ({error.strerror}); set {setting}")
