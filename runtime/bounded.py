"""Building the network of a file: sizes are numbers that anybody can write into a small file."""

import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from runtime.content import stored_bytes
from runtime.errors import CheckpointError
from runtime.excerpt import shown
from runtime.keys import KEYS, MAX_LENGTH

if TYPE_CHECKING:
    from torch import Tensor

_SECTIONS = ("algo", "block_size", "masking", "model", "seed", "training")
# Weights may be stored in fewer bits than they are built in, may share memory, and a network may
# replace some while it is built.
_TIMES, _MORE_TENSORS, _MORE_BYTES = 8, 1000, 2**26


class _TooLarge(Exception):
    """Not an Exception that a network may raise itself."""


def check_values(where: Any, config: Mapping[str, Any]) -> None:
    """Raise CheckpointError for a value of the model's own sections that no run can have had."""
    for key in KEYS:
        section, *names = key.path.split(".")
        node: Any = config.get(section) if section in _SECTIONS else None
        for name in names:
            node = node.get(name) if isinstance(node, Mapping) else None
        if node is not None and not key.test(node):
            raise CheckpointError(f"{where}: {key.path}={shown(node)}: allowed {key.allowed}")
    # No weight is as long as a sequence.
    length = (config.get("model") or {}).get("length", 1)
    if length > MAX_LENGTH:
        raise CheckpointError(f"{where}: model.length={shown(length)}: allowed up to {MAX_LENGTH}")


@contextmanager
def no_larger_than(where: Any, state: Mapping[str, "Tensor"]) -> Iterator[None]:
    """Inside, this thread may build no network that is far larger than these weights.

    A parameter is counted when a module gets it, before it is initialised: until then its memory
    is only reserved.

    Raises:
        CheckpointError: the network is larger, or cannot be built from such a configuration.
    """
    from torch.nn.modules.module import register_module_parameter_registration_hook

    tensors = _TIMES * len(state) + _MORE_TENSORS
    size = _TIMES * stored_bytes(state) + _MORE_BYTES
    owner = threading.get_ident()

    def count(module: Any, name: str, parameter: "Tensor | None") -> None:
        """Take a parameter off the allowance, before it is filled."""
        nonlocal tensors, size
        if parameter is None or threading.get_ident() != owner:
            return
        tensors -= 1
        size -= parameter.numel() * parameter.element_size()
        if tensors < 0 or size < 0:
            raise _TooLarge

    hook = register_module_parameter_registration_hook(count)
    try:
        yield
    except _TooLarge as error:
        raise CheckpointError(
            f"{where}: the network of its configuration is far larger than its"
            f" {len(state)} tensors of {stored_bytes(state)} bytes"
        ) from error
    # Torch reports sizes that cannot be by RuntimeError, a lacking key is a KeyError.
    except (
        ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError,
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {shown(str(error))}"
        raise CheckpointError(f"{where}: no network of its configuration ({reason})") from error
    finally:
        hook.remove()
