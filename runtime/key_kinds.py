"""Kinds of configuration keys: what a value may be, and how a message says so."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

SPLITS = {"train", "validation", "test"}


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        path: dotted name.
        test: whether a value is good; a bool is never taken for a number.
        allowed: what the message says is allowed.
        nullable: null stands for a default decided later.
        optional: the key may be absent, because another component of its group lacks it.
        of: the modules whose components have it; what is built from elsewhere may give an option of
            this name a meaning of its own. Empty: whatever is built.
    """

    path: str
    test: Callable[[Any], bool]
    allowed: str
    nullable: bool = False
    optional: bool = False
    of: str = ""


def is_integer(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite int or float that is not a bool."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < float("inf")


def integer(path: str, low: int, **options: Any) -> Key:
    """An integer of at least `low`."""
    return Key(path, lambda v: is_integer(v) and v >= low, f"an integer >= {low}", **options)


def number(path: str, interval: str, **options: Any) -> Key:
    """`interval` as mathematicians write it: "(0, 1]"; "inf" for no bound."""
    low, high = (float(part) for part in interval[1:-1].split(","))
    above = (lambda v: v >= low) if interval[0] == "[" else (lambda v: v > low)
    below = (lambda v: v <= high) if interval[-1] == "]" else (lambda v: v < high)
    return Key(
        path, lambda v: is_number(v) and above(v) and below(v), f"a number in {interval}", **options
    )


def flag(path: str, **options: Any) -> Key:
    """true or false."""
    return Key(path, lambda v: isinstance(v, bool), "true, false", **options)


def choice(path: str, *choices: Any, **options: Any) -> Key:
    """One of some values."""
    # `1 in (True,)` holds in Python, so types are compared too.
    test = lambda v: any(v == c and type(v) is type(c) for c in choices)  # noqa: E731
    return Key(path, test, ", ".join(str(c).lower() for c in choices), **options)


def text(path: str, **options: Any) -> Key:
    """A text that is not empty."""
    return Key(path, lambda v: isinstance(v, str) and v != "", "a text", **options)


def component(path: str) -> Key:
    """What a group chooses: it has a class or function to build."""
    allowed = f"a choice of its group, {'/'.join(path.rsplit('.', 1))}=NAME"
    test = lambda v: isinstance(v, dict) and "_target_" in v  # noqa: E731
    return Key(path, test, allowed, optional=True)


def is_fraction_or_count(value: Any) -> bool:
    """A float in [0, 1], or a count."""
    whole = is_integer(value) and value >= 0
    return whole or (isinstance(value, float) and 0.0 <= value <= 1.0)


def is_devices(value: Any) -> bool:
    """What `trainer.devices` may be."""
    if is_integer(value):
        return value == -1 or value >= 1
    listed = isinstance(value, list) and value and all(map(is_integer, value))
    return bool(listed) or (isinstance(value, str) and value != "")


def is_names(value: Any) -> bool:
    """A list of texts, which may be empty."""
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def is_texts(value: Any) -> bool:
    """A text, or a list of some."""
    return is_names([value]) or (is_names(value) and value != [])


def is_named_files(value: Any) -> bool:
    """{NAME: FILE, ...}"""
    return (
        isinstance(value, dict)
        and is_texts(list(map(str, value)))
        and all(isinstance(file, str) and file for file in value.values())
    )


def is_values(value: Any) -> bool:
    """{KEY: VALUE}, or the same as a text, KEY=VALUE with commas."""
    return (isinstance(value, dict) and value != {}) or (isinstance(value, str) and "=" in value)


def is_files(value: Any) -> bool:
    """A path or glob, or a list of them, which may be empty."""
    return is_names([value]) or is_names(value)


def is_counts(value: Any) -> bool:
    """{NAME: COUNT, ...}"""
    return isinstance(value, dict) and all(is_integer(n) and n >= 0 for n in value.values())


def is_groups(value: Any) -> bool:
    """{NAME: texts, ...}"""
    return isinstance(value, dict) and all(map(is_texts, value.values()))


def is_widths(value: Any) -> bool:
    """A list of widths of intervals."""
    return isinstance(value, list) and all(
        is_number(width) and 0.01 <= width < 1 for width in value
    )


def is_splits(value: Any) -> bool:
    """Some of the splits."""
    return isinstance(value, list) and bool(value) and set(value) <= SPLITS
