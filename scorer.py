"""A scorer that ranks the candidates of a block, trained by noise-contrastive estimation.

The backbone is frozen. For every block that is written:

    1. the greedy chain behind the true past, and n candidates of its last distributions
    2. hidden states of the candidates (hard tokens); those of the truth stand in the clean text
    3. scores gamma s of the n + 1 slots, slot 0 being the truth
    4. -log softmax of slot 0, or another loss of `nce/loss`; copies of the truth are crossed out

with one set of candidates per round (`bon.rounds`; `lastround` takes the loss of the last one, the
others the mean). Decoding adds the scores to log q of the candidates (`decoding.best_of`), in the
way that fits the loss (`objectives.pairing`).

Sources: arXiv 2606.08357; 1809.01812 (ranking and binary NCE).
Legend: B rows, M blocks of a row, X blocks that count, C candidates, J = C + 1 slots, S places of a
block, D features, R rounds.
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from algorithm import Likelihood, LossTerms
from decoding.best_of import BestOf, Round
from decoding.block_reader import BlockReader
from decoding.chain import Refined
from decoding.generate import GenerationSettings, Generator
from decoding.refine import RefineGenerator
from models.causal import dtype_of
from models.scorer import ScoreHead, ScoreScale
from objectives.block_layout import BlockLayout
from objectives.contrastive import (
    NCETerms,
    duplicate_floor,
    duplicates,
    graded_target,
    largest_score,
    log_slots,
    positive_rank,
    scale_gradient,
    score_penalty,
    score_spread,
)
from objectives.keyed import fold_key, keyed_uniform
from objectives.likelihood import row_sums
from objectives.pairing import Learns, ProposalLaw, check_pairing
from objectives.refinement import token_errors
from refine import BlockModel
from runtime.config import instantiate
from runtime.errors import ConfigError

_CHOSEN, _DRAWN = 0x10, 0x12  # streams of keyed numbers
# What is summed over the blocks of a step or a validation: see `_statistics`.
_STATISTICS = (
    "blocks", "loss", "ln_slots", "duplicate_floor", "first", "reciprocal", "spread", "copies",
    "slots", "scale_gradient", "scale_floor",
)  # fmt: skip


class Slots(NamedTuple):
    """The n + 1 slots of X blocks in a round.

    Attributes:
        tokens_XJS: slot 0 is the truth.
        hidden_XJSD: of the backbone.
        log_q_XJ: log-probabilities under the proposal's distributions.
        exists_XJ: slots that hold something.
        written_XS: places that were not given.
        block_X: numbers of the blocks in the flattened [B, M].
    """

    tokens_XJS: Tensor
    hidden_XJSD: Tensor
    log_q_XJ: Tensor
    exists_XJ: Tensor
    written_XS: Tensor
    block_X: Tensor


class CandidateScorer(BlockModel):
    """A score head on a frozen backbone that refines blocks (algo=nce)."""

    fresh_weights = ("head.",)
    models_text = False

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        self.best_of: BestOf = instantiate(self.config["bon"])
        self.negatives: BestOf = instantiate(_without_greedy(self.config["bon"]))
        nce = self.config["nce"]
        self.loss = instantiate(nce["loss"])
        self.dedup, self.l2 = nce["dedup"], nce["l2"]
        self.positive, self.target_temperature = nce["positive"], nce["target_temperature"]
        self._check_pairing()
        self.head = self._new_head()
        self.eval_batches: list[dict[str, Tensor]] = []
        self._sums: Tensor | None = None
        self._peak = torch.zeros(())
        self._scored: list[Tensor] = []
        self._scored_with = torch.ones(())

    def _prepare(self, model: PreTrainedModel) -> None:
        """The backbone is frozen, in the precision that the model's section names."""
        dtype = dtype_of(self.config["model"]["dtype"])
        torch.nn.Module.to(model.requires_grad_(False), dtype)

    def _check_pairing(self) -> None:
        """Note which candidates the scorer was trained with; refuse others that contradict it."""
        best_of, nce = self.best_of, self.config["nce"]
        proposal = best_of.proposal
        decoded = ProposalLaw(proposal.name, proposal.temperature, proposal.deterministic)
        if nce.get("trained_with") is None:
            nce["trained_with"] = dict(decoded._asdict())
        trained = ProposalLaw(**nce["trained_with"])
        name = nce["loss"]["_target_"].rpartition(".")[2]
        # A loss of one's own says what it learns; of those here it is known.
        learns = None if nce["learns"] is None else Learns(**nce["learns"])
        check_pairing(name, trained, decoded, best_of.alpha, best_of.form, learns)
        if name == "ranking_corrected" and best_of.score_agg == "select_each":
            raise ConfigError(
                "bon.score_agg=select_each: every pass has a q of its own, nce.loss="
                "ranking_corrected takes the last one's; allowed: perround, lastround"
            )

    def _new_head(self) -> ScoreHead:
        shape, options = self.backbone.model.config, self.config["scorer"]
        scale = options["scale"]
        heads = shape.num_attention_heads
        return ScoreHead(
            hidden_size=shape.hidden_size,
            num_heads=heads,
            num_key_value_heads=shape.num_key_value_heads,
            head_dim=getattr(shape, "head_dim", None) or shape.hidden_size // heads,
            intermediate_size=shape.intermediate_size,
            layers=options["layers"],
            bounded=options["bounded"],
            scale=ScoreScale(
                scale["mode"], scale["init"], scale["min"], scale["max"], scale["dtype"]
            ),
        )

    def train(self, mode: bool = True) -> "CandidateScorer":
        """The backbone stays in evaluation mode."""
        super().train(mode)
        self.backbone.eval()
        return self

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The head, and the scale with a rate of its own and no decay."""
        scale = self.head.scale.log_scale
        groups: list[dict[str, Any]] = [
            {"params": [p for p in self.trained_parameters() if p is not scale]}
        ]
        if scale.requires_grad:
            rate = self.config["optim"]["lr"] * self.config["scorer"]["scale"]["lr_mult"]
            groups.append({"params": [scale], "lr": rate, "weight_decay": 0.0})
        return groups

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As for every algorithm; then gamma is put back between its bounds."""
        before = self.head.scale().detach()
        super().optimizer_step(*args, **kwargs)
        self.head.scale.clamp()
        self.log("train/gamma_moved", (self.head.scale() - before).abs().detach())

    def corrupt(self, batch: dict[str, Any], step: int) -> dict[str, Any]:
        """Which blocks of every row are looked at: `nce.blocks_per_row` of them at random; and what
        the sampled candidates of this step are keyed by."""
        most = self.config["nce"]["blocks_per_row"]
        if most is not None:
            blocks = batch["input_ids"].shape[1] // self.block_size
            key = (self.seed, _CHOSEN, step)
            uniform_BN = keyed_uniform(key, batch["position"], blocks)
            written_BN = cast(BlockLayout, batch["layout"]).written_BN
            rank_BN = uniform_BN.masked_fill(~written_BN, 2.0).argsort(1).argsort(1)
            batch["layout"] = self.layout(batch, rank_BN < most)
        return {"drawn": fold_key((self.seed, _DRAWN, step))}

    def row_keys(self, batch: dict[str, Any], layout: BlockLayout) -> Tensor:
        """[B M] keys of sampled candidates: the row, the block's place; in training the step."""
        step = batch.get("inputs", {}).get("drawn", 0)
        return (batch["index"][:, None] * (1 << 20) + layout.block_BM).flatten() + step

    @torch.no_grad()
    def candidates(
        self, batch: dict[str, Any], layout: BlockLayout, best_of: BestOf
    ) -> tuple[BlockReader, Refined, list[Round]]:
        """The greedy chain of every block behind the true past, and its candidates by round."""
        reader = self.reader(batch, only_keys=False)
        given_XS = ~layout.predict_BMS.flatten(0, 1)
        token_XS, row_X = layout.target_BMS.flatten(0, 1), self.row_keys(batch, layout)
        if self.best_of.score_agg == "select_each":
            refined, choice = best_of.choose(
                reader, self.refinement, token_XS, given_XS, row_X, self.scores
            )
            return reader, refined, choice.rounds
        refined = self.refinement.refine(reader, token_XS, given_XS)
        return reader, refined, list(best_of.rounds_of(reader, refined, row_X))

    @torch.no_grad()
    def slots(
        self, reader: BlockReader, refined: Refined, layout: BlockLayout, found: Round
    ) -> Slots:
        """The truth and the candidates of a round, of the blocks that exist and have that round."""
        exists_X = layout.exists_BM.flatten()
        new_X = exists_X if found.new_X is None else exists_X & found.new_X
        block_X = new_X.nonzero()[:, 0]
        assert reader.clean_BLD is not None, "the clean pass was made to its end"
        hidden_X1SD = layout.of_blocks(reader.clean_BLD).flatten(0, 1)[:, None]
        truth_X1S = layout.target_BMS.flatten(0, 1)[:, None]
        log_q_X1 = self.best_of.log_q_of(reader, refined, truth_X1S)
        columns = (
            torch.cat([truth_X1S, found.tokens_XCS], 1),
            torch.cat([hidden_X1SD, found.hidden_XCSD], 1),
            torch.cat([log_q_X1, found.log_q_XC], 1),
            torch.cat([torch.ones_like(found.valid_XC[:, :1]), found.valid_XC], 1),
            layout.predict_BMS.flatten(0, 1),
        )
        return Slots._make([*(column[block_X] for column in columns), block_X])

    def score(self, hidden_XCSD: Tensor, tokens_XCS: Tensor, written_XS: Tensor) -> Tensor:
        """[X, C] gamma s, with its gradient."""
        blocks, copies = tokens_XCS.shape[:2]
        written_YS = written_XS.repeat_interleave(copies, dim=0)
        token_YSD = self.backbone.embed(tokens_XCS.flatten(0, 1)).detach()
        return self.head(hidden_XCSD.flatten(0, 1), token_YSD, written_YS).view(blocks, copies)

    @torch.no_grad()
    def scores(self, hidden_XCSD: Tensor, tokens_XCS: Tensor, written_XS: Tensor) -> Tensor:
        """The same for decoding (`decoding.best_of.Scores`)."""
        return self.score(hidden_XCSD, tokens_XCS, written_XS)

    def round_loss(self, slots: Slots, score_XJ: Tensor) -> tuple[NCETerms, Tensor]:
        """The loss of every block, and the statistics of `_STATISTICS` summed over them."""
        found = duplicates(slots.tokens_XJS, slots.exists_XJ, slots.written_XS)
        distinct_XJ = slots.exists_XJ & ~found.earlier_MC
        valid_XJ = distinct_XJ & ~found.positive_MC if self.dedup else distinct_XJ
        target_XJ, counted_XJ = None, valid_XJ
        if self.positive == "fewest_errors":
            # Without the truth itself a candidate that equals it is the best there is.
            counted_XJ = distinct_XJ.clone()
            counted_XJ[:, 0] = False
            truth_X1S = slots.tokens_XJS[:, :1]
            errors_XJ = token_errors(slots.tokens_XJS, truth_X1S, slots.written_XS[:, None])
            target_XJ = graded_target(errors_XJ, counted_XJ, self.target_temperature)
        terms = self.loss(score_XJ, slots.log_q_XJ, counted_XJ, target_XJ)
        masks = valid_XJ, counted_XJ, found.positive_MC
        return terms, self._statistics(slots, score_XJ, terms, *masks)

    def _statistics(
        self, slots: Slots, score_XJ: Tensor, terms: NCETerms, valid_XJ: Tensor,
        counted_XJ: Tensor, copy_XJ: Tensor,
    ) -> Tensor:  # fmt: skip
        score_XJ, counts_X = score_XJ.detach(), terms.weight_M
        rank = positive_rank(score_XJ, valid_XJ)
        columns = (
            counts_X, terms.loss_M.detach() * counts_X, log_slots(counted_XJ) * counts_X,
            duplicate_floor((copy_XJ & valid_XJ).sum(-1)) * counts_X, rank.first_M * counts_X,
            rank.reciprocal_M * counts_X, score_spread(score_XJ, valid_XJ) * counts_X,
            copy_XJ.sum(-1).float(), slots.exists_XJ[:, 1:].sum(-1).float(),
            scale_gradient(terms, score_XJ) * counts_X, self._floor(counted_XJ) * counts_X,
        )  # fmt: skip
        return torch.stack([column.sum().double() for column in columns])

    def _floor(self, counted_XJ: Tensor) -> Tensor:
        """[X] what a bounded scale allows with the negatives that a block has."""
        if not self.config["scorer"]["bounded"]:
            return torch.zeros(len(counted_XJ), device=counted_XJ.device)
        # `objectives.contrastive.bound_floor`, without asking the device for gamma.
        negatives_X = (counted_XJ.sum(-1) - 1).clamp(min=0)
        return torch.log1p(negatives_X * torch.exp(-2.0 * self.head.scale().detach()))

    def _rounds(self, batch: dict[str, Any]) -> Iterator[tuple[Slots, Tensor, NCETerms, Tensor]]:
        """Slots, scores, losses and statistics of every round that counts."""
        layout: BlockLayout = batch["layout"]
        reader, refined, rounds = self.candidates(batch, layout, self.negatives)
        for found in rounds[-1:] if self.best_of.score_agg == "lastround" else rounds:
            slots = self.slots(reader, refined, layout, found)
            score_XJ = self.score(slots.hidden_XJSD, slots.tokens_XJS, slots.written_XS)
            yield slots, score_XJ, *self.round_loss(slots, score_XJ)

    def loss_terms(self, batch: dict[str, Any]) -> LossTerms:
        """NCE loss of all blocks that count, as a sum over blocks and rounds."""
        layout: BlockLayout = batch["layout"]
        losses, weights, rows = [], [], []
        for slots, score_XJ, terms, statistics in self._rounds(batch):
            loss_X = terms.loss_M
            if self.l2:
                loss_X = loss_X + self.l2 * score_penalty(score_XJ, slots.exists_XJ)
            loss_X = loss_X * terms.weight_M
            row_X = slots.block_X // layout.block_BM.shape[1]
            losses.append(loss_X.sum())
            weights.append(terms.weight_M.sum())
            rows.append(row_sums(loss_X.detach(), row_X, len(batch["index"])))
            self._sums = statistics if self._sums is None else self._sums + statistics
            peak = largest_score(score_XJ.detach(), slots.exists_XJ).max()
            self._peak = torch.maximum(self._peak.to(peak.device), peak)
        # A batch in which every candidate is the truth teaches nothing, which is no error.
        weight = torch.stack(weights).sum().clamp(min=1e-6)
        return LossTerms(torch.stack(losses).sum(), weight, torch.stack(rows).sum(0))

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        """As for every algorithm; then log what the scorer of this step was worth."""
        super().configure_gradient_clipping(*args, **kwargs)
        assert self._sums is not None, "an optimiser step without a training step"
        gamma = self.head.scale().detach()
        self._log_sums("train", self._sum_over_ranks(self._sums), gamma)
        self.log("train/score_peak", self._peak, sync_dist=True, reduce_fx="max")
        self._sums, self._peak = None, torch.zeros(())

    def _log_sums(self, stage: str, sums: Tensor, gamma: Tensor) -> None:
        """Losses beside ln(n + 1) and the floors that copies and a bounded scale put under them."""
        named = dict(zip(_STATISTICS, sums.unbind(), strict=True))
        blocks = named["blocks"].clamp(min=1.0)
        self.log(f"{stage}/gamma", gamma, prog_bar=stage == "train")
        self.log(f"{stage}/nce_loss", named["loss"] / blocks, prog_bar=stage == "val")
        self.log(f"{stage}/ln_slots", named["ln_slots"] / blocks)
        self.log(f"{stage}/duplicate_floor", named["duplicate_floor"] / blocks)
        self.log(f"{stage}/scale_floor", named["scale_floor"] / blocks)
        self.log(f"{stage}/gamma_gradient", named["scale_gradient"] / blocks)
        self.log(f"{stage}/rank_accuracy", named["first"] / blocks, prog_bar=True)
        self.log(f"{stage}/mrr", named["reciprocal"] / blocks)
        self.log(f"{stage}/score_spread", named["spread"] / blocks)
        self.log(f"{stage}/duplicate_rate", named["copies"] / named["slots"].clamp(min=1.0))

    def on_validation_epoch_start(self) -> None:
        """Begin to count anew."""
        super().on_validation_epoch_start()
        self._scored = []

    def evaluate(self, batch: dict[str, Any], draw: int) -> Likelihood:
        """NCE loss of every row, nats per block that counts (under `val/nll`, too)."""
        rows = len(batch["index"])
        per_row = batch["layout"].block_BM.shape[1]
        nll_B = torch.zeros(rows, dtype=torch.float64, device=self.device)
        count_B = torch.zeros_like(nll_B)
        for slots, _, terms, statistics in self._rounds(batch):
            row_X = slots.block_X // per_row
            nll_B += row_sums(terms.loss_M * terms.weight_M, row_X, rows)
            count_B += row_sums(terms.weight_M, row_X, rows)
            self._scored.append(statistics.cpu())
        # Behind the validation the weights are no longer their averages.
        self._scored_with = self.head.scale().detach()
        return Likelihood(nll_B, count_B)

    def log_counted(self) -> None:
        """The sums of a validation."""
        sums = self._sum_over_ranks(torch.stack(self._scored).sum(0).to(self.device))
        self._log_sums("val", sums, self._scored_with)

    def generator(
        self, settings: GenerationSettings, batch_size: int = 32, device: str | None = None
    ) -> Generator:
        """Answers, the best of n candidates for every block."""
        generator = RefineGenerator(
            self.as_target(), settings, self.block_size, self.refinement, batch_size,
            best_of=self.best_of, scores=self.scores, device=device,
        )  # fmt: skip
        self.head.to(generator.device)
        return generator

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the blocks that the scorer is measured on, so that curves stay comparable."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["eval_batches"] = self.eval_batches

    @torch.no_grad()
    def adopt(self, checkpoint: dict[str, Any]) -> None:
        """A frozen backbone is what the other run was measured by: the average, if it has one."""
        shadows = (checkpoint["ema"] or {}).get("shadow_params", [])
        weights = list(self.backbone.parameters())
        # Another scorer has averaged its head alone.
        if [shadow.shape for shadow in shadows] == [weight.shape for weight in weights]:
            for weight, shadow in zip(weights, shadows, strict=True):
                weight.copy_(shadow)

    def restore(self, checkpoint: dict[str, Any]) -> None:
        """Take over those blocks."""
        self.eval_batches = checkpoint.get("eval_batches", [])

    def on_fit_start(self) -> None:
        """Keep the first validation batches, unless a checkpoint brought some."""
        super().on_fit_start()
        wanted = self.config["nce"]["eval_batches"]
        data = cast(Any, self.trainer).datamodule
        if self.eval_batches or not wanted or data is None:
            return
        kept = ("input_ids", "segment", "response", "index")
        # Of the whole validation split, so that every rank keeps the same ones.
        loader = data.eval_loader("validation", rank=0, world=1)
        for batch in islice(loader, wanted):
            self.require_documents(batch)
            self.eval_batches.append({name: batch[name].clone() for name in kept})


def _without_greedy(bon: dict[str, Any]) -> dict[str, Any]:
    """The candidates of training: of samples, none but samples. A certain one has no q."""
    proposal = bon["proposal"]
    if "include_greedy" in proposal:
        return bon | {"proposal": proposal | {"include_greedy": False}}
    return bon
