"""DFlash: a small network that drafts a whole block of the target's next tokens in one pass.

    q(. | slot k) = softmax(W g(target features before the anchor, [x_a, mask, mask, ...])_k)

The target is frozen and stays outside of this module's parameters: a checkpoint holds the draft
alone. Anchors are drawn on the host, next to the data, from numbers keyed by (seed, step, place in
the global batch), so they are the same on any number of ranks. The teacher's distribution enters
through e = W^T p of the places that some block asks about, each computed once.

Source: arXiv 2602.06036. "EAL" and "survival-EAL" are a reading of their published descriptions.
Legend: B rows, L tokens, N blocks of a row, M blocks of the batch, Q slots, K predicted slots,
U places of the target that are asked about, D features, E width of all tapped layers, V vocabulary.
"""

from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from algorithm import Algorithm, Likelihood, LossTerms
from data.errors import DataError
from data.feature_cache import FeatureCache
from models.causal import CausalTarget
from models.decodable import check_head
from models.dflash import DFlashConfig, DFlashNetwork
from models.taps import TargetTaps
from models.target_reading import TargetReading, read_target
from objectives.acceptance import AcceptanceObjective
from objectives.anchors import draw_blocks
from objectives.fused_acceptance import AcceptanceSums, fused_acceptance_loss
from objectives.keyed import keyed_uniform
from objectives.likelihood import row_sums
from runtime.checkpoint import read_checkpoint, stored_hyper_parameters
from runtime.config import instantiate
from runtime.dflash.folder import is_draft, load_draft
from runtime.errors import CheckpointError, ConfigError
from runtime.shared_target import open_target

_ANCHORS, _VALIDATION_ANCHORS = 0x0A, 0x0B  # streams of keyed numbers
_BLOCK_BUCKET = 8
# What a warm start may change of a draft's shape.
_FREE_TO_CHANGE = {"block_size", "bos_token_id", "eos_token_id", "max_position_embeddings"}
_CROSS_ENTROPY = AcceptanceObjective(ce_weight=1.0)
# What is summed over the blocks of a step: see `_statistics`.
_STATISTICS = (
    "slots", "blocks", "weight", "normaliser", "expected", "kl", "ce", "committed", "first",
)  # fmt: skip


