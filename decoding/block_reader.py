"""A batch of rows whose clean text has been read, and to which blocks can be shown.

The clean pass is made once; every further pass costs the blocks alone. Used by training, by the
scorer and by exact likelihoods; decoding has a cache that grows (`decoding.block_cache`).

Legend: B rows, L tokens, N blocks of a row, M blocks that are written, X = B M, W copies of a block
(candidates, or inputs of the chain rule), S block size, D features.
"""

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.backbone import Backbone
from objectives.block_layout import BlockLayout


@dataclass(frozen=True)
class BlockReader:
    """Shows blocks to a backbone behind the text that it has read.

    Attributes:
        backbone: the model.
        layout: where the blocks lie.
        context: keys and values of every layer.
        clean_BLD: hidden states of the clean text; None if only keys and values were wanted.
    """

    backbone: Backbone
    layout: BlockLayout
    context: dict[int, tuple[Tensor, Tensor]]
    clean_BLD: Tensor | None

    @classmethod
    def over_rows(
        cls,
        backbone: Backbone,
        ids_BL: Int[Tensor, "B L"],
        layout: BlockLayout,
        block_size: int,
        only_keys: bool = True,
    ) -> "BlockReader":
        """Read the rows."""
        attention = backbone.attention(layout.start_BN, layout.stop_BN, ids_BL.shape[1], block_size)
        clean_BLD, context = backbone.read(ids_BL, layout.position_BL, attention, only_keys)
        return cls(backbone, layout, context, clean_BLD)

    def detached(self) -> "BlockReader":
        """The same text, through which no gradient flows."""
        context = {layer: (k.detach(), v.detach()) for layer, (k, v) in self.context.items()}
        return replace(self, context=context)

    def run(self, inputs_YSD: Float[Tensor, "Y S D"], copies: int = 1) -> Float[Tensor, "Y S D"]:
        """Hidden states of blocks, Y = B M W: the W copies of a block side by side."""
        layout, size = self.layout, inputs_YSD.shape[1]
        batch, length = layout.position_BL.shape
        start_BM, stop_BM = (
            bound_BN.gather(1, layout.block_BM).masked_fill(~layout.exists_BM, 0)
            for bound_BN in (layout.start_BN, layout.stop_BN)
        )
        place_BMS = layout.block_BM[..., None] * size + torch.arange(size, device=start_BM.device)
        position_BMS = layout.position_BL.gather(1, place_BMS.flatten(1)).view(place_BMS.shape)
        start_BY, stop_BY, position_BYS = (
            part.repeat_interleave(copies, dim=1) for part in (start_BM, stop_BM, position_BMS)
        )
        attention = self.backbone.attention(start_BY, stop_BY, length, size)
        inputs_BYSD = inputs_YSD.unflatten(0, (batch, -1))
        hidden_BYSD = self.backbone.read_blocks(inputs_BYSD, position_BYS, attention, self.context)
        return hidden_BYSD.flatten(0, 1)

    @property
    def table_VD(self) -> Tensor:
        """The embeddings."""
        return self.backbone.table_VD

    @property
    def blank_id(self) -> int:
        """The token that stands for "not known yet"."""
        return self.backbone.blank_id

    @property
    def forbidden_V(self) -> Tensor:
        """Tokens that are never written."""
        return self.backbone.forbidden_V

    def logits(self, hidden_PD: Tensor) -> Tensor:
        """[*P, V] what the head makes of hidden states."""
        return self.backbone.logits(hidden_PD)
