"""What a file or a user said, as it may stand in a message of one line."""

from typing import Any

_LENGTH = 80


def shown(value: Any, length: int = _LENGTH) -> str:
    """A text or a number cut to `length`, control characters escaped; of anything else its type.

    Objects from a file are not printed: what they nest in themselves may double at every level.
    """
    if not (value is None or isinstance(value, str | bool | int | float)):
        return type(value).__name__
    text = str(value)
    # Without the quotes that repr adds, a plain value reads as the command line spells it.
    escaped = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[: length + 1])
    return escaped if len(escaped) <= length else f"{escaped[: length - 3]}..."
