"""A draft as a folder that SGLang, vLLM and z-lab's own tools load: config.json, model.safetensors.

The layout is the one of z-lab's published drafts: 58 tensors for five layers, no embedding, no
head; `runtime.dflash.config_json` has the configuration. The layout of `speculators` is another
one, whose layer ids are larger by one; it is not read here.

A folder is untrusted: names and shapes are compared before a tensor is read or made.
"""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.dflash import DFlashNetwork
from models.dflash_config import DFlashConfig
from runtime.config import one_line
from runtime.dflash.config_json import ARCHITECTURES, architecture, config_json, parse_config
from runtime.errors import CheckpointError, ConfigError
from runtime.excerpt import shown
from runtime.export import UNFINISHED, staged

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
_STORED = ("BF16", "F16", "F32")
_MAX_JSON, _MAX_NAMES = 2**20, 100


def write_draft(
    folder: Path,
    config: DFlashConfig,
    state: Mapping[str, Tensor],
    dtype: str = "bfloat16",
    card: str | None = None,
) -> None:
    """Write the two files; exact where the weights are representable in `dtype`.

    Args:
        folder: new, empty, or one with a draft, which is replaced.
        config: the shape.
        state: the network's parameters.
        dtype: bfloat16, float16 or float32.
        card: text of a README.md beside them; None leaves what is there.

    Raises:
        ConfigError: a dtype that is not here, or a draft that others would read wrongly.
        CheckpointError: the folder holds something else, or cannot be written.
    """
    from safetensors.torch import save_file

    if dtype not in DTYPES:
        raise ConfigError(f"dtype={dtype}: allowed {', '.join(DTYPES)}")
    if config.num_target_layers - 1 in config.target_layer_ids:
        raise ConfigError(
            f"target_layer_ids={list(config.target_layer_ids)}: the last layer cannot be exported,"
            " other programs read it behind the final norm; allowed 0 to"
            f" {config.num_target_layers - 2}"
        )
    _refuse_other_model(folder)
    _check_tensors(folder, config, {name: tuple(tensor.shape) for name, tensor in state.items()})
    tensors = {
        name: tensor.detach().to("cpu", DTYPES[dtype]).contiguous()
        for name, tensor in state.items()
    }
    with staged(folder) as inside:
        save_file(tensors, inside / WEIGHTS, metadata={"format": "pt"})
        content = config_json(config, dtype)
        (inside / CONFIG).write_text(json.dumps(content, indent=2) + "\n")
        if card is not None:
            (inside / CARD).write_text(card)
        # safetensors lets nobody but the owner read what it writes.
        shutil.copymode(inside / CONFIG, inside / WEIGHTS)


def _refuse_other_model(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder}: is no folder")
    if (folder / CONFIG).exists():
        name = architecture(_read_json(folder / CONFIG))
        if name not in ARCHITECTURES:
            raise CheckpointError(
                f"{folder}: holds another model ({shown(name)}); allowed: a new folder, or"
                " one with a draft"
            )
        return
    found = [] if not folder.exists() else sorted(file.name for file in folder.iterdir())
    other = next((name for name in found if not name.startswith(UNFINISHED)), None)
    if other is not None:
        raise CheckpointError(
            f"{folder}: holds something else ({shown(other)}); allowed: a new folder, an empty one,"
            " or one with a draft"
        )


def load_draft(
    folder: Path, *, dtype: torch.dtype = torch.float32, attn_backend: str = "auto"
) -> DFlashNetwork:
    """The network of a folder, on the CPU.

    Args:
        folder: config.json and model.safetensors, by `write_draft` or in z-lab's layout.
        dtype: of the parameters.
        attn_backend: as for the network.

    Raises:
        CheckpointError: a file is missing, damaged, or does not fit the other.
    """
    config = read_config(folder)
    state = _read_tensors(folder, config)
    with torch.device("meta"):
        network = DFlashNetwork(config, attn_backend)
    network.load_state_dict({k: v.to(dtype) for k, v in state.items()}, assign=True)
    return network


def _read_tensors(folder: Path, config: DFlashConfig) -> dict[str, Tensor]:
    """All tensors without the prefix, after their names and shapes have been checked."""
    from safetensors import SafetensorError, safe_open

    path = folder / WEIGHTS
    try:
        with safe_open(path, framework="pt") as file:
            stored = set(file.keys())
            names = {name: name.removeprefix("model.") for name in stored}
            twice = sorted(ours for theirs, ours in names.items() if theirs != ours in stored)
            if twice:
                raise CheckpointError(
                    f"{path}: {_listed(twice)} both with and without 'model.' before the name"
                )
            slices = {ours: file.get_slice(theirs) for theirs, ours in names.items()}
            _check_tensors(path, config, {k: tuple(s.get_shape()) for k, s in slices.items()})
            _check_dtypes(path, {name: part.get_dtype() for name, part in slices.items()})
            return {ours: file.get_tensor(theirs) for theirs, ours in names.items()}
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))
        raise CheckpointError(f"{path}: cannot be read ({shown(reason, 160)})") from error


def _check_tensors(where: Path, config: DFlashConfig, shapes: Mapping[str, tuple]) -> None:
    """Raise CheckpointError naming every tensor that is missing, unknown or of another shape."""
    with torch.device("meta"):
        expected = {k: tuple(v.shape) for k, v in DFlashNetwork(config).state_dict().items()}
    missing = [name for name in expected if name not in shapes]
    unknown = [name for name in shapes if name not in expected]
    misshapen = [
        f"{name} {list(shapes[name])} in place of {list(shape)}"
        for name, shape in expected.items()
        if shapes.get(name, shape) != shape
    ]
    parts = (("missing", missing), ("unexpected", unknown), ("of another shape", misshapen))
    faults = [f"{what}: {_listed(names)}" for what, names in parts if names]
    if faults:
        raise CheckpointError(f"{where}: tensors do not fit {CONFIG}: {'; '.join(faults)}")


def _check_dtypes(where: Path, dtypes: Mapping[str, str]) -> None:
    odd = [f"{name} is {dtype}" for name, dtype in dtypes.items() if dtype not in _STORED]
    if odd:
        raise CheckpointError(f"{where}: {_listed(odd)}; allowed {', '.join(_STORED)}")


def _listed(names: Iterable[str]) -> str:
    ordered = sorted(names)
    rest = f" and {len(ordered) - _MAX_NAMES} more" if len(ordered) > _MAX_NAMES else ""
    return ", ".join(shown(name, 160) for name in ordered[:_MAX_NAMES]) + rest


def read_config(folder: Path) -> DFlashConfig:
    """config.json as our configuration; keys that change nothing are passed over.

    Raises:
        CheckpointError: a value is missing, of a wrong type or size, said twice and differently,
            or asks for something that this network does not do.
    """
    path = folder / CONFIG
    content = _read_json(path)
    try:
        return parse_config(content)
    except ValueError as error:
        raise CheckpointError(f"{path}: {one_line(shown(str(error), 400))}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_JSON + 1)
        if len(text) > _MAX_JSON:
            raise ValueError(f"more than {_MAX_JSON} bytes")
        content = json.loads(text)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or one_line(str(error))
        raise CheckpointError(f"{path}: cannot be read ({shown(reason, 160)})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: {shown(content)}: allowed an object with keys")
    return content


def is_draft(folder: Path) -> bool:
    """Whether a folder looks like a draft in this format."""
    if not (folder / CONFIG).is_file():
        return False
    return architecture(_read_json(folder / CONFIG)) in ARCHITECTURES
