"""What a block looks like to the next pass: hard tokens, BLANKs, or something in between.

Chosen by `refine/soft_inputs`. With c the most probable token of a place, a its probability and E
the table of embeddings:

    none               E(c) where committed, else E(BLANK)
    uncommitted_soft   E(c) where committed, else a E(c) + (1 - a) E(BLANK)       arXiv 2606.08357
    all_soft           a E(c) + (1 - a) E(BLANK) everywhere but at given places
    topk_soft          as uncommitted_soft, with the T most probable tokens in c's place, and the
                       norm that such a mixture has on average restored             arXiv 2604.08302
    soft_mask          (1 - l) E(BLANK) + l sum_T p E, with l = scale sigmoid(steep (-H - centre))

Legend: X blocks, S places, D features, T tokens of a mixture.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from objectives.refinement import Prediction


@runtime_checkable
class SoftInputs(Protocol):
    """Makes the input of the next pass."""

    @property
    def top(self) -> int:
        """T, how many of a place's most probable tokens it wants to know."""
        ...

    def __call__(
        self,
        prediction: Prediction,
        token_XS: Int[Tensor, "X S"],
        committed_XS: Bool[Tensor, "X S"],
        given_XS: Bool[Tensor, "X S"],
        table_VD: Float[Tensor, "V D"],
        blank_id: int,
    ) -> Float[Tensor, "X S D"]:
        """Embeddings; `token_XS` are the tokens in place, those of committed and given places too.

        Where a token is not the pass's own choice (given, or kept from an earlier pass) only
        committed places may hold it.
        """
        ...


def _check_top(top: int) -> None:
    if top < 1:
        raise ValueError(f"refine.soft_inputs.top={top}: allowed an integer >= 1")


@dataclass(frozen=True)
class Hard:
    """`none`: nothing between a token and a BLANK."""

    top = 0

    def __call__(
        self,
        prediction: Prediction,
        token_XS: Int[Tensor, "X S"],
        committed_XS: Bool[Tensor, "X S"],
        given_XS: Bool[Tensor, "X S"],
        table_VD: Float[Tensor, "V D"],
        blank_id: int,
    ) -> Float[Tensor, "X S D"]:
        """One row of the table for every place."""
        return table_VD[token_XS.masked_fill(~committed_XS, blank_id)]


@dataclass(frozen=True)
class UncommittedSoft:
    """`uncommitted_soft`, or with `everywhere` `all_soft`."""

    everywhere: bool = False
    top = 0

    def __call__(
        self,
        prediction: Prediction,
        token_XS: Int[Tensor, "X S"],
        committed_XS: Bool[Tensor, "X S"],
        given_XS: Bool[Tensor, "X S"],
        table_VD: Float[Tensor, "V D"],
        blank_id: int,
    ) -> Float[Tensor, "X S D"]:
        """A mixture of two rows of the table."""
        hard_XS = given_XS if self.everywhere else committed_XS
        weight_XS = prediction.confidence_P.to(table_VD.dtype).masked_fill(hard_XS, 1.0)
        return torch.lerp(table_VD[blank_id], table_VD[token_XS], weight_XS[..., None])


@dataclass(frozen=True)
class TopSoft:
    """`topk_soft`.

    Raises:
        ValueError: fewer than one token.
    """

    top: int = 4
    renormalise: bool = True

    def __post_init__(self) -> None:
        _check_top(self.top)

    def __call__(
        self,
        prediction: Prediction,
        token_XS: Int[Tensor, "X S"],
        committed_XS: Bool[Tensor, "X S"],
        given_XS: Bool[Tensor, "X S"],
        table_VD: Float[Tensor, "V D"],
        blank_id: int,
    ) -> Float[Tensor, "X S D"]:
        """A mixture, or the token itself where it is committed."""
        p_XST = prediction.top_probability_PT.to(table_VD.dtype)
        rest_XS1 = 1.0 - p_XST.sum(-1, keepdim=True)
        rows_XSTD, blank_D = table_VD[prediction.top_token_PT], table_VD[blank_id]
        mixed_XSD = (p_XST[..., None] * rows_XSTD).sum(-2) + rest_XS1 * blank_D
        if self.renormalise:
            expected_XS = (p_XST * rows_XSTD.norm(dim=-1)).sum(-1)
            expected_XS = expected_XS + rest_XS1[..., 0] * blank_D.norm()
            scale_XS = expected_XS / mixed_XSD.norm(dim=-1).clamp(min=1e-12)
            mixed_XSD = mixed_XSD * scale_XS[..., None]
        return torch.where(committed_XS[..., None], table_VD[token_XS], mixed_XSD)


@dataclass(frozen=True)
class SoftMask:
    """`soft_mask`: the more certain a place, the less of it is BLANK.

    Its three numbers are learned in the source; here they are settings.

    Raises:
        ValueError: fewer than one token.
    """

    top: int = 3
    scale: float | int = 1.0
    steep: float | int = 2.0
    centre: float | int = -1.0

    def __post_init__(self) -> None:
        _check_top(self.top)

    def __call__(
        self,
        prediction: Prediction,
        token_XS: Int[Tensor, "X S"],
        committed_XS: Bool[Tensor, "X S"],
        given_XS: Bool[Tensor, "X S"],
        table_VD: Float[Tensor, "V D"],
        blank_id: int,
    ) -> Float[Tensor, "X S D"]:
        """A mixture, or the token itself where it is committed."""
        p_XST = prediction.top_probability_PT.to(table_VD.dtype)
        p_XST = p_XST / p_XST.sum(-1, keepdim=True)
        mean_XSD = (p_XST[..., None] * table_VD[prediction.top_token_PT]).sum(-2)
        sure_XS = self.scale * torch.sigmoid(self.steep * (-prediction.entropy_P - self.centre))
        mixed_XSD = torch.lerp(table_VD[blank_id], mean_XSD, sure_XS.to(table_VD.dtype)[..., None])
        return torch.where(committed_XS[..., None], table_VD[token_XS], mixed_XSD)
