"""Supervised fine-tuning of a causal language model: -log p of an answer given its prompt.

    loss = - sum over tokens of the answers of w_l log p(x_l | its document before it) / sum of w_l

With plain text every token is one to write. Documents of a row do not see each other. w is 1, or
with thoughts in the text what `algo.weights` says of the kind of token x_l.

Legend: B rows, L tokens, P places that predict, D features, K kinds of tokens, C counts.
"""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from algorithm import Likelihood, LossTerms
from callbacks.throughput import Throughput
from causal import CausalAlgorithm
from evaluation.kind_likelihood import RowLikelihoods, from_table, losses
from objectives.likelihood import head_cross_entropy, row_sums
from objectives.token_kinds import KINDS, behind_thoughts, without_thoughts
from runtime.errors import ConfigError

_REACH = 16  # tokens of text behind a thought whose likelihood is reported


class SupervisedFinetune(CausalAlgorithm):
    """Next-token cross-entropy of the answers (algo=sft_raw)."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        self.register_buffer(
            "_no_bias_V", torch.zeros(len(self.backbone.head_VD)), persistent=False
        )
        self._no_bias_V: Tensor

    def token_weights(self, batch: dict[str, Any], place_P: Tensor) -> Tensor:
        """Weights [P] of the tokens that the places predict."""
        return torch.ones(len(place_P), device=place_P.device)

    def loss_terms(self, batch: dict[str, Any]) -> LossTerms:
        """Weighted cross-entropy of all answers' tokens, as a sum."""
        hidden_PD, place_P = self.predicting(batch)
        weight_P = self.token_weights(batch, place_P)
        loss, loss_P = head_cross_entropy(
            hidden_PD, self.backbone.head_VD, self._no_bias_V,
            batch["input_ids"].flatten()[place_P + 1], weight_P, self.special.mask,
        )  # fmt: skip
        row_P = place_P // batch["input_ids"].shape[1]
        rows_B = row_sums(loss_P * weight_P, row_P, len(batch["index"]))
        return LossTerms(loss, weight_P.sum(), rows_B)


class ThoughtFinetune(SupervisedFinetune):
    """Text with thoughts in it (algo=sft_thoughts), weighted by kind of token.

    Rows carry `kind` (`objectives.token_kinds`); rows without it are all text. Validation reports
    the likelihood in the rows' own format, of the same rows without thoughts, and by kind.

    Raises:
        ConfigError: weights of other kinds, that are all 0, or 0 for text where rows have nothing
            else.
    """

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        weights = [float(self.config["algo"]["weights"][name]) for name in KINDS]
        self.register_buffer("_weight_K", torch.tensor(weights), persistent=False)
        self._weight_K: Tensor
        self.row_likelihoods: RowLikelihoods | None = None
        self._tables: list[Tensor] = []

    def _read_options(self) -> None:
        super()._read_options()
        weights = self.config["algo"]["weights"]
        for name, weight in weights.items():
            if name not in KINDS:
                raise ConfigError(
                    f"algo.weights.{name}={weight}: no kind of token; allowed: {', '.join(KINDS)}"
                )
        if not any(weights[name] > 0 for name in KINDS):
            raise ConfigError(
                f"algo.weights={weights}: nothing would be learned; allowed: numbers >= 0, one of"
                " them above 0"
            )

    def configure_callbacks(self) -> list[L.Callback]:
        """Its table reports what training cost."""
        return [Throughput(Path(self.config["paths"]["run_dir"]) / "throughput.json")]

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict:
        """As for all text; a batch without kinds has to have a weight.

        Raises:
            ConfigError: it has none.
        """
        weights = self.config["algo"]["weights"]
        if "kind" not in batch and weights["text"] == 0:
            raise ConfigError(
                f"algo.weights.text=0: data={self.config['data']['name']} has no thoughts, all of"
                " it is text; allowed: a number above 0, or data=thoughts"
            )
        return super().on_before_batch_transfer(batch, dataloader_idx)

    def token_weights(self, batch: dict[str, Any], place_P: Tensor) -> Tensor:
        """What `algo.weights` says of the kind of the predicted tokens."""
        return self._weight_K[_kinds(batch).flatten()[place_P + 1]]

    def on_validation_epoch_start(self) -> None:
        """Begin to count anew."""
        super().on_validation_epoch_start()
        self._tables = []

    def evaluate(self, batch: dict[str, Any], draw: int) -> Likelihood:
        """-log p of every row in its own format, unweighted; keeps the parts of it by the way."""
        kind_BL, rows = _kinds(batch), len(batch["index"])
        nll_P, place_P = self.token_nll(batch)
        row_P, kind_P = place_P // kind_BL.shape[1], kind_BL.flatten()[place_P + 1]
        behind_P = behind_thoughts(kind_BL, batch["segment"], _REACH).flatten()[place_P + 1]

        def sums(chosen_P: Tensor) -> tuple[Tensor, Tensor]:
            """Nats and tokens [B] of a choice of the places."""
            nll_B, tokens_B = (row_sums(x_P * chosen_P, row_P, rows) for x_P in (nll_P, ones_P))
            return nll_B, tokens_B

        ones_P = torch.ones_like(nll_P)
        selected = sums(ones_P)
        # 1. The same rows without thoughts; where there are none they are the same.
        raw = selected
        if bool((kind_BL != 0).any()):
            raw = super().evaluate(without_thoughts({**batch, "kind": kind_BL}), draw)
        # 2. By kind of the predicted token.
        chosen = [*(kind_P == kind for kind in range(len(KINDS))), behind_P]
        parts = [selected, raw, *(sums(chosen_P) for chosen_P in chosen)]
        nll, tokens = ([part[place] for part in parts] for place in (0, 1))
        columns = [batch["index"], *nll, *tokens]
        self._tables.append(torch.stack([column.double() for column in columns], -1).cpu())
        return Likelihood(*selected)

    def on_validation_epoch_end(self) -> None:
        """Besides the likelihood: raw and selected loss, and by kind (`val/loss_raw`, ...).

        `row_likelihoods` keeps the rows, in the order of the dataset.
        """
        super().on_validation_epoch_end()
        self.row_likelihoods = from_table(self.gather(torch.cat(self._tables)).numpy())
        group = self.config["loader"]["eval_global_batch_size"]
        found = losses(self.row_likelihoods, group)
        self.log_dict({f"val/{name}": value for name, value in found.items()})


def _kinds(batch: dict[str, Any]) -> Tensor:
    """Kind [B, L] of every token, text where the rows do not say."""
    kind_BL = batch.get("kind")
    if kind_BL is None:
        return torch.zeros_like(batch["input_ids"])
    return kind_BL.clamp(min=0)
