"""Which target this is: digests of weights, configuration, vocabulary and chat template."""

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

# What a saved config says of how it was saved, not of what the model computes.
_VOLATILE = (
    "_name_or_path",
    "transformers_version",
    "dtype",
    "torch_dtype",
    "_attn_implementation",
)


def digest(value: Any) -> str:
    """16 hexadecimal digits that identify a value made of dicts, lists, strings and numbers."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def described(value: Any) -> Any:
    """Class and attributes of an object, down to plain values: what `repr` says of some and of
    others not, whose address it names, so that two processes would find them different."""
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if isinstance(value, list | tuple):
        return [described(part) for part in value]
    if isinstance(value, Mapping):
        return {str(key): described(part) for key, part in value.items()}
    if dataclasses.is_dataclass(value):
        found = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    else:
        found = getattr(value, "__dict__", {})
    return {"class": type(value).__qualname__} | described(found)


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Identity of named tensors by their bytes, in whatever order they come."""
    hashed = hashlib.sha256()
    for name, tensor in sorted(tensors, key=lambda pair: pair[0]):
        plain = tensor.detach().cpu().contiguous()
        hashed.update(f"{name} {plain.dtype} {list(plain.shape)}".encode())
        hashed.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return hashed.hexdigest()


def folder_fingerprint(folder: Path) -> str:
    """Identity of the config and of the bytes of the weights.

    Raises:
        OSError: a file cannot be read.
    """
    config = json.loads((folder / "config.json").read_text())
    weights = []
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            weights.append(hashlib.file_digest(file, "sha256").hexdigest())
    return digest([config_identity(config), digest(weights)])


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identity of a tokenizer's vocabulary and chat template, which a model's weights do not
    determine: folders with the same weights may speak to them in other ways."""
    return digest([tokenizer.get_vocab(), tokenizer.chat_template])


def config_identity(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config decides what the model computes."""
    return {key: value for key, value in config.items() if key not in _VOLATILE}
