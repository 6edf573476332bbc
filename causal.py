"""Algorithms that train a causal model by what it predicts: which places, and how well.

Rows say in `response` which tokens are to be written (1) and in `segment` where documents are;
documents of a row do not see each other. Their likelihood is that of these tokens:

    nll = - sum over tokens to write of log p(x_l | its document before it)

Legend: B rows, L tokens, P places that predict, D features.
"""

from typing import Any

import torch
from torch import Tensor

from algorithm import Likelihood
from decoding.rollout import LocalRollouts
from decoding.rollout_record import RolloutSettings
from models.causal import decoding_copy
from objectives.block_layout import block_layout
from objectives.likelihood import masked_cross_entropy, row_sums
from pretrained import PretrainedAlgorithm

_LOGIT_ROWS = 2048  # rows of fp32 logits alive at a time where no gradient is wanted


class CausalAlgorithm(PretrainedAlgorithm):
    """A pretrained causal model with the exact likelihood of what its rows say is to be written."""

    @property
    def is_exact(self) -> bool:
        """Nothing is drawn."""
        return True

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict:
        """Find what is predicted on the host; a device would have to be waited for."""
        batch = super().on_before_batch_transfer(batch, dataloader_idx)
        ids_BL, segment_BL, response_BL = (
            batch[name] for name in ("input_ids", "segment", "response")
        )
        # Text in blocks of one token is causal.
        batch["layout"] = block_layout(ids_BL, segment_BL, response_BL, 1)
        follows_BL = torch.zeros_like(ids_BL, dtype=torch.bool)
        same_BL = segment_BL[:, 1:] == segment_BL[:, :-1]
        follows_BL[:, :-1] = (response_BL[:, 1:] == 1) & same_BL & (segment_BL[:, 1:] >= 0)
        batch["place"] = follows_BL.flatten().nonzero()[:, 0]
        return batch

    def predicting(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Hidden states [P, D] of the places whose next token is one to write, and the places [P]
        of the flattened [B, L]."""
        if "layout" not in batch:
            batch = self.on_before_batch_transfer(batch, 0)
        ids_BL, layout, place_P = batch["input_ids"], batch["layout"], batch["place"]
        length = ids_BL.shape[1]
        attention = self.backbone.attention(layout.start_BN, layout.stop_BN, length, 1)
        hidden_BLD, _ = self.backbone.read(ids_BL, layout.position_BL, attention)
        assert hidden_BLD is not None, "all of the last layer was asked for"
        return hidden_BLD.flatten(0, 1)[place_P], place_P

    def token_nll(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """-log p [P] of every token that is predicted, in fp32, and the places [P] of the
        flattened [B, L] that predict them."""
        hidden_PD, place_P = self.predicting(batch)
        targets = batch["input_ids"].flatten()[place_P + 1].split(_LOGIT_ROWS)
        parts = zip(hidden_PD.split(_LOGIT_ROWS), targets, strict=True)
        nll = [
            masked_cross_entropy(self.backbone.logits(part), target, self.special.mask)
            for part, target in parts
        ]
        return torch.cat(nll), place_P

    def rollouts(self, settings: RolloutSettings) -> LocalRollouts:
        """What samples thoughts and suffixes, or suffixes alone, from the weights of now."""
        model = decoding_copy(self.backbone.model.eval())
        return LocalRollouts(model, settings, self.backbone.forbidden_V)

    def evaluate(self, batch: dict[str, Any], draw: int) -> Likelihood:
        """-log p of the answers of every row, exact (the first token of a text without a prompt
        has nothing before it and is not counted)."""
        nll_P, place_P = self.token_nll(batch)
        row_P, rows = place_P // batch["input_ids"].shape[1], len(batch["index"])
        count_B = row_sums(torch.ones_like(nll_P), row_P, rows)
        return Likelihood(row_sums(nll_P, row_P, rows), count_B)
