"""A model as a folder without a pickle: safetensors, JSON, and the tokenizer's own files.

`model.safetensors` has one set of weights; `config.json` the configuration, the special tokens, the
training step and the provenance; `tokenizer.json` and its neighbours are what transformers'
`save_pretrained` writes.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.config import one_line
from runtime.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

ORIGIN = "mode=export"
FORMAT = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
# Sections about the machine and the folder of a run.
_LEFT_OUT = (
    "callbacks", "checkpointing", "eval", "hparams_search", "hydra", "logger", "mode",
    "optimized_metric", "paths", "plugins",
)  # fmt: skip


def is_export(path: Path) -> bool:
    """Whether a folder looks like one that `write_export` wrote."""
    return path.is_dir() and all((path / name).is_file() for name in (CONFIG, WEIGHTS))


def write_export(
    folder: Path,
    state: Mapping[str, "Tensor"],
    config: Mapping[str, Any],
    tokenizer: Any,
    state_of_tokenizer: Mapping[str, Any],
    facts: Mapping[str, Any],
) -> None:
    """Write the folder; files of the same names are replaced.

    Args:
        folder: it is made if need be.
        state: the weights to publish.
        config: our configuration; what belongs to the machine is left out.
        tokenizer: the transformers tokenizer.
        state_of_tokenizer: what `data.tokenization.tokenizer_state` says of it.
        facts: further entries of config.json, plain data: global_step, provenance, weights ("ema"
            or "raw") and origin (where they were imported from, or None) are needed to read it.

    Raises:
        CheckpointError: the file system refuses.
    """
    from safetensors.torch import save_file

    content = {
        "model_type": "palimpsest",
        "format": FORMAT,
        **facts,
        "config": _portable(config),
        "tokenizer": {k: v for k, v in state_of_tokenizer.items() if k != "backend"},
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        tokenizer.save_pretrained(folder)
        (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        # safetensors lets nobody but the owner read what it writes, unlike the rest of the folder.
        shutil.copymode(folder / CONFIG, folder / WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from error


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without places on this machine."""
    kept = {key: value for key, value in config.items() if key not in _LEFT_OUT}
    kept["training"] = {**kept["training"], "from_pretrained": None}
    if "data" in kept:
        kept["data"] = {**kept["data"], "cache_dir": None}
    return kept


def read_export(folder: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The folder in the form of a checkpoint of ours; it has no moving average of its own.

    `weights` says which ones they are, and `source` where they were imported from before, or None.

    Raises:
        CheckpointError: a file is missing, damaged or of a later format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        content = json.loads((folder / CONFIG).read_text())
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{folder / CONFIG}: format={content['format']}; allowed: {FORMAT}"
            )
        tokenizer = {"backend": (folder / TOKENIZER).read_text(), **content["tokenizer"]}
        state = load_file(folder / WEIGHTS, device=str(map_location))
        return {
            "state_dict": state,
            "ema": None,
            "hyper_parameters": {"config": content["config"], "tokenizer": tokenizer},
            "global_step": content["global_step"],
            "provenance": content["provenance"],
            "origin": ORIGIN,
            "weights": content["weights"],
            "source": content["origin"],
        }
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = one_line(str(error))[:160]
        raise CheckpointError(
            f"{folder}: damaged or not a folder of mode=export ({type(error).__name__}: {reason})"
        ) from error
