"""A module whose weights are averaged, saved, gone on from, and opened again.

moving average   swapped in for validation, and stored
checkpoints      plain data: load with weights_only=True, open with nothing else
resuming         the same experiment alone
warm start       another run's weights and average, none of its counters
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import lightning as L
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.tokenization import same_ids, tokenizer_fingerprint, tokenizer_from_state
from models.ema import ExponentialMovingAverage
from runtime.bounded import check_values, no_larger_than
from runtime.checkpoint import (
    changed_on_resume,
    mismatches,
    provenance,
    read_checkpoint,
    stored_hyper_parameters,
)
from runtime.config import locate, to_plain
from runtime.errors import CheckpointError
from runtime.excerpt import shown


class StoredModule(L.LightningModule):
    """Weights with their moving average, configuration and tokenizer.

    Args:
        config: the whole resolved configuration, as a plain dict or a DictConfig.
        tokenizer: state of the tokenizer (`data.tokenization.tokenizer_state`); it travels with
            the checkpoint, so that a model can be opened and can speak without its data.
    """

    # Beginnings of the names of weights that a warm start begins anew.
    fresh_weights: tuple[str, ...] = ()

    def __init__(self, config: dict | DictConfig, tokenizer: dict) -> None:
        super().__init__()
        self.config = to_plain(config)
        self.tokenizer_state = tokenizer
        self.tokenizer = tokenizer_from_state(tokenizer)
        self.ema: ExponentialMovingAverage | None = None
        self.data_fingerprint: str | None = None
        self._swapped = False

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """The weights that are not frozen."""
        return [p for p in self.parameters() if p.requires_grad]

    def create_ema(self) -> None:
        """Start the moving average at the present weights; call once the weights are in place."""
        decay = self.config["training"]["ema"]
        averaged = self.trained_parameters()
        self.ema = ExponentialMovingAverage(averaged, decay) if decay > 0 else None

    @contextmanager
    def ema_weights(self) -> Iterator[None]:
        """Inside, the weights are their moving averages (if there are any)."""
        self._swap_ema(True)
        try:
            yield
        finally:
            self._swap_ema(False)

    def both_weights(self) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
        """Copies of the raw state and of the moving average's, whichever of them is in use."""
        in_use = self._swapped
        self._swap_ema(False)
        raw = {name: value.detach().clone() for name, value in self.state_dict().items()}
        average = None if self.ema is None else self.ema.state_dict()
        self._swap_ema(in_use)
        return raw, average

    def _swap_ema(self, use_ema: bool) -> None:
        if self.ema is not None and use_ema != self._swapped:
            self.ema.to(self.device)
            self.ema.swap(self.trained_parameters())
            self._swapped = use_ema

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, the tokenizer, the moving average and where the run came from."""
        self._swap_ema(False)  # a validation that was cut short must not leak into the raw weights
        checkpoint["hyper_parameters"] = {"config": self.config, "tokenizer": self.tokenizer_state}
        checkpoint["ema"] = None if self.ema is None else self.ema.state_dict()
        checkpoint["provenance"] = provenance(self.config, self.data_fingerprint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another experiment's checkpoint, or tokenizer; take over the moving average."""
        self.check_compatible(checkpoint, "cannot resume")
        change = changed_on_resume(checkpoint["hyper_parameters"]["config"], self.config)
        if change is not None:
            raise CheckpointError(
                f"cannot resume: {change}; restore it, or start another run (another"
                " paths.run_dir, or checkpointing.resume_from_ckpt=false)"
            )
        self.restore(checkpoint)
        problems = mismatches(checkpoint["state_dict"], self.state_dict())
        if problems:
            raise CheckpointError(
                f"cannot resume: {problems[0]} (and {len(problems) - 1} more); resume with the"
                " configuration of the checkpoint, or set another paths.run_dir"
            )
        if checkpoint["ema"] is not None:
            self.create_ema()
            assert self.ema is not None, "training.ema is that of the checkpoint"
            self.ema.load_state_dict(checkpoint["ema"])

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take over what training found out beside the weights; by default there is nothing."""

    def check_compatible(
        self, checkpoint: dict[str, Any], key: str, same_algorithm: bool = True
    ) -> None:
        """Raise CheckpointError unless the checkpoint fits this algorithm and tokenizer."""
        stored = stored_hyper_parameters(checkpoint, key)
        theirs, ours = stored["config"]["algo"]["name"], self.config["algo"]["name"]
        if same_algorithm and theirs != ours:
            raise CheckpointError(
                f"{key}: checkpoint of algo={shown(theirs)}, but this run has algo={ours}"
            )
        their_tokenizer = tokenizer_from_state(stored["tokenizer"])
        if not same_ids(their_tokenizer, self.tokenizer):
            raise CheckpointError(
                f"{key}: its tokenizer ({tokenizer_fingerprint(their_tokenizer)[:12]}) is not that"
                f" of the data ({tokenizer_fingerprint(self.tokenizer)[:12]}); use the data and"
                " tokenizer it was trained with"
            )

    def load_pretrained(self, path: str | Path, allow_partial: bool = False) -> None:
        """Start from another run's weights and moving average, but from none of its counters.

        Raises:
            CheckpointError: a tensor is missing, left over or misshapen, and `allow_partial` is
                false; the message names all of them.
        """
        checkpoint = read_checkpoint(path)
        self.check_compatible(checkpoint, "training.from_pretrained", same_algorithm=False)
        checkpoint = self.incoming(checkpoint)
        source, target = checkpoint["state_dict"], self.state_dict()
        usable = {k: v for k, v in source.items() if k in target and v.shape == target[k].shape}
        expected = {k: v for k, v in target.items() if k in source or not self._is_fresh(k)}
        problems = mismatches(source, expected)
        if problems and not allow_partial:
            raise CheckpointError(
                f"training.from_pretrained={path}: {'; '.join(problems)}"
                " (training.allow_partial=true loads the rest)"
            )
        for problem in problems:
            L.pytorch.utilities.rank_zero_warn(f"training.from_pretrained: {problem}")
        self.load_state_dict(usable, strict=False)
        self.adopt(checkpoint)
        self.create_ema()
        averages = checkpoint["ema"] is not None and len(expected) == len(target)
        if self.ema is not None and averages and not problems:
            fresh = {"decay": self.ema.decay, "num_updates": self.ema.num_updates}
            self.ema.load_state_dict(checkpoint["ema"] | fresh)

    def incoming(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """A checkpoint to start from, in the form that this algorithm's weights have."""
        return checkpoint

    def adopt(self, checkpoint: dict[str, Any]) -> None:
        """What a warm start does with the raw weights that it has; by default nothing."""

    def _is_fresh(self, name: str) -> bool:
        return name.startswith(self.fresh_weights) if self.fresh_weights else False

    @classmethod
    def remembered(cls, config: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
        """A configuration to open a checkpoint with, and what only that of the checkpoint says."""
        return config

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        config: dict | DictConfig | None = None,
        map_location: str | torch.device = "cpu",
        weights: str = "ema",
    ) -> Self:
        """Open a checkpoint with nothing but the file; the model comes back in eval mode.

        Args:
            checkpoint_path: best.ckpt or last.ckpt of a run.
            config: configuration to use instead of the stored one.
            map_location: device of the weights.
            weights: "ema" (what validation measured) or "raw" (what training goes on from).

        Raises:
            CheckpointError: the file is missing, damaged, hostile, or of another algorithm.
        """
        if weights not in ("ema", "raw"):
            raise ValueError(f"weights={weights}: allowed ema, raw")
        checkpoint = read_checkpoint(checkpoint_path, map_location)
        stored = stored_hyper_parameters(checkpoint, checkpoint_path)
        plain = stored["config"] if config is None else to_plain(config)
        target = locate(plain["algo"]["_target_"])
        if not issubclass(target, cls):
            raise CheckpointError(
                f"{checkpoint_path}: holds {target.__name__}, which is not a {cls.__name__}"
            )
        plain = target.remembered(plain, stored["config"])
        check_values(checkpoint_path, plain)
        with no_larger_than(checkpoint_path, checkpoint["state_dict"]):
            try:
                model = target(plain, stored["tokenizer"])
            except ValueError as error:
                raise CheckpointError(f"{checkpoint_path}: {error}") from error
        problems = mismatches(checkpoint["state_dict"], model.state_dict())
        if problems:
            raise CheckpointError(
                f"{checkpoint_path}: {problems[0]} (and {len(problems) - 1} more); its weights do"
                " not fit this configuration"
            )
        model.load_state_dict(checkpoint["state_dict"])
        model.restore(checkpoint)
        model.create_ema()
        if model.ema is not None and checkpoint["ema"] is not None:
            model.ema.load_state_dict(checkpoint["ema"])
            model._swap_ema(weights == "ema")
        return model.to(map_location).eval()
