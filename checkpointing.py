"""The full state of a run, opened outside of it: the model, and what its training would go on from.

    from checkpointing import load_full_state

    ckpt = load_full_state("./checkpoint-00008706-20260501_081812/")
    ckpt.model                      # the algorithm with its raw weights, in eval mode
    ckpt.step, len(ckpt.rng)        # optimiser steps done, ranks

Published cards import it from `draft_refine.training.checkpointing`; here the module is
`checkpointing`. To train on, give the folder to a run instead: `python main.py ...
checkpointing.resume_ckpt_path=FOLDER`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algorithm import Algorithm
from runtime.errors import CheckpointError
from runtime.full_state import check_whole, is_full_state, read_full_state


@dataclass(frozen=True)
class FullState:
    """What `load_full_state` found in a folder.

    Attributes:
        model: the built algorithm with the weights that training goes on from.
        optimizer: state of the optimiser, for its `load_state_dict`.
        scheduler: state of the learning rate schedule, likewise.
        eval_batches: the batches that its curves are measured on; empty for most algorithms.
        rng: states of the random generators, one entry per rank; a run on another number of ranks
            cannot continue them and draws new ones from (seed, rank, step).
        step: optimiser steps done.
        meta: content of meta.json: world size, time of saving (UTC), provenance, ties, files.
    """

    model: Algorithm
    optimizer: dict[str, Any]
    scheduler: dict[str, Any]
    eval_batches: list[dict[str, Tensor]]
    rng: list[dict[str, Any]]
    step: int
    meta: dict[str, Any]


def load_full_state(directory: str | Path, map_location: str | torch.device = "cpu") -> FullState:
    """Open a folder that a run with `checkpointing.full_state_every_n_steps` wrote.

    Args:
        directory: the folder, under any name.
        map_location: device of the model and of all tensors.

    Raises:
        CheckpointError: the folder is not whole, hostile, or of something that is no run of ours.
    """
    folder = Path(directory)
    if not is_full_state(folder):
        raise CheckpointError(f"{folder}: no folder of a full state (no meta.json)")
    model = Algorithm.load_from_checkpoint(folder, map_location=map_location, weights="raw")
    content = read_full_state(folder, map_location)
    for key, file in (("optimizer_states", "optimizer.pt"), ("lr_schedulers", "scheduler.pt")):
        if len(content[key]) != 1:
            raise CheckpointError(f"{folder / file}: {len(content[key])} states; allowed: 1")
    return FullState(
        model=model,
        optimizer=content["optimizer_states"][0],
        scheduler=content["lr_schedulers"][0],
        eval_batches=content["eval_batches"],
        rng=content.get("random_states", []),
        step=content["global_step"],
        meta=check_whole(folder),
    )
