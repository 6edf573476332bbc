"""Supervised fine-tuning of a causal language model: -log p of an answer given its prompt.

    loss = - sum over tokens of the answers of log p(x_l | its document before it)

With plain text every token is one to write. Documents of a row do not see each other.

Legend: B rows, L tokens, P places that predict.
"""

from typing import Any

import torch
from torch import Tensor

from algorithm import LossTerms
from causal import CausalAlgorithm
from objectives.likelihood import head_cross_entropy, row_sums


class SupervisedFinetune(CausalAlgorithm):
    """Next-token cross-entropy of the answers (algo=sft_raw)."""

    def __init__(self, config: dict[str, Any], tokenizer: dict) -> None:
        super().__init__(config, tokenizer)
        self.register_buffer(
            "_no_bias_V", torch.zeros(len(self.backbone.head_VD)), persistent=False
        )
        self._no_bias_V: Tensor

    def loss_terms(self, batch: dict[str, Any]) -> LossTerms:
        """Cross-entropy of all answers' tokens, as a sum."""
        hidden_PD, place_P = self.predicting(batch)
        weight_P = torch.ones(len(place_P), device=hidden_PD.device)
        loss, loss_P = head_cross_entropy(
            hidden_PD, self.backbone.head_VD, self._no_bias_V,
            batch["input_ids"].flatten()[place_P + 1], weight_P, self.special.mask,
        )  # fmt: skip
        row_P = place_P // batch["input_ids"].shape[1]
        rows_B = row_sums(loss_P, row_P, len(batch["index"]))
        return LossTerms(loss, weight_P.sum(), rows_B)
