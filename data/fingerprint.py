"""Stable identities: hashes of values, texts and files that do not change between processes."""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.errors import DataError


def fingerprint(value: Any) -> str:
    """16 hexadecimal digits that identify a value made of dicts, lists, strings and numbers."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def unit_hash(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: the side of a split it falls on."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return (int.from_bytes(digest, "big") >> 11) / 2**53


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Identity of the bytes of several files, in order; their names and dates do not matter."""
    return fingerprint([_file_digest(path) for path in paths])


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
