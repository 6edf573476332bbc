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
from objectives.block_layout import BlockLayout, block_layout, document_of, rows_of
from objectives.corruption import MaskingProcess
from objectives.keyed import keyed_uniform
from objectives.likelihood import head_cross_entropy, row_sums
from objectives.refinement import (
    allowed_log_probabilities,
    filled_left,
    injection_rate,
    number_of_passes,
    token_errors,
)
from pretrained import PretrainedAlgorithm
from runtime.config import instantiate
from runtime.errors import ConfigError

_PASSES, _INJECTION = 0x0C, 0x0D  # streams of keyed numbers
_BLOCK_BUCKET = 8
_LOGIT_ROWS = 2048  # rows of fp32 logits alive at a time where no gradient is wanted
_PAIRS = 16  # documents whose likelihood is found at once
# What is summed over the blocks of a validation.
_STATISTICS = ("blocks", "exact", "places", "right", "passes")


class BlockModel(PretrainedAlgorithm):
    """Common part: a backbone that reads clean text, then blocks behind it."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        # What decoding never writes has no probability in training either.
        allowed_V = torch.zeros(len(self.backbone.head_VD))
        allowed_V[self.backbone.forbidden_V] = -torch.inf
        self.register_buffer("_allowed_V", allowed_V, persistent=False)
        self._allowed_V: Tensor
        self._validated: list[Tensor] = []

    def _read_options(self) -> None:
        self.block_size, self.seed = self.config["block_size"], self.config["seed"]
        self.refinement: Refinement = instantiate(self.config["refine"])

    @property
    def is_exact(self) -> bool:
        """The likelihood is the chain rule's."""
        return True

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict:
        """Find the blocks on the host, too."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        batch["layout"] = self.layout(batch)
        if self.trainer.training:
            batch["inputs"] = self.corrupt(batch, self.trainer.global_step)
        return batch

    def layout(
        self,
        batch: dict[str, Tensor],
        chosen_BN: Tensor | None = None,
        bucket: int | None = None,
    ) -> BlockLayout:
        """The blocks of a batch that are written, or the chosen ones of them.

        Their number is rounded up to a multiple of `bucket`.

        Raises:
            DataError: rows without documents. ValueError: documents that begin inside of a block.
        """
        self.require_documents(batch)
        if bucket is None:
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
            hidden_PD, self.backbone.head_VD, self._allowed_V, target_P, weight_P,
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
        nll_XVS = torch.zeros(wanted_XVS.shape, dtype=nll_P.dtype, device=nll_P.device)
        nll_XVS.view(-1)[wanted_P] = nll_P
        return nll_XVS.sum(1).view(predict_BMS.shape)

    def _cross_entropy(self, hidden_PD: Tensor, target_P: Tensor) -> Tensor:
        forbidden_V = self.backbone.forbidden_V
        nll = [
            -allowed_log_probabilities(self.backbone.logits(part_PD), forbidden_V).gather(
                -1, target[:, None]
            )[:, 0]
            for part_PD, target in zip(
                hidden_PD.split(_LOGIT_ROWS), target_P.split(_LOGIT_ROWS), strict=True
            )
        ]
        return torch.cat(nll).float()

    def _count_refined(self, reader: BlockReader, layout: BlockLayout, rows: int) -> None:
        """Keep what refinement finds of every block, by row."""
        refined = self.refine(reader, layout)
        # What is written behind the end of a text is dropped.
        scored_XS, target_XS = layout.scored_BMS.flatten(0, 1), layout.target_BMS.flatten(0, 1)
        wrong_X = token_errors(refined.token_XS, target_XS, scored_XS)
        places_X, exists_X = scored_XS.sum(-1), layout.exists_BM.flatten()
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
        """log p(continuation | prompt) in nats by `chain_nll`, and whether refinement writes it.

        Of a pair that is too long the model reads the end.

        Raises:
            ValueError: a continuation without tokens or longer than the model's positions; unknown
                ids.
        """
        longest = self.backbone.model.config.max_position_embeddings
        limits = self.block_size, longest, len(self.backbone.table_VD), self.special.eos
        documents = [document_of(*pair, *limits) for pair in pairs]
        # Documents of like length run together.
        order = sorted(range(len(pairs)), key=lambda pair: len(documents[pair][0]), reverse=True)
        answers: dict[int, tuple[float, bool]] = {}
        for first in range(0, len(order), _PAIRS):
            chosen = order[first : first + _PAIRS]
            batch = self._batch([documents[pair] for pair in chosen])
            layout, rows = batch["layout"], len(chosen)
            reader, scored_BMS = self.reader(batch), layout.scored_BMS
            nll_BMS = self.chain_nll(reader, layout).masked_fill(~scored_BMS, 0.0)
            said_BMS = self.refine(reader, layout).token_XS.view(layout.target_BMS.shape)
            wrong_BMS = scored_BMS & (said_BMS != layout.target_BMS)
            nats_B = nll_BMS.double().view(rows, -1).sum(-1)
            greedy_B = ~wrong_BMS.view(rows, -1).any(-1)
            found = zip((-nats_B).tolist(), greedy_B.tolist(), strict=True)
            answers.update(zip(chosen, found, strict=True))
        return [answers[pair] for pair in range(len(pairs))]

    def _batch(self, documents: Sequence[tuple[list[int], list[int]]]) -> dict[str, Any]:
        """Documents of the same or of falling length as rows."""
        columns = rows_of(documents, self.special.eos)
        batch: dict[str, Any] = {name: x_BL.to(self.device) for name, x_BL in columns.items()}
        batch["layout"] = self.layout(batch, bucket=_BLOCK_BUCKET)
        return batch


class MaskedAdapt(BlockModel):
    """Masked block diffusion: t of every block, a share of about t is BLANK.

    Loss w(t) CE at the BLANKs; `algo.weighting` bound: w = p'(t)/p(t), uniform: w = 1. With
    `algo.complementary` every block is read twice, the second time with the other places BLANK.

    Raises:
        ConfigError: complementary masks under the bound's weights.
    """

    process: MaskingProcess

    def _read_options(self) -> None:
        super()._read_options()
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
        """Masks and weights of the blocks that are written."""
        maskable_BL = (batch["response"] != 0) & (batch["segment"] >= 0)
        noise = self.process.draw(maskable_BL, batch["position"], (step,))
        layout: BlockLayout = batch["layout"]
        mask_BMS = layout.of_blocks(noise.mask_BL) & layout.predict_BMS
        weight_BMS = layout.of_blocks(noise.weight_BL)
        if self.weighting == "uniform":
            weight_BMS = torch.ones_like(weight_BMS)
        masks = [mask_BMS, ~mask_BMS & layout.predict_BMS] if self.complementary else [mask_BMS]
        return masked_inputs(masks, weight_BMS)

    def last_pass(
        self, reader: BlockReader, layout: BlockLayout, inputs: dict[str, Any]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass over partly masked blocks, or two with complementary masks."""
        mask_XWS = inputs["mask"]
        copies = mask_XWS.shape[1]
        target_XWS = layout.target_BMS.flatten(0, 1)[:, None].expand(-1, copies, -1)
        tokens_XWS = target_XWS.masked_fill(mask_XWS, self.special.mask)
        hidden_YSD = reader.run(self.backbone.embed(tokens_XWS.flatten(0, 1)), copies)
        return hidden_YSD.flatten(0, 1)[inputs["wanted"]], inputs["place"], inputs["weight"]


def masked_inputs(masks: Sequence[Tensor], weight_BMS: Tensor) -> dict[str, Tensor]:
    """Blocks that are read with each of W masks [B, M, S].

    Returns:
        mask: [X, W, S]. wanted: where it is BLANK, places of it flattened. place: which places of
        [B, M, S] these are, and weight: their weights. They are found on the host; a device would
        have to be waited for.
    """
    mask_XWS = torch.stack(list(masks), 2).flatten(0, 1)
    wanted_P = mask_XWS.flatten().nonzero()[:, 0]
    size = mask_XWS.shape[-1]
    place_P = wanted_P // (len(masks) * size) * size + wanted_P % size
    weight_P = weight_BMS.flatten()[place_P]
    return {"mask": mask_XWS, "wanted": wanted_P, "place": place_P, "weight": weight_P}


class DraftRefine(BlockModel):
    """Refinement of the model's own drafts: no masking, T passes, the last one trained."""

    def _read_options(self) -> None:
        super()._read_options()
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
        place_P = layout.predict_BMS.flatten().nonzero()[:, 0]
        return {"injected": injected_BMS, "passes": passes, "rate": rate, "place": place_P}

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
        place_P = inputs["place"]
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