class DFlashDraft(Algorithm):
    """Trains a draft for the target that `config["model"]` describes."""

    models_text = False

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        algo = self.config["algo"]
        self.seed = self.config["seed"]
        self.anchors, self.anchors_per_document = algo["anchors"], algo["anchors_per_document"]
        self.objective: AcceptanceObjective = instantiate(self.config["objective"])
        self._check_cache()
        # The shape travels with the checkpoint, which then opens without its target.
        if algo.get("network") is None:
            algo["network"] = self._shape()
        self.network = DFlashNetwork(DFlashConfig(**algo["network"]), algo["attn_backend"])
        # Weights that follow the draft (survival) have a sum that is not known before it has
        # spoken; its share of the largest possible sum is taken from the step before.
        self.weight_share: float | Tensor = 1.0
        self._sums: Tensor | None = None
        self._validated: list[Tensor] = []
        self._caches: dict[str, FeatureCache] = {}

    def _shape(self) -> dict[str, Any]:
        draft = self.config["algo"]["draft"]
        shape = DFlashConfig.from_target(
            self.target.model.config,
            block_size=self.config["block_size"],
            mask_token_id=self.target.mask_token_id,
            **draft,
        )
        return asdict(shape)

    @cached_property
    def target(self) -> CausalTarget:
        """The frozen target; it is loaded when it is first needed."""
        target = open_target(self.config["model"])
        check_head(target.model, target.name)
        return target

    @cached_property
    def taps(self) -> TargetTaps:
        """Reads the features of the target."""
        return TargetTaps(self.target.model, self.network.config.target_layer_ids)

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict:
        """Draw the anchors on the host, before the batch travels to the device."""
        if self.trainer.training:
            key = (self.seed, _ANCHORS, self.trainer.global_step)
            batch["inputs"] = self.draw_blocks(batch, batch["position"], key)
            self._read_cache("train", batch, batch["inputs"])
        else:
            batch["draws"] = [
                self.draw_blocks(batch, batch["index"], (self.seed, _VALIDATION_ANCHORS, draw))
                for draw in range(self.eval_draws)
            ]
            for inputs in batch["draws"]:
                self._read_cache("validation", batch, inputs)
        return batch

    def cache_identity(self, data_fingerprint: str | None) -> dict[str, Any]:
        """What features on disk are of."""
        return {
            "data": data_fingerprint,
            "target": self.target.fingerprint,
            "dtype": self.target.dtype,
            "layers": list(self.network.config.target_layer_ids),
        }

    def _check_cache(self) -> None:
        folder = self.config["algo"]["feature_cache"]
        if folder is None:
            return
        if self.objective.needs_distribution or self.objective.temperature != 1.0:
            raise ConfigError(
                f"algo.feature_cache={folder}: a cache holds neither whole distributions nor those"
                " at a temperature; allowed: null, or objective.verification=greedy and"
                " objective.temperature=1"
            )
        if self.config["data"].get("streaming"):
            raise ConfigError(
                f"algo.feature_cache={folder}: rows of a stream have no number that would find them"
                " again; allowed: null, or data.streaming=false"
            )

    def _read_cache(self, split: str, batch: dict[str, Tensor], inputs: dict[str, Any]) -> None:
        """Add the target's features and predictions to `inputs`, if they are kept on disk.

        They are in training; an evaluation of another split asks the target itself.
        """
        folder = self.config["algo"]["feature_cache"]
        if folder is None or self.trainer.state.fn != "fit":
            return
        if split not in self._caches:
            identity = self.cache_identity(self.data_fingerprint)
            self._caches[split] = FeatureCache(folder, split, identity)
        cache, length = self._caches[split], batch["input_ids"].shape[1]
        row_B, asked_U = batch["index"], inputs["asked"]
        inputs["taps"] = cache.taps(row_B, length)
        if split == "train" and self.objective.needs_kl:
            inputs["expected"], inputs["entropy"] = cache.predictions(
                row_B[asked_U // length], asked_U % length
            )

    def draw_blocks(
        self, batch: dict[str, Tensor], row_B: Tensor, key: tuple[int, ...]
    ) -> dict[str, Any]:
        """The blocks of a batch (`objectives.anchors.draw_blocks`), of numbers keyed by its rows.

        Raises:
            DataError: the rows do not say what the target has written.
        """
        if not {"response", "segment"} <= batch.keys():
            raise DataError(
                f"data={self.config['data']['name']}: rows without answers of a target;"
                " algo=dflash is trained on data=chat (with data.join=true)"
            )
        segment_BL = batch["segment"]
        return draw_blocks(
            batch["input_ids"],
            batch["response"] == 1,
            segment_BL,
            keyed_uniform(key, row_B, segment_BL.shape[1]),
            self.anchors,
            self.anchors_per_document,
            self.predicted,
            # A compiled network wants equal shapes; on a CPU their number follows the batch.
            _BLOCK_BUCKET if self.device.type == "cpu" else None,
        )

    @property
    def predicted(self) -> int:
        """K, the tokens that a block proposes."""
        return self.network.config.num_drafts

    def loss_terms(self, batch: dict[str, Any]) -> LossTerms:
        """The objective's loss of all blocks of a micro-batch, as a sum."""
        inputs = batch["inputs"]
        # 1. What the target has to say, without a gradient.
        reading = self.read_target(batch, inputs, self.objective)
        # 2. All blocks in one pass.
        hidden_MKD = self.propose(batch["input_ids"], batch["segment"], inputs, reading.taps_BLE)
        # 3. Head and loss, without the logits of the batch ever being there.
        sums = self.acceptance(hidden_MKD, inputs, reading, self.objective, self.weight_share)
        normaliser = self.objective.normaliser(inputs["valid"])
        self._count(self._statistics(sums, inputs["valid"], normaliser))
        rows_B = row_sums(sums.block_loss_N, inputs["row"], len(batch["index"]))
        return LossTerms(sums.loss, normaliser, rows_B)

    def read_target(
        self, batch: dict[str, Any], inputs: dict[str, Any], objective: AcceptanceObjective
    ) -> TargetReading:
        """Features of the rows and, if the objective asks, predictions at the asked places."""
        target, needs = self.target_here(), objective.needs_kl or objective.needs_distribution
        if "taps" in inputs:
            if not needs:
                return TargetReading(inputs["taps"], None, None, None)
            return TargetReading(inputs["taps"], inputs["expected"], inputs["entropy"], None)
        return read_target(
            self.taps,
            target.head_VD,
            batch["input_ids"],
            inputs["places"],
            inputs["asked"],
            objective,
        )

    def target_here(self) -> CausalTarget:
        """The target, on the device of the draft."""
        if self.target.model.device != self.device:
            self.target.model.to(self.device)  # type: ignore[arg-type]
        return self.target

    def propose(
        self, ids_BL: Tensor, segment_BL: Tensor, inputs: dict[str, Any], taps_BLE: Tensor
    ) -> Tensor:
        """[M, K, D] what the draft hands to the target's head, at the slots that predict."""
        config = self.network.config
        anchor_BN = inputs["anchors"]
        block_BNQ = anchor_BN.new_full((*anchor_BN.shape, config.block_size), config.mask_token_id)
        block_BNQ[..., 0] = ids_BL.gather(1, anchor_BN)
        # The target may be in half precision; the draft's weights are not.
        dtype = self.network.fc.weight.dtype
        embeds_BNQD = torch.nn.functional.embedding(block_BNQ, self.target.embedding_VD).to(dtype)
        taps_BLE = taps_BLE.to(dtype)
        layout = self.network.layout(anchor_BN, inputs["exists"], segment_BL, inputs["places"])
        hidden_BNQD = self.network(taps_BLE, embeds_BNQD, layout)
        return hidden_BNQD.flatten(0, 1)[inputs["kept"], config.first_predicting_slot :]

    def acceptance(
        self,
        hidden_MKD: Tensor,
        inputs: dict[str, Any],
        reading: TargetReading,
        objective: AcceptanceObjective,
        weight_share: float | Tensor = 1.0,
    ) -> AcceptanceSums:
        """The losses of the blocks; weighted terms are divided by the share of their weights."""
        return fused_acceptance_loss(
            hidden_MKD,
            self.target.head_VD,
            inputs["labels"],
            inputs["valid"],
            objective=objective,
            teacher_index_NK=inputs["teacher"] if reading.asked else None,
            expected_UD=reading.expected_UD,
            entropy_U=reading.entropy_U,
            teacher_hidden_UD=reading.hidden_UD,
            rows=inputs["slots"],
            **objective.scales(self.predicted, weight_share),
        )

    def _statistics(self, sums: AcceptanceSums, valid_NK: Tensor, normaliser: Tensor) -> Tensor:
        """The sums that `_STATISTICS` names, of one micro-batch."""
        committed = committed_tokens(sums.hits_NK, valid_NK).sum()
        kl = torch.zeros_like(sums.ce) if sums.kl is None else sums.kl
        values = (
            sums.slots, sums.blocks, sums.weight, normaliser, sums.expected_length, kl, sums.ce,
            committed, sums.hits_NK[:, 0].sum(),
        )  # fmt: skip
        return torch.stack([value.detach().float() for value in values])

    def _count(self, statistics: Tensor) -> None:
        self._sums = statistics if self._sums is None else self._sums + statistics

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """As for every algorithm; then log what the draft of this step was worth."""
        super().configure_gradient_clipping(*args, **kwargs)
        assert self._sums is not None, "an optimiser step without a training step"
        sums = dict(zip(_STATISTICS, self._sum_over_ranks(self._sums).unbind(), strict=True))
        self._sums = None
        self.log("train/tau", sums["committed"] / sums["blocks"], prog_bar=True)
        self.log("train/expected_tau", 1.0 + sums["expected"] / sums["blocks"])
        self.log("train/first_accepted", sums["first"] / sums["blocks"])
        self.log("train/ce", sums["ce"] / sums["slots"])
        if self.objective.needs_kl:
            self.log("train/kl", sums["kl"] / sums["slots"])
        self.weight_share = sums["weight"] / sums["normaliser"]

    def on_validation_epoch_start(self) -> None:
        """Begin to count anew."""
        super().on_validation_epoch_start()
        self._validated = []

    def evaluate(self, batch: dict[str, Any], draw: int) -> Likelihood:
        """Cross-entropy of the draft at the blocks of this draw; keeps how many it would commit."""
        inputs = batch["draws"][draw]
        reading = self.read_target(batch, inputs, _CROSS_ENTROPY)
        hidden_MKD = self.propose(batch["input_ids"], batch["segment"], inputs, reading.taps_BLE)
        sums = self.acceptance(hidden_MKD, inputs, reading, _CROSS_ENTROPY)
        rows = len(batch["index"])
        nll_B = row_sums(sums.block_loss_N, inputs["row"], rows)
        tokens_B = row_sums(inputs["valid"].sum(-1).float(), inputs["row"], rows)
        committed_M = committed_tokens(sums.hits_NK, inputs["valid"])
        committed_B = row_sums(committed_M, inputs["row"], rows)
        blocks_B = row_sums(inputs["valid"].any(-1).float(), inputs["row"], rows)
        self._validated.append(torch.stack([committed_B, blocks_B], -1).double().cpu())
        return Likelihood(nll_B, tokens_B)

    def on_validation_epoch_end(self) -> None:
        """Besides: `val/tau`, the tokens that greedy verification commits per block.

        The mean over anchors drawn evenly from the target's own greedy answers. Decoding visits
        anchors unevenly (`mode=acceptance_eval` measures that), so the two differ a little.
        """
        super().on_validation_epoch_end()
        committed, blocks = self.gather(torch.cat(self._validated)).sum(0)
        self.log("val/tau", committed / blocks, prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the share of the weights, and which target the draft belongs to."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["weight_share"] = float(self.weight_share)
        checkpoint["target"] = {"name": self.target.name, "fingerprint": self.target.fingerprint}

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take over the share of the weights."""
        # A tensor, as in an unbroken run: a Python number would be divided by in double precision.
        self.weight_share = torch.tensor(checkpoint.get("weight_share", 1.0))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As for every algorithm; the target must be the same, too."""
        super().on_load_checkpoint(checkpoint)
        theirs = checkpoint.get("target", {})
        if theirs.get("fingerprint") not in (None, self.target.fingerprint):
            raise CheckpointError(
                f"cannot resume: its target is {theirs['name']} ({theirs['fingerprint']}), this run"
                f" has {self.target.name} ({self.target.fingerprint}); restore it"
            )

    def load_pretrained(self, path: str | Path, allow_partial: bool = False) -> None:
        """Start from another run's draft, or from a folder in the published format.

        Raises:
            CheckpointError: it does not fit this draft and its target.
        """
        if is_draft(Path(path)):
            theirs = load_draft(Path(path))
            self._check_shape(asdict(theirs.config), path)
            self.network.load_state_dict(theirs.state_dict())
            self.create_ema()
            return
        stored = stored_hyper_parameters(read_checkpoint(path), "training.from_pretrained")
        shape = stored["config"]["algo"].get("network")
        if shape is not None and not allow_partial:
            self._check_shape(shape, path)
        super().load_pretrained(path, allow_partial)

    def _check_shape(self, theirs: dict[str, Any], path: str | Path) -> None:
        """Raise CheckpointError where equal weights would not mean the same draft."""
        ours = asdict(self.network.config)
        for name in ours.keys() - _FREE_TO_CHANGE:
            found, mine = _plain(theirs.get(name)), _plain(ours[name])
            if found != mine:
                raise CheckpointError(
                    f"training.from_pretrained={path}: {name}={found}, this run has {mine}"
                )


def _plain(value: Any) -> Any:
    """Tuples as the lists that files make of them."""
    return list(value) if isinstance(value, tuple) else value


def accepted_tokens(hits_MK: Tensor) -> Tensor:
    """[M] how many slots from the first on are what the target would say."""
    return hits_MK.float().cumprod(-1).sum(-1)


def committed_tokens(hits_MK: Tensor, valid_MK: Tensor) -> Tensor:
    """[M] accepted drafts, and the target's own token behind them if the answer has one more.

    Args:
        hits_MK: whether a slot is what the target would say.
        valid_MK: whether the answer reaches a slot.
    """
    length_M = valid_MK.sum(-1)
    # Of an answer that ends inside the block nothing comes behind its last token.
    most_M = torch.where(length_M < valid_MK.shape[-1], length_M, length_M + 1)
    return torch.minimum(accepted_tokens(hits_MK & valid_MK) + 1, most_M)
