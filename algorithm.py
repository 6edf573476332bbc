"""What every way of training shares, once.

An algorithm is a LightningModule that says two things: the loss terms of a batch (`loss_terms`) and
how good the model is on a batch (`evaluate`). This class makes a training run of them:

    optimiser and schedule   AdamW, fused where possible; LambdaLR on clamped progress
    global normaliser        gradients of sum(w loss) / sum(w) over the whole global batch,
                             whatever the ranks and accumulation steps it was cut into
    guard                    a non-finite loss or gradient is never applied, and stops every rank

Its weights, their moving average and its checkpoints are those of a `StoredModule`.

On one device nothing in the step waits for it: sums and flags stay there until the next step reads
them. Several ranks agree once per step on whether to stop.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from omegaconf import DictConfig
from torch import Tensor

from data.tokenization import (
    special_ids,
)
from decoding.generate import GenerationSettings, Generator
from evaluation.statistics import ratio_with_standard_error
from models.precision import use_fastest_exact_matmul
from objectives.corruption import MaskingProcess
from runtime.config import instantiate
from runtime.errors import ConfigError
from runtime.gradient import GradientStep
from stored_module import StoredModule


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


class Algorithm(StoredModule):
    """Base of every algorithm; see `StoredModule` for what one is made from."""

    # The forward process of a masked diffusion; None where nothing is masked.
    process: MaskingProcess | None = None
    # Whether it gives text a likelihood of its own, which token frequencies can be compared with.
    models_text = True

    def __init__(self, config: dict | DictConfig, tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        use_fastest_exact_matmul()
        self.special = special_ids(self.tokenizer)
        self.eval_draws = 1
        self.evaluated: EvaluatedRows | None = None
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

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimiser is given: groups with options of their own (lr, weight_decay)."""
        return [{"params": self.trained_parameters()}]

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

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every stored module.

        Raises:
            NonFiniteError: the last step was not finite, which nobody may resume from.
        """
        self._step.check()
        super().on_save_checkpoint(checkpoint)

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
