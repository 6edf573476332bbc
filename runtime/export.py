"""A model as a folder without a pickle: safetensors, JSON, and the tokenizer's own files.

`model.safetensors` has one set of weights; `config.json` the configuration, the special tokens, the
training step and the provenance; `tokenizer.json` and its neighbours are what transformers'
`save_pretrained` writes.
"""

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.config import one_line
from runtime.errors import CheckpointError
from runtime.excerpt import shown
from runtime.portable import portable

if TYPE_CHECKING:
    from torch import Tensor

ORIGIN = "mode=export"
FORMAT, MODEL_TYPE = 1, "palimpsest"
UNFINISHED = ".export-"
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
    """Write the files; errors of the file system are for `staged`.

    Args:
        folder: where, an existing folder.
        state: the weights to publish.
        config: our configuration; what belongs to the machine is left out.
        tokenizer: the transformers tokenizer.
        state_of_tokenizer: what `data.tokenization.tokenizer_state` says of it.
        facts: further entries of config.json, plain data: global_step, provenance, weights ("ema"
            or "raw") and origin (where they were imported from, or None) are needed to read it.
    """
    from safetensors.torch import save_file

    content = {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        **facts,
        "config": _portable(config),
        "tokenizer": {k: v for k, v in state_of_tokenizer.items() if k != "backend"},
    }
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    (folder / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
    # safetensors lets nobody but the owner read what it writes, unlike the rest of the folder.
    shutil.copymode(folder / CONFIG, folder / WEIGHTS)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A folder to write into, whose files go to `folder` once all of them are written.

    If it breaks off, `folder` is as it was before. Files of other names in it stay.

    Raises:
        CheckpointError: the file system refuses, or what is written cannot be.
    """
    from safetensors import SafetensorError

    folder, is_new = folder.resolve(), not folder.exists()
    inside: Path | None = None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Inside, and not beside: to move a file must not need the room for a second one.
        inside = Path(tempfile.mkdtemp(prefix=UNFINISHED, dir=folder))
        yield inside
        for file in sorted(inside.iterdir()):
            file.replace(folder / file.name)
    except CheckpointError as error:
        raise CheckpointError(str(error).replace(str(inside), str(folder))) from None
    except Exception as error:
        # Writers in Rust, of the weights and of the tokenizer, raise exceptions of their own.
        if not isinstance(error, OSError | SafetensorError) and type(error) is not Exception:
            raise
        reason = getattr(error, "strerror", None) or one_line(str(error)) or type(error).__name__
        raise CheckpointError(f"{folder}: cannot be written ({shown(reason, 160)})") from None
    finally:
        if inside is not None:
            shutil.rmtree(inside, ignore_errors=True)
        if is_new and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()


def may_be_overwritten(folder: Path, card: str, others: Sequence[str]) -> bool:
    """Whether a folder is new, empty, or one that an export wrote.

    Args:
        folder: any path.
        card: name of the model card.
        others: names of files by which an export in another format is known.
    """
    if not folder.exists():
        return True
    if not folder.is_dir():
        return False
    try:
        if all(file.name.startswith(UNFINISHED) for file in folder.iterdir()):
            return True
        if is_export(folder):
            return json.loads((folder / CONFIG).read_text())["model_type"] == MODEL_TYPE
        is_other = any((folder / name).is_file() for name in others)
        return is_other and f"library_name: {MODEL_TYPE}" in (folder / card).read_text()
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _portable(config: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration without places on this machine."""
    return portable({key: value for key, value in config.items() if key not in _LEFT_OUT})


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
                f"{folder / CONFIG}: format={shown(content['format'])}; allowed: {FORMAT}"
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
        reason = shown(one_line(str(error)), 160)
        raise CheckpointError(
            f"{folder}: damaged or not a folder of mode=export ({type(error).__name__}: {reason})"
        ) from error
