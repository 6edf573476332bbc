"""Tensors as they should lie in a file: what is tied once, and no more bytes than are meant.

`torch.save` writes whole storages. Tensors that share one are written once, which is right for tied
weights; but a row of a large table takes the table along.
"""

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


def compact(tree: Any) -> Any:
    """`tree` with copies in place of views that use only a part of their storage.

    Views that together fill their storage go on sharing it, and equal views share their copy.

    Args:
        tree: nested dicts, lists and tuples; it is not changed.
    """
    by_storage: dict[tuple, list[Tensor]] = defaultdict(list)
    for tensor in _tensors(tree):
        by_storage[_storage(tensor)].append(tensor)
    replaced: dict[int, Tensor] = {}
    for tensors in by_storage.values():
        views = {_view(tensor): tensor for tensor in tensors}
        used = sum(view.numel() * view.element_size() for view in views.values())
        if used < tensors[0].untyped_storage().nbytes():
            copies = {key: view.detach().clone() for key, view in views.items()}
            replaced |= {id(tensor): copies[_view(tensor)] for tensor in tensors}
    return _replace(tree, replaced) if replaced else tree


def ties(state: Mapping[str, "Tensor"]) -> dict[str, str]:
    """Names of tensors that are another one under a second name: {second: first}."""
    first: dict[tuple, str] = {}
    aliases = {}
    for name, tensor in state.items():
        if not _is_plain(tensor) or not tensor.numel():
            continue
        key = _storage(tensor) + _view(tensor)
        if key in first:
            aliases[name] = first[key]
        first.setdefault(key, name)
    return aliases


def _storage(tensor: "Tensor") -> tuple:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _view(tensor: "Tensor") -> tuple:
    """Which part of its storage a tensor is, and how."""
    return tensor.dtype, tensor.storage_offset(), tuple(tensor.shape), tensor.stride()


def _is_plain(value: Any) -> bool:
    import torch

    is_tensor = type(value) in (torch.Tensor, torch.nn.Parameter)
    return is_tensor and value.layout is torch.strided and not value.is_meta


def _tensors(tree: Any) -> Iterator["Tensor"]:
    if isinstance(tree, dict | list | tuple):
        for value in tree.values() if isinstance(tree, dict) else tree:
            yield from _tensors(value)
    elif _is_plain(tree):
        yield tree


def _replace(tree: Any, replaced: Mapping[int, "Tensor"]) -> Any:
    if isinstance(tree, dict):
        # Copied, because the state of a module carries its version numbers as an attribute.
        found = copy.copy(tree)
        found.update({key: _replace(value, replaced) for key, value in tree.items()})
        return found
    if isinstance(tree, list | tuple):
        return type(tree)([_replace(value, replaced) for value in tree])
    return replaced.get(id(tree), tree)
