"""What every way of training shares, once.

An algorithm is a LightningModule that says two things: the loss terms of a batch (`loss_terms`) and
how good the model is on a batch (`evaluate`). This class makes a training run of them:

    optimiser and schedule   AdamW, fused where possible; LambdaLR on clamped progress
    global normaliser        gradients of sum(w loss) / sum(w) over the whole global batch,
                             whatever the ranks and accumulation steps it was cut into
    guard                    a non-finite loss or gradient is never applied, and stops every rank
    EMA                      swapped in for validation, stored in the checkpoint
    checkpoints              plain data: load with weights_only=True, open with nothing else

On one device nothing in the step waits for it: sums and flags stay there until the next step reads
them. Several ranks agree once per step on whether to stop.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import DictConfig
from torch import Tensor

from data.tokenization import (
    same_ids,
    special_ids,
    tokenizer_fingerprint,
    tokenizer_from_state,
)
from decoding.generate import GenerationSettings, Generator
from evaluation.statistics import ratio_with_standard_error
from models.ema import ExponentialMovingAverage
from models.precision import use_fastest_exact_matmul
from objectives.corruption import MaskingProcess
from runtime.bounded import check_values, no_larger_than
from runtime.checkpoint import (
    changed_on_resume,
    mismatches,
    provenance,
    read_checkpoint,
    stored_hyper_parameters,
)
from runtime.config import instantiate, locate, to_plain
from runtime.errors import CheckpointError, ConfigError
from runtime.excerpt import shown
from runtime.gradient import GradientStep


class LossTerms(NamedTuple):
    """Additive parts of a weighted loss: the loss of any union of batches is sum / weight.

    loss: sum of w * l over the scored places, with its gradient. weight: their total weight (a
    count, when the weights average one). row_losses: detached sum per row, to name a bad one.
    """

    loss: Tensor
    weight: Tensor
    row_losses: Tensor


class Likelihood(NamedTuple):
    """Negative log-likelihood (or its bound) of every row, nats, and its number of tokens."""

    nll: Tensor
    tokens: Tensor


class EvaluatedRows(NamedTuple):
    """Rows of a whole evaluation: place in the dataset [R], nll in nats [R, draws], tokens [R]."""

    row: Tensor
    nll: Tensor
    tokens: Tensor


class Algorithm(L.LightningModule):
    """Base of every algorithm.

    Args:
        config: the whole resolved configuration, as a plain dict or a DictConfig.
        tokenizer: state of the tokenizer (`data.tokenization.tokenizer_state`); it travels with
            the checkpoint, so that a model can be opened and can speak without its data.
    """

    # The forward process of a masked diffusion; None where nothing is masked.
    process: MaskingProcess | None = None
    # Beginnings of the names of weights that a warm start begins anew.
    fresh_weights: tuple[str, ...] = ()
    # Whether it gives text a likelihood of its own, which token frequencies can be compared with.
    models_text = True

    def __init__(self, config: dict | DictConfig, tokenizer: dict) -> None:
        super().__init__()
        use_fastest_exact_matmul()
        self.config = to_plain(config)
        self.tokenizer_state = tokenizer
        self.tokenizer = tokenizer_from_state(tokenizer)
        self.special = special_ids(self.tokenizer)
        self.ema: ExponentialMovingAverage | None = None
        self.eval_draws = 1
        self.data_fingerprint: str | None = None
        self.evaluated: EvaluatedRows | None = None
        self._swapped = False
        self._step = GradientStep(self._sum_over_ranks, self.gather)
        self._parts: list[EvaluatedRows] = []

    @property
    def required_features(self) -> tuple[str, ...]:
        """Features of words that a training batch must carry beside its tokens."""
        return ()

    @property
    def is_exact(self) -> bool:
        """Whether one draw of `evaluate` is the likelihood itself."""
        return False

    def loss_terms(self, batch: dict[str, Tensor]) -> LossTerms:
        """Loss of one micro-batch, as sums."""
        raise NotImplementedError(f"{type(self).__name__} defines no training loss")

    def evaluate(self, batch: dict[str, Tensor], draw: int) -> Likelihood:
        """Likelihood of every row under Monte-Carlo draw number `draw`."""
        raise NotImplementedError(f"{type(self).__name__} defines no likelihood")

    def trained_parameters(self) -> list[torch.nn.Parameter]:
        """The weights that are not frozen."""
        return [p for p in self.parameters() if p.requires_grad]

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser is given: groups with options of their own (lr, weight_decay)."""
        return [{"params": self.trained_parameters()}]

    def create_ema(self) -> None:
        """Start the moving average at the present weights; call once the weights are in place."""
        decay = self.config["training"]["ema"]
        averaged = self.trained_parameters()
        self.ema = ExponentialMovingAverage(averaged, decay) if decay > 0 else None

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over all weights, and the schedule stepped once per optimiser step."""
        optim = self.config["optim"]
        optimizer = torch.optim.AdamW(
            self.parameter_groups(),
            lr=optim["lr"],
            betas=(optim["beta1"], optim["beta2"]),
            eps=optim["eps"],
            weight_decay=optim["weight_decay"],
            fused=True,
        )
        factor = instantiate(self.config["lr_scheduler"])
        multiplier = partial(factor, total_steps=self.trainer.max_steps)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, multiplier)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "frequency": 1},
        }

    def on_fit_start(self) -> None:
        """Bring the moving average to the weights' device."""
        if self.ema is None:
            self.create_ema()
        if self.ema is not None:
            self.ema.to(self.device)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Backpropagate the summed loss; its normaliser is applied to the gradient of the step."""
        terms = self.loss_terms(batch)
        places = batch["input_ids"].numel()
        self._step.add(terms.loss, terms.weight, places, batch["index"], terms.row_losses)
        return terms.loss / places

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Normalise, guard and clip the gradient of the whole global batch; log the step."""
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        sharded = type(self.trainer.strategy).__name__ == "FSDPStrategy"
        step = self.trainer.global_step
        report = self._step.finish(optimizer, grads, gradient_clip_val, step, sharded)
        self.log("train/loss", report.loss, prog_bar=True)
        self.log("train/grad_norm", report.norm)
        self.log("train/weight", report.weight)
        self.log("lr", optimizer.param_groups[0]["lr"])

    def _sum_over_ranks(self, values: Tensor) -> Tensor:
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(values)
        return values

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: torch.optim.Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """One step of the optimiser, then of the moving average."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self.on_weights_moved()
        if self.ema is not None:
            self.ema.update(self.trained_parameters())

    def on_weights_moved(self) -> None:
        """The optimiser has taken a step, which the moving average has not seen yet."""

    def on_train_end(self) -> None:
        """The last step's flag has nobody behind it to read it."""
        self._step.check()

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

    def on_validation_epoch_start(self) -> None:
        """Validate the moving average while training."""
        self._parts = []
        if self.trainer.state.fn == "fit":
            self._swap_ema(True)

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        """Likelihood of every row in every draw, in fp32 whatever the training precision."""
        with torch.autocast(self.device.type, enabled=False):
            draws = [self.evaluate(batch, draw) for draw in range(self.eval_draws)]
        nll = torch.stack([draw.nll for draw in draws], dim=-1)
        parts = batch["index"], nll.double(), draws[0].tokens.double()
        self._parts.append(EvaluatedRows(*(part.cpu() for part in parts)))

    def on_validation_epoch_end(self) -> None:
        """Log nats per token with its standard error, perplexity and bits; undo the swap.

        `evaluated` keeps the rows, in the order of the dataset.
        """
        self._swap_ema(False)
        rows = [self.gather(torch.cat(column)) for column in zip(*self._parts, strict=True)]
        order = rows[0].argsort()
        self.evaluated = EvaluatedRows(*(column[order] for column in rows))
        nll_R, tokens_R = self.evaluated.nll.mean(-1).numpy(), self.evaluated.tokens.numpy()
        mean, error = ratio_with_standard_error(nll_R, tokens_R)
        self.log_dict(
            {
                "val/nll": mean,
                "val/nll_se": error,
                "val/ppl": math.exp(mean),
                "val/bpd": mean / math.log(2.0),
            }
        )

    def gather(self, values: Tensor) -> Tensor:
        """Rows of all ranks, which may hold different numbers of them."""
        if not (dist.is_available() and dist.is_initialized()):
            return values
        parts: list[Tensor] = [None] * dist.get_world_size()  # type: ignore[list-item]
        dist.all_gather_object(parts, values)
        return torch.cat(parts)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the configuration, the tokenizer, the moving average and where the run came from.

        Raises:
            NonFiniteError: the last step was not finite, which nobody may resume from.
        """
        self._step.check()
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

    def generator(
        self, settings: GenerationSettings, batch_size: int = 32, device: str | None = None
    ) -> Generator:
        """What answers prompts with these weights.

        Raises:
            ConfigError: the algorithm does not write answers.
        """
        raise ConfigError(f"algo={self.config['algo']['name']}: does not answer prompts")

    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """log p(continuation | prompt) in nats, and whether greedy decoding would write it.

        Raises:
            ConfigError: the algorithm has no likelihood of continuations.
        """
        raise ConfigError(f"algo={self.config['algo']['name']}: does not score continuations")

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
    ) -> "Algorithm":
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
