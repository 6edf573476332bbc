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
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedModel

from algorithm import Likelihood, LossTerms
from decoding.best_of import BestOf, Round
from decoding.block_reader import BlockReader
from decoding.candidates import Proposal
from decoding.chain import Refined
from decoding.generate import GenerationSettings, Generator
from decoding.refine import RefineGenerator
from models.causal import dtype_of
from models.identity import tensors_digest
from models.scorer import ScoreHead, ScoreScale
from objectives.block_layout import BlockLayout
from objectives.contrastive import NCETerms, duplicates, graded_target, score_penalty
from objectives.keyed import fold_key, keyed_uniform
from objectives.likelihood import row_sums
from objectives.nce_statistics import block_sums, largest_score, means_of
from objectives.pairing import Learns, ProposalLaw, check_pairing
from objectives.refinement import token_errors
from refine import BlockModel
from runtime.config import instantiate
from runtime.errors import ConfigError

_CHOSEN, _DRAWN, _KEPT = 0x10, 0x12, 0x13  # streams of keyed numbers


class Slots(NamedTuple):
    """The n + 1 slots of X blocks in a round.

    Attributes:
        tokens_XJS: slot 0 is the truth.
        hidden_XJSD: of the backbone.
        log_q_XJ: log-probabilities under the proposal's distributions.
        exists_XJ: slots that hold something.
        written_XS: places that were not given.
        scored_XS: of these the places of the text; behind its end nothing counts.
        block_X: numbers of the blocks in the flattened [B, M].
    """

    tokens_XJS: Tensor
    hidden_XJSD: Tensor
    log_q_XJ: Tensor
    exists_XJ: Tensor
    written_XS: Tensor
    scored_XS: Tensor
    block_X: Tensor


