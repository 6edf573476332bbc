"""An autoregressive model becomes one that writes blocks: two ways to train it.

    MaskedAdapt   algo=masked_adapt: a share t of a block is BLANK, cross-entropy of the BLANKs
    DraftRefine   algo=draft_refine: the model refines its own drafts, one to K passes,
                  cross-entropy of all places of the last one

Both read the clean text once per step (`models.backbone.CleanPass`) and then blocks behind it; both
are validated by the exact likelihood of writing a block from left to right, and by what refinement
makes of it behind the true past.

Sources: arXiv 2503.09573 (block diffusion), 2606.08357 (draft and refine).
Legend: B rows, L tokens, N blocks of a row, M blocks that are written, S block size, D features,
V vocabulary, W copies of a block.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from algorithm import Likelihood, LossTerms
from decoding.block_reader import BlockReader
from decoding.chain import ChainState, Refined, Refinement
from decoding.generate import GenerationSettings, Generator
from decoding.refine import RefineGenerator
from objectives.block_layout import BlockLayout, block_layout
from objectives.corruption import MaskingProcess
from objectives.keyed import keyed_uniform
from objectives.likelihood import head_cross_entropy, masked_cross_entropy, row_sums
from objectives.refinement import filled_left, injection_rate, number_of_passes, token_errors
from pretrained import PretrainedAlgorithm
from runtime.config import instantiate
from runtime.errors import ConfigError

_PASSES, _INJECTION = 0x0C, 0x0D  # streams of keyed numbers
_BLOCK_BUCKET = 8
_LOGIT_ROWS = 2048  # rows of fp32 logits alive at a time where no gradient is wanted
# What is summed over the blocks of a validation.
_STATISTICS = ("blocks", "exact", "places", "right", "passes")


class BlockModel(PretrainedAlgorithm):
    """Common part: a backbone that reads clean text, then blocks behind it."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        self.block_size, self.seed = self.config["block_size"], self.config["seed"]
        self.refinement: Refinement = instantiate(self.config["refine"])
        self.register_buffer(
            "_no_bias_V", torch.zeros(len(self.backbone.head_VD)), persistent=False
        )
        self._no_bias_V: Tensor
        self._validated: list[Tensor] = []

    @property
    def is_exact(self) -> bool:
        """The likelihood is the chain rule's."""
        return True

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict:
        """Find the blocks on the host, before the batch travels to the device."""
        batch["layout"] = self.layout(batch)
        if self.trainer.training:
            batch["inputs"] = self.corrupt(batch, self.trainer.global_step)
        return batch

    def layout(self, batch: dict[str, Tensor], chosen_BN: Tensor | None = None) -> BlockLayout:
        """The blocks of a batch that are written.

        Raises:
            DataError: rows without documents. ValueError: documents that begin inside of a block.
        """
        self.require_documents(batch)
        # Compiled code wants equal shapes; on a CPU their number follows the batch.
        bucket = _BLOCK_BUCKET if self.device.type == "cpu" else self.config["model"]["length"]
        columns = batch["input_ids"], batch["segment"], batch["response"]
        return block_layout(*columns, self.block_size, bucket, chosen_BN)

    def corrupt(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """What is random in a training step, drawn on the host."""
        raise NotImplementedError

    def last_pass(
        self, reader: BlockReader, layout: BlockLayout, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states of the pass that is trained, [P, D], of the places [P] of the flattened
        [B, M, S] that count, and their weights [P]."""
        raise NotImplementedError

    def reader(self, batch: dict[str, Any], only_keys: bool = True) -> BlockReader:
        """The clean pass over a batch."""
        return BlockReader.over_rows(
            self.backbone, batch["input_ids"], batch["layout"], self.block_size, only_keys
        )

    def loss_terms(self, batch: dict[str, Any]) -> LossTerms:
        """Weighted cross-entropy of the places that count, as a sum."""
        layout: BlockLayout = batch["layout"]
        # 1. The clean text, once.
        reader = self.reader(batch)
        # 2. The blocks, of which the last pass has a gradient.
        hidden_PD, place_P, weight_P = self.last_pass(reader, layout, batch["inputs"])
        # 3. Head and loss in one pass over the logits.
        target_P = layout.target_BMS.flatten()[place_P]
        loss, loss_P = head_cross_entropy(
            hidden_PD, self.backbone.head_VD, self._no_bias_V, target_P, weight_P,
            self.special.mask,
        )  # fmt: skip
        row_P = place_P // layout.target_BMS[0].numel()
        rows_B = row_sums(loss_P * weight_P, row_P, len(batch["index"]))
        return LossTerms(loss, layout.predict_BMS.sum().float(), rows_B)

    def refine(self, reader: BlockReader, layout: BlockLayout) -> Refined:
        """What refinement makes of all blocks behind the true past, [B M] of them."""
        given_XS = ~layout.predict_BMS.flatten(0, 1)
        return self.refinement.refine(reader, layout.target_BMS.flatten(0, 1), given_XS)

    def on_validation_epoch_start(self) -> None:
        """Begin to count anew."""
        super().on_validation_epoch_start()
        self._validated = []

    def evaluate(self, batch: dict[str, Any], draw: int) -> Likelihood:
        """-log p of every row, exact: blocks in order, the places of a block from left to right.

        Each place is predicted with the true tokens on its left and BLANK from itself on. Counts
        besides what refinement makes of every block behind the true past.
        """
        layout: BlockLayout = batch["layout"]
        reader = self.reader(batch)
        nll_BMS = self.chain_nll(reader, layout)
        self._count_refined(reader, layout, len(batch["index"]))
        scored_BMS = layout.scored_BMS
        nll_B = nll_BMS.masked_fill(~scored_BMS, 0.0).flatten(1).double().sum(-1)
        return Likelihood(nll_B, scored_BMS.flatten(1).sum(-1))

    @torch.no_grad()
    def chain_nll(self, reader: BlockReader, layout: BlockLayout) -> Tensor:
        """[B, M, S] of every place to predict, its -log p given all that is left of it; else 0."""
        size, predict_BMS = self.block_size, layout.predict_BMS
        hidden_XVS, wanted_XVS = filled_left(predict_BMS.flatten(0, 1), size)
        target_XVS = layout.target_BMS.flatten(0, 1)[:, None].expand(-1, size, -1)
        tokens_XVS = target_XVS.masked_fill(hidden_XVS, self.special.mask)
        hidden_PD = reader.run(self.backbone.embed(tokens_XVS.flatten(0, 1)), copies=size)
        wanted_P = wanted_XVS.flatten().nonzero()[:, 0]
        nll_P = self._cross_entropy(
            hidden_PD.flatten(0, -2)[wanted_P], target_XVS.flatten()[wanted_P]
        )
        nll_XVS = torch.zeros(wanted_XVS.shape, device=nll_P.device)
        nll_XVS.view(-1)[wanted_P] = nll_P
        return nll_XVS.sum(1).view(predict_BMS.shape)

    def _cross_entropy(self, hidden_PD: Tensor, target_P: Tensor) -> Tensor:
        parts = zip(hidden_PD.split(_LOGIT_ROWS), target_P.split(_LOGIT_ROWS), strict=True)
        return torch.cat(
            [
                masked_cross_entropy(self.backbone.logits(part), target, self.special.mask)
                for part, target in parts
            ]
        )

    def _count_refined(self, reader: BlockReader, layout: BlockLayout, rows: int) -> None:
        """Keep what refinement finds of every block, by row."""
        refined = self.refine(reader, layout)
        predict_XS, target_XS = layout.predict_BMS.flatten(0, 1), layout.target_BMS.flatten(0, 1)
        wrong_X = token_errors(refined.token_XS, target_XS, predict_XS)
        places_X, exists_X = predict_XS.sum(-1), layout.exists_BM.flatten()
        columns = (
            exists_X, exists_X & (wrong_X == 0), places_X, places_X - wrong_X,
            refined.passes_X * exists_X,
        )  # fmt: skip
        table_XC = torch.stack([column.double() for column in columns], -1)
        self._validated.append(table_XC.unflatten(0, (rows, -1)).sum(1).cpu())

    def on_validation_epoch_end(self) -> None:
        """Besides the likelihood: what else was counted."""
        super().on_validation_epoch_end()
        self.log_counted()

    def log_counted(self) -> None:
        """How many blocks refinement finds behind the true past.

        `val/block_exact`: share of blocks that are right in all places; `val/token_accuracy`: of
        places; `val/tokens_per_pass`: places over passes of refinement.
        """
        totals = dict(zip(_STATISTICS, self.gather(torch.cat(self._validated)).sum(0), strict=True))
        self.log("val/block_exact", totals["exact"] / totals["blocks"], prog_bar=True)
        self.log("val/token_accuracy", totals["right"] / totals["places"])
        self.log("val/tokens_per_pass", totals["places"] / totals["passes"])

    def generator(
        self, settings: GenerationSettings, batch_size: int = 32, device: str | None = None
    ) -> Generator:
        """Answers, block after block."""
        return RefineGenerator(
            self.as_target(), settings, self.block_size, self.refinement, batch_size, device=device
        )

    @torch.no_grad()
    def loglikelihood(
        self, pairs: Sequence[tuple[Sequence[int], Sequence[int]]]
    ) -> list[tuple[float, bool]]:
        """log p(continuation | prompt) in nats by `chain_nll`, and whether refinement writes it."""
        answers = []
        for prompt, continuation in pairs:
            batch = self._document(prompt, continuation)
            layout = batch["layout"]
            reader = self.reader(batch)
            nats = self.chain_nll(reader, layout)[layout.scored_BMS].double().sum()
            scored_XS = layout.scored_BMS.flatten(0, 1)
            right_XS = self.refine(reader, layout).token_XS == layout.target_BMS.flatten(0, 1)
            answers.append((-float(nats), bool((right_XS | ~scored_XS).all())))
        return answers

    def _document(self, prompt: Sequence[int], continuation: Sequence[int]) -> dict[str, Any]:
        """A batch of one document; its last block is filled up as in training."""
        # Without any prompt the text begins as after the end of another one.
        prompt = list(prompt) or [self.special.eos]
        tokens = [*prompt, *continuation]
        fill = -len(tokens) % self.block_size
        ids_1L = torch.tensor([[*tokens, *[self.special.eos] * fill]], device=self.device)
        response_1L = torch.tensor(
            [[*[0] * len(prompt), *[1] * len(continuation), *[-1] * fill]], device=self.device
        )
        segment_1L = torch.zeros_like(ids_1L)
        batch: dict[str, Any] = {
            "input_ids": ids_1L, "segment": segment_1L, "response": response_1L,
        }  # fmt: skip
        batch["layout"] = self.layout(batch)
        return batch


class MaskedAdapt(BlockModel):
    """Masked block diffusion: t of every block, a share of about t is BLANK.

    Loss w(t) CE at the BLANKs; `algo.weighting` bound: w = p'(t)/p(t), uniform: w = 1. With
    `algo.complementary` every block is read twice, the second time with the other places BLANK.

    Raises:
        ConfigError: complementary masks under the bound's weights.
    """

    process: MaskingProcess

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        algo, training = self.config["algo"], self.config["training"]
        self.weighting, self.complementary = algo["weighting"], algo["complementary"]
        if self.complementary and self.weighting != "uniform":
            raise ConfigError(
                f"algo.complementary=true: algo.weighting={self.weighting} has no weight for the"
                " other places; allowed: algo.weighting=uniform"
            )
        noise = {k: v for k, v in self.config["noise"].items() if k not in ("name", "type")}
        self.process = MaskingProcess(
            instantiate(noise),
            self.block_size,
            self.seed,
            training["resample"],
            training["antithetic_sampling"],
            (training["sampling_eps_min"], training["sampling_eps_max"]),
        )

    def corrupt(self, batch: dict[str, Any], step: int) -> dict[str, Tensor]:
        """Masks and weights of the blocks that are written, [B, M, S]."""
        maskable_BL = (batch["response"] != 0) & (batch["segment"] >= 0)
        noise = self.process.draw(maskable_BL, batch["position"], (step,))
        layout: BlockLayout = batch["layout"]
        mask_BMS = layout.of_blocks(noise.mask_BL) & layout.predict_BMS
        weight_BMS = layout.of_blocks(noise.weight_BL)
        if self.weighting == "uniform":
            weight_BMS = torch.ones_like(weight_BMS)
        return {"mask": mask_BMS, "weight": weight_BMS}

    def last_pass(
        self, reader: BlockReader, layout: BlockLayout, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over partly masked blocks, or two with complementary masks."""
        mask_XWS = inputs["mask"].flatten(0, 1)[:, None]
        if self.complementary:
            other_XWS = ~mask_XWS & layout.predict_BMS.flatten(0, 1)[:, None]
            mask_XWS = torch.cat([mask_XWS, other_XWS], dim=1)
        copies = mask_XWS.shape[1]
        target_XWS = layout.target_BMS.flatten(0, 1)[:, None].expand(-1, copies, -1)
        tokens_XWS = target_XWS.masked_fill(mask_XWS, self.special.mask)
        hidden_YSD = reader.run(self.backbone.embed(tokens_XWS.flatten(0, 1)), copies)
        wanted_P = mask_XWS.flatten().nonzero()[:, 0]
        # Place p of the flattened [X, W, S] is place (p // (W S), p % S) of [X, S].
        size = self.block_size
        place_P = wanted_P // (copies * size) * size + wanted_P % size
        weight_P = inputs["weight"].flatten()[place_P]
        return hidden_YSD.flatten(0, 1)[wanted_P], place_P, weight_P


class DraftRefine(BlockModel):
    """Refinement of the model's own drafts: no masking, T passes, the last one trained."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        algo = self.config["algo"]
        self.most_passes, self.injection = algo["max_passes"], algo["injection"]

    def corrupt(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """The number of passes, and which places begin as the truth."""
        seen = step * self.config["loader"]["global_batch_size"] * batch["input_ids"].shape[1]
        rate = injection_rate(seen, **self.injection)
        key = (self.seed, _INJECTION, step)
        uniform_BL = keyed_uniform(key, batch["position"], batch["input_ids"].shape[1])
        layout: BlockLayout = batch["layout"]
        injected_BMS = (layout.of_blocks(uniform_BL) < rate) & layout.predict_BMS
        passes = number_of_passes((self.seed, _PASSES, step), self.most_passes)
        return {"injected": injected_BMS, "passes": passes, "rate": rate}

    def last_pass(
        self, reader: BlockReader, layout: BlockLayout, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """T - 1 passes over detached keys and values, then one with a gradient."""
        given_XS = ~layout.predict_BMS.flatten(0, 1)
        state = self._injected(reader, layout, inputs["injected"])
        if inputs["passes"] > 1:
            most = inputs["passes"] - 1
            state, _ = self.refinement.passes(reader.detached(), state, given_XS, most, whole=True)
        # What the last pass reads is made of embeddings, which so learn, too.
        hidden_XSD = reader.run(state.inputs_XSD)
        place_P = layout.predict_BMS.flatten().nonzero()[:, 0]
        hidden_PD = hidden_XSD.flatten(0, 1)[place_P]
        return hidden_PD, place_P, torch.ones(len(place_P), device=hidden_PD.device)

    def _injected(
        self, reader: BlockReader, layout: BlockLayout, injected_BMS: Tensor
    ) -> ChainState:
        """Blocks that begin with some true tokens; nothing of them is committed but what is
        given."""
        given_XS = ~layout.predict_BMS.flatten(0, 1)
        known_XS = given_XS | injected_BMS.flatten(0, 1)
        state = self.refinement.start(reader, layout.target_BMS.flatten(0, 1), known_XS)
        return state._replace(committed_XS=given_XS)
