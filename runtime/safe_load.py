"""The one place where a checkpoint file is opened: as data, through torch's restricted reader."""

import codecs
import pickle
import pickletools
import re
import warnings
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from runtime.config import one_line
from runtime.errors import CheckpointError
from runtime.excerpt import shown

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

    _refuse_allocations(path)
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
        reason = shown(one_line(str(error)), 160)
        raise CheckpointError(f"{path}: damaged or not a checkpoint ({reason})") from error


# Torch's restricted reader would call these with a number, or with a tensor that repeats one, which
# says how much memory to take.
_TAKES_MEMORY = re.compile(
    r"builtins\.bytearray|torch\.(\w+\.)*[A-Z]\w+Tensor|torch\._utils\._rebuild_(device|xla)_\w+"
)
_MAGIC = b"PK\x03\x04"  # by which torch tells a zip file
_PARTS = 5  # pickles in a file of the older format


def _refuse_allocations(path: Path) -> None:
    """Raise Refused for a file that wants to call what makes much memory of few bytes.

    Only names are looked at; whether the others are allowed is for torch to say.
    """
    try:
        for name in _names(path):
            if _TAKES_MEMORY.fullmatch(name):
                raise Refused(f"{path}: {_refusal('', name)}", name)
    except Refused:
        raise
    except Exception as error:  # a reader of arbitrary bytes may stumble in any way
        reason = shown(one_line(str(error)), 160)
        raise CheckpointError(
            f"{path}: damaged or not a checkpoint ({reason}); nothing was executed"
        ) from error


def _names(path: Path) -> Iterator[str]:
    """The dotted names in the pickles of a file, found as torch finds them."""
    import torch

    with path.open("rb") as file:
        if file.peek(len(_MAGIC))[: len(_MAGIC)] == _MAGIC:
            # Its own reader: of two entries of one name, another might see the other one.
            record = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
            yield from _globals(record)
            return
        for _ in range(_PARTS):
            if file.peek(1):
                yield from _globals(file)


def _globals(pickled: bytes | IO[bytes]) -> Iterator[str]:
    """Names in one pickle, and those of codecs where they may be arguments of `_codecs.encode`."""
    memo: dict[Any, Any] = {}
    top: Any = None  # what was pushed last, if it is a text
    for opcode, argument, _ in pickletools.genops(pickled):
        if opcode.name in ("BINPUT", "LONG_BINPUT"):
            memo[argument] = top
            continue
        if opcode.name == "GLOBAL":
            # As torch reads them, with the names of Python 2.
            module, _, name = str(argument).partition(" ")
            module, name = NAME_MAPPING.get((module, name), (module, name))
            yield f"{IMPORT_MAPPING.get(module, module)}.{name}"
        elif opcode.name.startswith("TUPLE") and _lengthens(top):
            raise ValueError(f"encoded as {top}")
        is_get = opcode.name in ("BINGET", "LONG_BINGET")
        top = memo.get(argument) if is_get else argument


def _lengthens(codec: Any) -> bool:
    """Whether a text names a codec of bytes to bytes: hex of hex of hex doubles every time."""
    if not isinstance(codec, str | bytes) or not 0 < len(codec) <= 20:
        return False
    try:
        name = codec if isinstance(codec, str) else codec.decode()
        return not codecs.lookup(name)._is_text_encoding
    except (LookupError, ValueError):
        return False


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
