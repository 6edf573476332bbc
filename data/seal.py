"""A checksum inside Arrow files: before the footer, where Arrow readers do not look."""

import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

# Before the footer: a mark and the CRC-32 of all other bytes. Behind it: its length, and "ARROW1".
_SEAL = struct.Struct("<4sI")
_MARK = b"crc\0"
_ENDING = struct.Struct("<I6s")


def is_intact(path: Path) -> bool:
    """Whether the bytes are those that were written: a guard against damage, not forgery."""
    if path.stat().st_size < _ENDING.size + _SEAL.size:
        return False
    data = np.memmap(path, np.uint8, mode="r")
    tail = _tail_size(data[-_ENDING.size :].tobytes())
    seal = len(data) - tail - _SEAL.size
    if seal < 0:
        return False
    mark, expected = _SEAL.unpack_from(data.data, seal)
    found = zlib.crc32(data[seal + _SEAL.size :].data, zlib.crc32(data[:seal].data))
    return mark == _MARK and found == expected


def seal(file: BinaryIO) -> None:
    """Move the footer of a complete Arrow file back and put the checksum before it."""
    file.flush()
    checksum = zlib.crc32(np.memmap(file, np.uint8, mode="r").data)
    file.seek(-_ENDING.size, os.SEEK_END)
    size = _tail_size(file.read())
    file.seek(-size, os.SEEK_END)
    tail = file.read()
    file.seek(-size, os.SEEK_END)
    file.write(_SEAL.pack(_MARK, checksum) + tail)


def _tail_size(ending: bytes) -> int:
    """Bytes from the beginning of the footer to the end of the file."""
    footer, _ = _ENDING.unpack(ending)
    return footer + _ENDING.size
