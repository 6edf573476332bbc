"""The whole state of a run as a folder of parts, `checkpoint-00008706-20260501_081812/`.

    model.pt         {name: tensor}; tied weights lie in it once and come back tied
    optimizer.pt     states of the optimisers, a list (of one)
    scheduler.pt     states of the learning rate schedules, a list (of one)
    eval_batches.pt  batches that curves are measured on, a list of {name: tensor}, often empty
    rng_rank{r}.pt   random generators of rank r; the place in the data follows from the step
    ema.pt           moving average of the weights, where there is one
    trainer.pt       the rest, small: configuration, tokenizer, counters, callbacks, data
    meta.json        step, world size, time, provenance, ties, and the list of the files

The name has the optimiser steps and the time of saving (UTC). `runtime.parts` says how it is
written and verified; reading executes nothing (`runtime.safe_load`).
"""

import re
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from runtime.compact import compact, ties
from runtime.content import check_content
from runtime.errors import CheckpointError
from runtime.excerpt import shown
from runtime.key_kinds import is_integer
from runtime.parts import META, check_parts, read_meta, write_parts
from runtime.safe_load import load_data

PATTERN = "checkpoint-*"
_NAME = re.compile(r"checkpoint-(\d{8,12})-\d{8}_\d{6}")
# Key of the checkpoint, and the type of what it holds, by file.
_PARTS: dict[str, tuple[str, type]] = {
    "model.pt": ("state_dict", dict),
    "optimizer.pt": ("optimizer_states", list),
    "scheduler.pt": ("lr_schedulers", list),
    "eval_batches.pt": ("eval_batches", list),
    "ema.pt": ("ema", dict),
}
_AVERAGE, _REST = "ema.pt", "trainer.pt"
_NEEDED = ("state_dict", "optimizer_states", "lr_schedulers", "global_step")


def folder_name(step: int) -> str:
    """The name of a state that is saved now, after `step` optimiser steps."""
    return f"checkpoint-{step:08d}-{datetime.now(UTC):%Y%m%d_%H%M%S}"


def step_of(folder: Path) -> int | None:
    """The optimiser steps in the name of a full state; None for another name."""
    found = _NAME.fullmatch(folder.name)
    return None if found is None else int(found.group(1))


def is_full_state(path: Path) -> bool:
    """Whether a folder is meant to be a full state: by its name, or because of its `meta.json`."""
    return path.is_dir() and (step_of(path) is not None or (path / META).is_file())


def full_states(directory: Path) -> list[Path]:
    """Folders in `directory` named as full states, whole or not, oldest step first."""
    named = [(step_of(path), path.name, path) for path in directory.glob(PATTERN) if path.is_dir()]
    return [path for step, _, path in sorted(entry for entry in named if entry[0] is not None)]


def write_full_state(checkpoint: Mapping[str, Any], folder: Path) -> None:
    """Write a checkpoint of ours, as Lightning gathers it, to a new folder.

    Raises:
        CheckpointError: it holds only weights, or the folder cannot be written.
    """
    missing = [key for key in _NEEDED if key not in checkpoint]
    if missing:
        raise CheckpointError(f"{folder}: no {', '.join(missing)} to save; that is no full state")
    rest = {"eval_batches": [], "ema": None, "random_states": [], **checkpoint}
    parts = {name: rest.pop(key) for name, (key, _) in _PARTS.items()}
    if parts[_AVERAGE] is None:
        del parts[_AVERAGE]
    states = rest.pop("random_states")
    parts |= {_rank_file(rank): state for rank, state in enumerate(states)}
    parts = {name: compact(content) for name, content in {**parts, _REST: rest}.items()}
    facts = {
        "step": checkpoint["global_step"],
        "world_size": len(states),
        "saved_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "provenance": checkpoint.get("provenance", {}),
        "ties": ties(parts["model.pt"]),
    }
    write_parts(folder, parts, facts)


def _files(world_size: int) -> set[str]:
    """Names of the files that every full state of so many ranks has."""
    return {*_PARTS, _REST, *map(_rank_file, range(world_size))} - {_AVERAGE}


def _rank_file(rank: int) -> str:
    return f"rng_rank{rank}.pt"


def check_whole(folder: Path) -> dict[str, Any]:
    """What `meta.json` says, after every file was compared with it.

    Raises:
        CheckpointError: a file is missing, truncated, changed, or belongs to another state.
    """
    meta = read_meta(folder)
    for problem in _odd(folder, meta):
        raise CheckpointError(f"{folder / META}: {problem}")
    check_parts(folder, meta["files"])
    return meta


def _odd(folder: Path, meta: Mapping[str, Any]) -> list[str]:
    """What is wrong with the entries that reading relies on."""
    for key in ("step", "world_size"):
        value: Any = meta.get(key)
        if not is_integer(value) or value < 0:
            return [f"{key}={shown(value)}; allowed: a count"]
    files, step, size = meta["files"], meta["step"], meta["world_size"]
    if size > len(files):
        return [f"world_size={size}; allowed: at most the {len(files)} files"]
    expected = _files(size)
    absent, more = expected - files.keys(), files.keys() - expected - {_AVERAGE}
    if absent or more:
        why = "lacks" if absent else "has also"
        return [f"files {why} {shown(sorted(absent or more)[0])}; allowed: those of {size} ranks"]
    if step_of(folder) not in (None, step):
        return [f"step={step}; allowed: {step_of(folder)}, as the folder is named"]
    return []


def read_full_state(folder: Path, map_location: Any = "cpu") -> dict[str, Any]:
    """The checkpoint that was written, with `eval_batches` and `ema` ([] and None if it had none).

    Args:
        folder: a full state, under any name.
        map_location: where tensors go, as for `torch.load`.

    Raises:
        CheckpointError: it is not whole, or a file holds anything but tensors and plain Python.
    """
    meta = check_whole(folder)

    def part(name: str, kind: type) -> Any:
        """What a file of the folder holds."""
        content = load_data(folder / name, map_location)
        if not isinstance(content, kind):
            found = type(content).__name__
            raise CheckpointError(f"{folder / name}: holds {found}; allowed: {kind.__name__}")
        return content

    content = {**part(_REST, dict), "ema": None}
    for name, (key, kind) in _PARTS.items():
        if name in meta["files"]:
            content[key] = part(name, kind)
    if meta["world_size"]:
        ranks = range(meta["world_size"])
        content["random_states"] = [part(_rank_file(rank), dict) for rank in ranks]
    _check_joined(folder, content, meta)
    return content


def _check_joined(folder: Path, content: Mapping[str, Any], meta: Mapping[str, Any]) -> None:
    """Raise CheckpointError for parts that do not belong together."""
    step = content.get("global_step")
    if step != meta["step"]:
        found = f"global_step={shown(step)}"
        raise CheckpointError(f"{folder / _REST}: {found}; allowed: {meta['step']}, as in {META}")
    if not all(isinstance(batch, dict) for batch in content["eval_batches"]):
        raise CheckpointError(f"{folder / 'eval_batches.pt'}: allowed are dicts of tensors")
    model = folder / "model.pt"
    check_content(model, {"state_dict": content["state_dict"]})
    if ties(content["state_dict"]) != meta.get("ties"):
        raise CheckpointError(f"{model}: other tensors are tied than {META} says")
