"""Which target this is: digests of weights, configuration, vocabulary and chat template."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