class CandidateScorer(BlockModel):
    """A score head on a frozen backbone that refines blocks (algo=nce)."""

    fresh_weights = ("head.",)
    models_text = False

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        self.head = self._new_head()
        self.eval_batches: list[dict[str, Tensor]] = []
        self._sums: Tensor | None = None
        self._peak = torch.zeros(())
        self._scored: list[Tensor] = []
        self._scored_with = torch.ones(())

    def _read_options(self) -> None:
        super()._read_options()
        self.best_of: BestOf = instantiate(self.config["bon"])
        if not self.config["bon"]["proposal"].get("include_greedy", True):
            raise ConfigError(
                "bon.proposal.include_greedy=false: what wins is told from the greedy block, which"
                " is candidate 0 (training leaves it out by itself); allowed: true"
            )
        self.negatives: BestOf = instantiate(_without_greedy(self.config["bon"]))
        nce = self.config["nce"]
        self.loss = instantiate(nce["loss"])
        self.dedup, self.l2 = nce["dedup"], nce["l2"]
        self.positive, self.target_temperature = nce["positive"], nce["target_temperature"]
        self._check_pairing()

    @classmethod
    def remembered(cls, config: dict[str, Any], stored: dict[str, Any]) -> dict[str, Any]:
        """Also what the scorer was trained with, which decoding must not contradict."""
        known = {"trained_with": stored.get("nce", {}).get("trained_with")}
        return super().remembered(config, stored) | {"nce": config["nce"] | known}

    def _prepare(self, model: PreTrainedModel) -> None:
        """The backbone is frozen, in the precision that the model's section names."""
        dtype = dtype_of(self.config["model"]["dtype"])
        torch.nn.Module.to(model.requires_grad_(False), dtype)

    def _check_pairing(self) -> None:
        """Note which candidates the scorer was trained with; refuse others that contradict it."""
        nce = self.config["nce"]
        if nce.get("trained_with") is None:
            nce["trained_with"] = dict(_law_of(self.best_of.proposal)._asdict())
        self.check_weight(self.best_of.alpha, self.best_of.form)
        name = _loss_name(nce)
        if name in ("ranking_corrected", "binary") and self.best_of.rounds > 1:
            raise ConfigError(
                f"bon.rounds={self.best_of.rounds}: from the second round on candidates are refined"
                f" and no draws of q, which nce/loss={name} needs; allowed: 1, or nce/loss=ranking"
            )
        if name != "ranking_corrected":
            return
        if self.best_of.score_agg == "select_each":
            raise ConfigError(
                "bon.score_agg=select_each: every pass has a q of its own, nce.loss="
                "ranking_corrected takes the last one's; allowed: perround, lastround"
            )
        if self.refinement.commit.keeps:
            rule = type(self.refinement.commit).__name__
            raise ConfigError(
                f"refine.commit={rule}: places committed before the last pass have one token, so a"
                " truth that says another there has no q for nce/loss=ranking_corrected; allowed:"
                " refine/commit=prefix_threshold, or nce/loss=ranking"
            )

    def check_weight(self, alpha: float, form: str = "additive") -> None:
        """Raise ValueError if decoding may not add the scores so (`objectives.pairing`)."""
        nce = self.config["nce"]
        trained, decoded = ProposalLaw(**nce["trained_with"]), _law_of(self.best_of.proposal)
        # A loss of one's own says what it learns; of those here it is known.
        learns = None if nce["learns"] is None else Learns(**nce["learns"])
        check_pairing(_loss_name(nce), trained, decoded, alpha, form, learns)

    def _new_head(self) -> ScoreHead:
        options = self.config["scorer"]
        scale = options["scale"]
        return ScoreHead.beside(
            self.backbone.model,
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

    def on_weights_moved(self) -> None:
        """Gamma is put back between its bounds."""
        self.head.scale.clamp()

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """As for every algorithm; logs how far gamma went."""
        before = self.head.scale().detach()
        super().optimizer_step(*args, **kwargs)
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
            batch["layout"] = self.layout(batch, rank_BN < most, bucket=most)
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
            layout.scored_BMS.flatten(0, 1),
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
        """The loss of every block, and the sums of `objectives.nce_statistics.SUMS`."""
        found = duplicates(slots.tokens_XJS, slots.exists_XJ, slots.scored_XS)
        distinct_XJ = slots.exists_XJ & ~found.earlier_MC
        valid_XJ = distinct_XJ & ~found.positive_MC if self.dedup else distinct_XJ
        target_XJ, counted_XJ = None, valid_XJ
        if self.positive == "fewest_errors":
            # Without the truth itself a candidate that equals it is the best there is.
            counted_XJ = distinct_XJ.clone()
            counted_XJ[:, 0] = False
            truth_X1S = slots.tokens_XJS[:, :1]
            errors_XJ = token_errors(slots.tokens_XJS, truth_X1S, slots.scored_XS[:, None])
            target_XJ = graded_target(errors_XJ, counted_XJ, self.target_temperature)
        terms = self.loss(score_XJ, slots.log_q_XJ, counted_XJ, target_XJ)
        gamma = self.head.scale() if self.config["scorer"]["bounded"] else None
        masks = slots.exists_XJ, valid_XJ, counted_XJ, found.positive_MC
        return terms, block_sums(score_XJ, terms, *masks, gamma)

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
        self.log(f"{stage}/gamma", gamma, prog_bar=stage == "train")
        on_bar = {"rank_accuracy"} | ({"nce_loss"} if stage == "val" else set())
        for name, mean in means_of(sums).items():
            self.log(f"{stage}/{name}", mean, prog_bar=name in on_bar)

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
            best_of=self.best_of, scores=self.scores,
            scorer_fingerprint=tensors_digest(self.head.state_dict().items()), device=device,
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
        """Keep some validation rows, unless a checkpoint brought some."""
        super().on_fit_start()
        if self.config["training"]["from_pretrained"] is None:
            rank_zero_warn(
                "training.from_pretrained=null: the scorer is trained on a model that has not"
                " learned to write blocks"
            )
        wanted = self.config["nce"]["eval_batches"]
        data = cast(Any, self.trainer).datamodule
        if self.eval_batches or not wanted or data is None:
            return
        kept = ("input_ids", "segment", "response", "index")
        # Of the whole validation split, so that every rank keeps the same ones.
        for batch in data.drawn_loader("validation", wanted, (self.seed, _KEPT)):
            self.require_documents(batch)
            self.eval_batches.append({name: batch[name].clone() for name in kept})


def _law_of(proposal: Proposal) -> ProposalLaw:
    return ProposalLaw(proposal.name, proposal.temperature, proposal.deterministic)


def _loss_name(nce: dict[str, Any]) -> str:
    return nce["loss"]["_target_"].rpartition(".")[2]


def _without_greedy(bon: dict[str, Any]) -> dict[str, Any]:
    """The candidates of training: of samples, none but samples. A certain one has no q."""
    proposal = bon["proposal"]
    if "include_greedy" in proposal:
        return bon | {"proposal": proposal | {"include_greedy": False}}
    return bon
