"""A model of ours as a checkpoint that bd3lms can load.

Its program reads a checkpoint by unpickling it, so the configuration goes in as omegaconf's object
and the tokenizer as transformers'. Nothing here unpickles such a file.
"""

import json
import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Protocol

from runtime.bd3lms.config import their_config
from runtime.bd3lms.weights import BACKBONE, constant_conditioning, parameter_order
from runtime.errors import CheckpointError
from runtime.portable import portable

if TYPE_CHECKING:
    from torch import Tensor


class Model(Protocol):
    """What is needed of a model; an `Algorithm` has it."""

    config: dict[str, Any]
    tokenizer: Any

    def both_weights(self) -> tuple[dict[str, "Tensor"], dict[str, Any] | None]:
        """The raw state, and that of the moving average if there is one."""
        ...


def write_bd3lms(model: Model, path: str | Path, global_step: int = 0) -> None:
    """Write a checkpoint with the key names, the order and the objects of bd3lms.

    It holds no optimiser: bd3lms can evaluate it, sample from it, and start from its weights.

    Args:
        model: ar, bd3lm or mdlm with the DiT.
        path: the file.
        global_step: optimiser steps done.

    Raises:
        CheckpointError: bd3lms has no such network, method or tokenizer, or the file cannot be
            written.
    """
    import lightning
    import torch
    from omegaconf import OmegaConf

    path = Path(path)
    raw, average = model.both_weights()
    try:
        config = their_config(portable(model.config))
        conditioned = config["algo"]["name"] != "ar"
        state = raw if conditioned else _without_conditioning(raw, model.config["model"])
        vocab_size = raw[f"{BACKBONE}vocab_embed.embedding"].shape[0]
        tokenizer = their_tokenizer(model.tokenizer, vocab_size)
    except ValueError as error:
        raise CheckpointError(f"{path}: cannot be written for bd3lms: {error}") from error
    content = {
        "epoch": 0,
        "global_step": global_step,
        "pytorch-lightning_version": lightning.__version__,
        "state_dict": state,
        "loops": _loops(global_step),
        "callbacks": {},
        "optimizer_states": [],
        "lr_schedulers": [],
        "hparams_name": "kwargs",
        "hyper_parameters": {"config": OmegaConf.create(config), "tokenizer": tokenizer},
        "sampler": {"random_state": None},
    }
    if average is not None:
        content["ema"] = _their_average(average, model.config["model"]["n_blocks"], conditioned)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(content, temporary, pickle_module=_PICKLE)
        temporary.replace(path)
    except (OSError, RuntimeError) as error:  # torch reports a missing folder as RuntimeError
        temporary.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({error})") from error


def their_tokenizer(tokenizer: Any, vocab_size: int) -> Any:
    """The tokenizer as bd3lms counts ids: those of the vocabulary proper, and one for a mask.

    Raises:
        ValueError: it has other added tokens, for which bd3lms would build no row.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    proper = tokenizer.backend_tokenizer.get_vocab_size(with_added_tokens=False)
    mask_is_added = tokenizer.mask_token_id >= proper
    if vocab_size != proper + mask_is_added:
        raise ValueError(
            f"the tokenizer has {proper} ids and {vocab_size - proper} added ones; allowed is an"
            " added mask token alone"
        )
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["id"] < proper]
    names = ["bos_token", "eos_token", "pad_token", "unk_token"]
    special = {name: getattr(tokenizer, name) for name in (*names, *["mask_token"][mask_is_added:])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(backend)),
        clean_up_tokenization_spaces=False,
        **{name: token for name, token in special.items() if token is not None},
    )


def _without_conditioning(
    raw: Mapping[str, "Tensor"], model: Mapping[str, Any]
) -> dict[str, "Tensor"]:
    """The state of an autoregressive network of bd3lms, which has no conditioning.

    Raises:
        ValueError: the conditioning does something, which theirs cannot.
    """
    # What is multiplied by a zero weight does not matter: the bias alone must be that of no effect.
    idle = constant_conditioning(model)
    for name, value in idle.items():
        if "adaLN_modulation" in name and not bool((raw[name].cpu() == value).all()):
            raise ValueError(
                f"algo.name=ar: {name} is in use, and bd3lms's autoregressive network has none;"
                " allowed: bd3lm, mdlm, or a model that came from bd3lms"
            )
    return {name: value for name, value in raw.items() if name not in idle}


def _their_average(average: Mapping[str, Any], n_blocks: int, conditioned: bool) -> dict[str, Any]:
    shadows = dict(zip(parameter_order(n_blocks), average["shadow_params"], strict=True))
    ordered = [shadows[name] for name in parameter_order(n_blocks, conditioned)]
    return {**average, "shadow_params": ordered}


def _loops(steps: int) -> dict[str, Any]:
    """The counters that bd3lms reads when it loads a checkpoint."""
    count = {"ready": steps, "completed": steps, "started": steps, "processed": steps}
    epoch = {"ready": 0, "completed": 0, "started": 0, "processed": 0}
    return {
        "fit_loop": {
            "epoch_progress": {"total": epoch, "current": dict(epoch)},
            "epoch_loop.batch_progress": {"total": count, "current": dict(count)},
        }
    }


class _Pickler(pickle._Pickler):
    """Names the tokenizer's class as all versions of transformers do, whatever module it lives in.

    bd3lms pins transformers 4, in which the class is defined elsewhere than in 5.
    """

    def save_global(self, obj: Any, name: str | None = None) -> None:
        """Write the name of a class or function."""
        from transformers import PreTrainedTokenizerFast

        if obj is PreTrainedTokenizerFast:
            self.write(pickle.GLOBAL + b"transformers\nPreTrainedTokenizerFast\n")  # type: ignore[attr-defined]
            self.memoize(obj)  # type: ignore[attr-defined]
        else:
            super().save_global(obj, name)  # type: ignore[misc]


_PICKLE = SimpleNamespace(Pickler=_Pickler, dumps=pickle.dumps, __name__="pickle")
