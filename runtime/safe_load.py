"""The one place where a checkpoint file is opened: as data, through torch's restricted reader."""

import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from runtime.config import one_line
from runtime.errors import CheckpointError

StandIn = tuple[Callable[..., Any], str]


class Refused(CheckpointError):
    """The file wants something that is not data.

    Args:
        message: one line with the file and what it wanted.
        wanted: the dotted name it asked for, where there is one.
    """

    def __init__(self, message: str, wanted: str | None) -> None:
        super().__init__(message)
        self.wanted = wanted


def load_data(path: Path, map_location: Any = "cpu", stand_ins: Iterable[StandIn] = ()) -> Any:
    """The content of a file of `torch.save`; nothing in it is executed.

    Args:
        path: an existing file.
        map_location: where tensors go, as for `torch.load`.
        stand_ins: (what to put there, dotted name) for names that the file may mention. They are
            called with what the file says, so they must be inert.

    Raises:
        Refused: it mentions any other name, or uses one in another way than to build an object.
        CheckpointError: it is damaged or of another kind.
    """
    import torch

    try:
        # mmap reads tensors when they are used; only the zip format of torch >= 1.6 has it.
        mapped = zipfile.is_zipfile(path) and map_location == "cpu"
        silent = warnings.catch_warnings(action="ignore")  # remarks on formats; errors say enough
        with silent, torch.serialization.safe_globals(list(stand_ins)):
            return torch.load(path, map_location=map_location, weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        wanted = _wanted(str(error))
        raise Refused(f"{path}: {_refusal(str(error), wanted)}", wanted) from error
    except Exception as error:  # a reader of arbitrary bytes may stumble in any way
        reason = one_line(str(error))[:160]
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({reason})") from error


def _wanted(message: str) -> str | None:
    """The name that torch's message complains about; it leaves out the module of a builtin."""
    builtin = re.search(r"GLOBAL (\w+) was not an allowed", message)
    if builtin is not None:
        return f"builtins.{builtin.group(1)}"
    dotted = re.search(r"(?:GLOBAL|global:?|class|function)\s+[`<'\w ]*?([\w.]+\.[\w.]+)", message)
    return None if dotted is None else dotted.group(1)


def _refusal(message: str, wanted: str | None) -> str:
    """One line for what torch's restricted reader refused (its own text advises to trust it)."""
    if wanted is None:
        reason = re.search(r"Unpickler error:\s*(.+)", message)
        detail = f" ({reason.group(1)[:80]})" if reason else ""
        return f"damaged or not a checkpoint{detail}; nothing was executed"
    return (
        f"refused, the file wants to load {wanted}; nothing was executed; "
        "allowed: tensors and plain Python values"
    )
