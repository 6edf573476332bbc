"""Training on what the model itself writes: sample, judge, then step.

Lightning's loop takes one batch, one loss and one step; here a batch of prefixes becomes answers
and rewards first, and these may be learned from more than once and in pieces. So the optimisation
is by hand, and what the loop would have done is done here:

    experience   answers of the present weights, judged; without a gradient
    update       for every piece: loss, backward (ranks synchronise in the last one)
                 normalise over the whole global batch, guard, clip
                 one step of the optimiser, ONE of the schedule, of average and reference

A step's answers depend on seed, step, prefix and number of the sample, so they are the same on any
number of ranks and after a resume.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from algorithm import LossTerms
from callbacks.throughput import available_memory
from causal import CausalAlgorithm
from data.errors import DataError
from data.journal import encode_row
from decoding.branches import Branches
from decoding.rollout import LocalRollouts
from decoding.rollout_record import RolloutSettings
from evaluation.rollout_metrics import alerts
from models.causal import forget_decoding_copy
from models.reference import OPTIONS, ReferenceWeights
from objectives.keyed import fold_key
from runtime.errors import ConfigError
from runtime.gradient import GradientStep

log = logging.getLogger(__name__)

# Sets the draws of training apart from others of the same seed.
_STREAM = 0x6F6E6C
# A global batch from which nothing is learned has weight 0; its gradient shall be 0, not nan.
_LEAST_WEIGHT = 1e-9


class Prefix(NamedTuple):
    """A row of training: its number in the data, tokens of the prefix, and of what follows."""

    id: str
    prefix_ids: list[int]
    reference_ids: list[int]


@dataclass(frozen=True)
class Experience:
    """What an update learns from: pieces for one backward pass each (at least one), and what is to
    be logged."""

    parts: Sequence[Mapping[str, Any]]
    metrics: Mapping[str, float]


class OnlineAlgorithm(CausalAlgorithm):
    """Base of algorithms that learn from their own samples.

    A subclass says how a batch of prefixes becomes experience (`collect`) and what the loss of a
    piece of it is (`part_terms`).
    """

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        self.automatic_optimization = False
        self._step = GradientStep(self._sum_over_ranks, self.gather, _LEAST_WEIGHT)
        self.reference: ReferenceWeights | None = None
        self._reference_state: dict[str, Any] | None = None
        # What a step is compared with, plain numbers that travel with the checkpoint.
        self.remembered_numbers: dict[str, float] = {}
        self._sums: dict[str, Tensor] = {}
        self._alarmed: set[str] = set()
        self.stopped_reason: str | None = None

    def _read_options(self) -> None:
        algo = self.config["algo"]
        steps = self.config["trainer"]["max_steps"]
        if steps % algo["updates"]:
            raise ConfigError(
                f"algo.updates={algo['updates']}: does not divide trainer.max_steps={steps};"
                " allowed: a divisor, so that the run ends with a batch"
            )
        if self.config["loader"]["batch_size"] is not None:
            raise ConfigError(
                f"loader.batch_size={self.config['loader']['batch_size']}: algo={algo['name']}"
                " samples for all prefixes of a step together; allowed: null, and"
                " algo.rows_per_pass for the memory of a backward pass"
            )
        dropout = (algo.get("lora") or {}).get("lora_dropout")
        if dropout:
            raise ConfigError(
                f"algo.lora.lora_dropout={dropout}: algo={algo['name']} compares what was sampled"
                " without dropout with what is learned; allowed: 0, or leave it out"
            )
        for name, value in (algo["reference"] or {}).items():
            if name not in OPTIONS:
                raise ConfigError(
                    f"algo.reference.{name}={value}: no such option; allowed: {', '.join(OPTIONS)}"
                )

    def collect(self, batch: dict[str, Tensor]) -> Experience:
        """Sample and judge; called without gradients."""
        raise NotImplementedError(f"{type(self).__name__} defines no experience")

    def part_terms(self, part: Mapping[str, Any]) -> LossTerms:
        """Loss of one piece of experience, as sums."""
        raise NotImplementedError(f"{type(self).__name__} defines no loss")

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> STEP_OUTPUT:
        """One batch of prefixes: experience, then `algo.updates` steps on it."""
        with torch.no_grad():
            experience = self.collect(batch)
        # Behind a step that was not finite a run goes on with what is left of its batch's updates.
        updates = self.config["algo"]["updates"]
        for _ in range(self.trainer.global_step % updates, updates):
            self._update(experience)
        return None

    def _update(self, experience: Experience) -> None:
        optimizer = cast(LightningOptimizer, self.optimizers())
        optimizer.zero_grad()
        last = len(experience.parts) - 1
        for number, part in enumerate(experience.parts):
            with self._alone() if number < last else nullcontext():
                terms = self.part_terms(part)
                # Every rank counts as one place, whatever the number of its pieces.
                places = 1 if number == 0 else 0
                self._step.add(terms.loss, terms.weight, places, part["index"], terms.row_losses)
                self.manual_backward(terms.loss)
        grads = [p.grad for p in self.parameters() if p.grad is not None]
        clip, step = self.config["trainer"]["gradient_clip_val"], self.trainer.global_step
        report = self._step.finish(optimizer.optimizer, grads, clip, step, sharded=False)
        # Sampling takes seconds, so a flag need not travel behind the step as elsewhere.
        self._step.check()
        metrics = {"loss": report.loss, "grad_norm": report.norm, "weight": report.weight}
        metrics |= self._logged(experience)
        rate = {"lr": optimizer.param_groups[0]["lr"]}
        self._log_update({f"train/{name}": value for name, value in metrics.items()} | rate)
        optimizer.step()
        # Lightning steps no schedule of a manual optimisation.
        cast(LambdaLR, self.lr_schedulers()).step()
        self._steps += 1
        self.on_weights_moved()
        if self.ema is not None:
            self.ema.update(self.trained_parameters())
        if self.reference is not None:
            self.reference.follow(self.trained_parameters())

    def _log_update(self, metrics: Mapping[str, float | Tensor]) -> None:
        """A row for every step, as everywhere; Lightning would write one per batch, which may be
        several steps."""
        self.log("train/loss", metrics["train/loss"], prog_bar=True, logger=False)
        step = self.trainer.global_step
        if (step + 1) % self.trainer.log_every_n_steps and not self.trainer.should_stop:
            return
        row = {name: float(value) for name, value in metrics.items()}
        for logger in self.trainer.loggers:
            logger.log_metrics(row, step)
            logger.save()

    def on_validation_epoch_end(self) -> None:
        """As for every algorithm; in a run its row has the number of steps, not of batches."""
        super().on_validation_epoch_end()
        if self.trainer.state.fn == "fit":
            self.log("step", float(self.trainer.global_step - 1))

    def _alone(self) -> AbstractContextManager[None]:
        """Inside, ranks do not synchronise their gradients."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy):
            return cast(AbstractContextManager[None], strategy.block_backward_sync())
        return nullcontext()

    def on_fit_start(self) -> None:
        """Begin the reference at the weights that training starts from, or go on with it."""
        super().on_fit_start()
        options = self.config["algo"]["reference"]
        if options is None:
            return
        self.reference = ReferenceWeights(self.trained_parameters(), **options)
        if self._reference_state is not None:
            self.reference.load_state_dict(self._reference_state)
            self._reference_state = None
        self.reference.to(self.device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every algorithm; with the reference and what steps are compared with."""
        super().on_save_checkpoint(checkpoint)
        state = None if self.reference is None else self.reference.state_dict()
        checkpoint["online"] = {"reference": state, "numbers": dict(self.remembered_numbers)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take both over. A checkpoint that is only opened needs neither, and a reference is as
        large as the weights that are trained."""
        super().on_load_checkpoint(checkpoint)
        online = checkpoint["online"]
        self._reference_state = online["reference"]
        self.remembered_numbers = dict(online["numbers"])

    @contextmanager
    def reference_weights(self) -> Iterator[None]:
        """Inside, the network has the weights of the reference, and nothing has a gradient."""
        assert self.reference is not None, "only a run with a reference asks for it"
        with torch.no_grad(), self.reference.in_place(self.trained_parameters()):
            yield

    def require_documents(self, batch: dict[str, Tensor]) -> None:
        """As for every causal algorithm, with the data that this one is trained on."""
        if "segment" not in batch:
            raise self._unfit("rows that do not say where documents begin")
        super().require_documents(batch)

    def _unfit(self, what: str) -> DataError:
        return DataError(
            f"data={self.config['data']['name']}: {what}; algo={self.config['algo']['name']} is"
            " trained on data=prefix_suffix, or data=thoughts with data.form=prefixes"
            " (data.documents_per_row=1)"
        )

    def prefixes(self, batch: dict[str, Tensor]) -> list[Prefix]:
        """The rows of a batch as prefixes and what follows them in the data.

        Raises:
            DataError: a row of several documents, or of one without a prefix.
        """
        prefix_BL = (batch["segment"] == 0) & (batch["response"] == 0)
        wrong_B = (batch["segment"] > 0).any(-1) | ~prefix_BL.any(-1)
        if bool(wrong_B.any()):
            row = int(batch["index"][wrong_B][0])
            raise self._unfit(f"row {row} is not a prefix and what follows it")
        rows = zip(
            *(batch[name].tolist() for name in ("index", "input_ids", "segment", "response")),
            strict=True,
        )
        found = []
        for index, ids, segment, response in rows:
            tokens = [(token, part) for token, s, part in zip(ids, segment, response, strict=True)
                      if s == 0]  # fmt: skip
            prefix = [token for token, part in tokens if part == 0]
            found.append(Prefix(str(index), prefix, [t for t, part in tokens if part == 1]))
        return found

    def choices(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [P, D] of the places whose next token the model chose, these tokens [P],
        and the rollouts that they belong to [P].

        Every prompt is read once for all of its rollouts in the batch.
        """
        read: Branches = batch["branches"]
        hidden_NQD = self.backbone.read_branches(*read[:4])
        token_P = read.branch_NQ.flatten()[read.place_M + 1]
        row_P = read.place_M // read.branch_NQ.shape[1]
        return hidden_NQD.flatten(0, 1)[read.place_M], token_P, row_P

    @contextmanager
    def sampling(self, settings: RolloutSettings) -> Iterator[LocalRollouts]:
        """Inside, what samples from the weights of now."""
        model = self.backbone.model
        training = model.training
        # The weights have moved since the last copy.
        forget_decoding_copy(model)
        try:
            yield self.rollouts(settings)
        finally:
            model.train(training)
            forget_decoding_copy(model)

    def step_settings(self, settings: RolloutSettings) -> RolloutSettings:
        """With the seed of this optimiser step."""
        seed = fold_key((self.config["seed"], _STREAM, self.trainer.global_step))
        return replace(settings, seed=seed)

    def delimiter(self, name: str) -> int:
        """The token of a delimiter of thoughts, `algo.open` or `algo.close`.

        Raises:
            ConfigError: it is not one token of the tokenizer.
        """
        text = self.config["algo"][name]
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        if len(ids) != 1:
            raise ConfigError(
                f"algo.{name}={text!r}: {len(ids)} tokens of the tokenizer; allowed: a text that is"
                " one (model=tiny_thinker has the usual ones)"
            )
        return ids[0]

    def count(self, name: str, total: Tensor, number: Tensor) -> None:
        """Add to a mean that is logged with the step, over all its pieces and ranks."""
        part = torch.stack([total.detach().float(), number.detach().float()])
        self._sums[name] = self._sums[name] + part if name in self._sums else part

    def _logged(self, experience: Experience) -> dict[str, float | Tensor]:
        """The metrics of a step: of the experience, and the means of `count`."""
        sums, self._sums = self._sums, {}
        if not sums:
            return dict(experience.metrics)
        total_M, number_M = self._sum_over_ranks(torch.stack([*sums.values()])).unbind(-1)
        means = (total_M / number_M.clamp(min=1.0)).unbind()
        return {**experience.metrics, **dict(zip(sums, means, strict=True))}

    def gather_rows(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Those of all ranks, in rank order."""
        if not (dist.is_available() and dist.is_initialized()):
            return rows
        parts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(parts, rows)
        return [row for part in parts for row in part]

    def keep_samples(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write the samples of this step to `rollouts/step_NNNN_samples.jsonl`, on its turn."""
        every, step = self.config["algo"]["samples_every"], self.trainer.global_step
        if not every or step % every or not self.trainer.is_global_zero:
            return
        path = Path(self.config["paths"]["run_dir"], "rollouts", f"step_{step:04d}_samples.jsonl")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"".join(encode_row(dict(row)) for row in rows))

    def watched(self, metrics: dict[str, float]) -> dict[str, float]:
        """The metrics of a step with the number of alerts on them, which are logged when they
        begin; with `algo.enforce_stop_conditions` an alert ends the run behind this step."""
        memory = available_memory(self.device)
        free = [row["free"] for row in self.gather_rows([{"free": memory and memory[1]}])]
        # That of the rank with the least: all of them go on, or none.
        if None not in free:
            metrics["available_mem_gib"] = min(free) / 2**30
        found = self.alerts(metrics)
        # One line when it begins, not one per step while it lasts.
        names = {message.partition("=")[0].partition(":")[0]: message for message in found}
        for name in names.keys() - self._alarmed:
            log.warning("step %d: %s", self.trainer.global_step, names[name])
        self._alarmed = {*names}
        if found and self.config["algo"]["enforce_stop_conditions"]:
            self.stopped_reason = found[0]
            self.trainer.should_stop = True
        return metrics | {"alerts": float(len(found))}

    def alerts(self, metrics: Mapping[str, float]) -> list[str]:
        """What is wrong with a step, a line each: of groups of rollouts, beside the first step and
        the one before, whose numbers are remembered."""
        baseline = {k.removeprefix("baseline/"): v for k, v in self.remembered_numbers.items()
                    if k.startswith("baseline/")}  # fmt: skip
        previous = {k.removeprefix("previous/"): v for k, v in self.remembered_numbers.items()
                    if k.startswith("previous/")}  # fmt: skip
        found = alerts(metrics, baseline or None, previous or None)
        for name in ("near_zero_group_rate", "all_zero_group_rate", "all_one_group_rate"):
            if name in metrics:
                self.remembered_numbers.setdefault(f"baseline/{name}", metrics[name])
                self.remembered_numbers[f"previous/{name}"] = metrics[name]
        return found

    def text(self, ids: Sequence[int]) -> str:
        """Of tokens, without special ones."""
        return cast(str, self.tokenizer.decode(list(ids), skip_special_tokens=True))
