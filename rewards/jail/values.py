"""Plain values as JSON, and back: all that crosses between a program and its tests.

A reader of these makes Python's own types and nothing else, whatever it is sent: an object of a
program's own could equal everything. Mappings of every kind arrive as dictionaries.

    None, bool, str, float, int up to 64 bits    as they are
    larger int                                   ["int", hexadecimal]
    complex                                      ["complex", real, imaginary]
    bytes                                        ["bytes", hexadecimal]
    range                                        ["range", start, stop, step]
    list, tuple, set, frozenset                  [name, part, part, ...]
    dict                                         ["dict", [key, value], [key, value], ...]
"""

from collections import Counter, OrderedDict, defaultdict
from typing import Any

_SEQUENCES: dict[str, Any] = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}
_SEQUENCE_NAMES = {kind: name for name, kind in _SEQUENCES.items()}
_MAPPINGS = frozenset((dict, Counter, OrderedDict, defaultdict))
_LARGEST_BITS = 64


def encode(value: Any) -> Any:
    """A plain value as what JSON knows.

    Raises:
        TypeError: it is none, or a part of it is none.
    """
    kind = type(value)
    if value is None or kind in (bool, str, float):
        return value
    if kind is int:
        return value if value.bit_length() <= _LARGEST_BITS else ["int", hex(value)]
    if kind in _SEQUENCE_NAMES:
        return [_SEQUENCE_NAMES[kind], *map(encode, value)]
    if kind in _MAPPINGS:
        return ["dict", *([encode(key), encode(part)] for key, part in dict.items(value))]
    if kind is range:
        return ["range", *map(encode, (value.start, value.stop, value.step))]
    if kind is bytes:
        return ["bytes", value.hex()]
    if kind is complex:
        return ["complex", value.real, value.imag]
    raise TypeError(f"an object of {kind.__name__}, which is no plain value, cannot be passed")


def decode(value: Any) -> Any:
    """The value that was encoded.

    Raises:
        ValueError: it is not what `encode` makes.
    """
    if not isinstance(value, list):
        if isinstance(value, dict):
            raise ValueError("no plain value: a mapping")
        return value
    try:
        kind, *parts = value
        if kind in _SEQUENCES:
            return _SEQUENCES[kind](map(decode, parts))
        if kind == "dict":
            return {decode(key): decode(part) for key, part in parts}
        if kind == "range":
            return range(*map(decode, parts))
        if kind == "int":
            (digits,) = parts
            return int(digits, 16)
        if kind == "bytes":
            return bytes.fromhex(*parts)
        if kind == "complex":
            return complex(*parts)
    except TypeError as error:
        raise ValueError(f"no plain value: {error}") from error
    raise ValueError(f"no plain value: {kind!r}")
