"""What stands in the places of a checkpoint that are used as numbers: weights, averages, rates.

A file that can be read safely may still hold tensors without values, or with far more of them than
the file has bytes.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.errors import CheckpointError
from runtime.excerpt import shown
from runtime.key_kinds import is_integer, is_number

if TYPE_CHECKING:
    from torch import Tensor


_MORE_BYTES = 2**26  # what reading may add, as conditioning that a network of bd3lms lacks


def check_content(path: Path, content: Mapping[str, Any]) -> None:
    """Raise CheckpointError for weights, averages or rates that no run can have written.

    Args:
        path: the file or folder, for the message.
        content: a checkpoint; entries that it lacks are not checked.
    """
    for problem in _problems(path, content):
        raise CheckpointError(f"{path}: {problem}")


def stored_bytes(state: Mapping[str, "Tensor"]) -> int:
    """Bytes that these tensors take in their file; what shares memory counts once."""
    storages = (value.untyped_storage() for value in state.values())
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def _problems(path: Path, content: Mapping[str, Any]) -> Iterator[str]:
    if "state_dict" in content:
        state = content["state_dict"]
        if not isinstance(state, Mapping):
            yield f"state_dict={shown(state)}: allowed are names and tensors"
            return
        yield from _odd_tensors("state_dict.", state.items())
        found, size = stored_bytes(state), path.stat().st_size if path.is_file() else None
        if size is not None and found > 2 * size + _MORE_BYTES:
            yield f"state_dict: {found} bytes in a file of {size}"
    if "global_step" in content and not _is_count(content["global_step"]):
        yield f"global_step={shown(content['global_step'])}: allowed is a count"
    if content.get("ema") is not None:
        yield from _odd_average(content["ema"])
    interval = content.get("sampling_interval")
    if interval is not None and not _is_interval(interval):
        yield "sampling_interval: allowed [low, high] with 0 <= low <= high <= 1"


def _odd_average(ema: Any) -> Iterator[str]:
    if not isinstance(ema, Mapping) or not isinstance(ema.get("shadow_params"), list):
        yield "ema: allowed {decay, num_updates, shadow_params}"
        return
    decay, updates = ema.get("decay"), ema.get("num_updates")
    if decay is None or not is_number(decay) or not 0.0 <= decay < 1.0:
        yield f"ema.decay={shown(decay)}: allowed 0 <= decay < 1"
    if not _is_count(updates):
        yield f"ema.num_updates={shown(updates)}: allowed is a count"
    yield from _odd_tensors("ema.shadow_params.", enumerate(ema["shadow_params"]))


def _odd_tensors(prefix: str, items: Iterable[tuple[Any, Any]]) -> Iterator[str]:
    for name, value in items:
        reason = _oddity(value)
        if reason is not None:
            yield f"{prefix}{shown(name)}: {reason}; allowed: a dense tensor of real numbers"


def _oddity(value: Any) -> str | None:
    import torch

    if type(value) not in (torch.Tensor, torch.nn.Parameter):
        return "no tensor" if not isinstance(value, torch.Tensor) else shown(type(value).__name__)
    if value.is_meta:
        return "a tensor without values (device meta)"
    if value.layout is not torch.strided or value.is_nested:
        return f"a tensor of layout {value.layout}"
    if value.is_complex() or value.is_quantized:
        return f"a tensor of {value.dtype}"
    # A stride of 0 makes a tensor of any size from a single number.
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        return f"shape {tuple(value.shape)} with {value.untyped_storage().nbytes()} bytes behind it"
    return None


def _is_count(value: Any) -> bool:
    return is_integer(value) and value >= 0


def _is_interval(value: Any) -> bool:
    if not isinstance(value, list | tuple) or len(value) != 2 or not all(map(is_number, value)):
        return False
    return 0.0 <= value[0] <= value[1] <= 1.0
