"""Where a draft is trained: anchors inside the answers, and the blocks that begin at them.

An anchor is a token that the target has already committed to; the draft is asked for the K tokens
after it. Anchors are drawn anew at every step (arXiv 2602.06036, section 3), so that over a run
every place of an answer begins a block.

Legend: B rows, L tokens, N anchors per row, K predicted tokens of a block, M blocks of all rows, U
places at which the target predicts some label.
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Blocks(NamedTuple):
    """The blocks of a batch of rows.

    Attributes:
        anchor_BN: place of the anchor, growing along a row; 0 where there is no block.
        block_BN: whether there is a block.
        label_BNK: the k-th token after the anchor; 0 where it is not predicted.
        valid_BNK: whether it is predicted: the answer goes on so far, in the same document.
        teacher_BNK: the place at which the target predicts that token, anchor + k - 1.
    """

    anchor_BN: Tensor
    block_BN: Tensor
    label_BNK: Tensor
    valid_BNK: Tensor
    teacher_BNK: Tensor


def eligible_anchors(
    response_BL: Bool[Tensor, "B L"], segment_BL: Int[Tensor, "B L"]
) -> Bool[Tensor, "B L"]:
    """Tokens of an answer that are followed by another token of the same answer.

    The first of them is the token that the target gives after reading the prompt: the anchor of
    the first block when decoding.
    """
    followed_BL = torch.zeros_like(response_BL)
    followed_BL[:, :-1] = response_BL[:, 1:] & (segment_BL[:, 1:] == segment_BL[:, :-1])
    return response_BL & followed_BL


def deal_anchors(
    eligible_BL: Bool[Tensor, "B L"],
    segment_BL: Int[Tensor, "B L"],
    uniform_BL: Float[Tensor, "B L"],
    count: int,
    per_document: int,
) -> tuple[Int[Tensor, "B N"], Bool[Tensor, "B N"]]:
    """N = `count` anchors per row, without replacement, dealt to its documents in turn.

    Each document's places are shuffled; then every document gives its first, then every document
    its second, and so on, up to `per_document`. A quota per row alone would leave short documents
    that share a row with a long one with few anchors.

    Args:
        eligible_BL, segment_BL: from `eligible_anchors`; the document of every place, -1 for none.
        uniform_BL: numbers in [0, 1) that decide.
        count: N.
        per_document: most anchors of one document.

    Returns:
        places in growing order, and which of them there are (the others are 0, and stand last).
    """
    length = eligible_BL.shape[1]
    rank_BL = _rank_in_document(eligible_BL, segment_BL, uniform_BL)
    usable_BL = eligible_BL & (rank_BL < per_document)
    turn_BL = torch.where(usable_BL, rank_BL + uniform_BL.double(), torch.inf)
    chosen_BN = turn_BL.argsort(dim=-1, stable=True)[:, :count]
    exists_BN = usable_BL.gather(-1, chosen_BN)
    place_BN = torch.where(exists_BN, chosen_BN, length).sort(-1).values
    exists_BN = place_BN < length
    return place_BN * exists_BN, exists_BN


def _rank_in_document(eligible_BL: Tensor, segment_BL: Tensor, uniform_BL: Tensor) -> Tensor:
    """[B, L] how many eligible places of the same document have a smaller number."""
    # One sort puts documents one behind the other, each in the order of its numbers.
    key_BL = torch.where(eligible_BL, segment_BL + uniform_BL.double(), torch.inf)
    order_BL = key_BL.argsort(dim=-1, stable=True)
    document_BL = segment_BL.gather(-1, order_BL)
    place_BL = torch.arange(key_BL.shape[1]).expand_as(order_BL)
    begins_BL = torch.ones_like(eligible_BL)
    begins_BL[:, 1:] = document_BL[:, 1:] != document_BL[:, :-1]
    first_BL = (place_BL * begins_BL).cummax(-1).values
    return torch.empty_like(order_BL).scatter_(-1, order_BL, place_BL - first_BL)


def blocks_at(
    anchor_BN: Int[Tensor, "B N"],
    block_BN: Bool[Tensor, "B N"],
    ids_BL: Int[Tensor, "B L"],
    response_BL: Bool[Tensor, "B L"],
    segment_BL: Int[Tensor, "B L"],
    predicted: int,
) -> Blocks:
    """Labels of the K = `predicted` tokens after every anchor."""
    rows, anchors = anchor_BN.shape
    offset_K = torch.arange(1, predicted + 1)
    place_BNK = anchor_BN[..., None] + offset_K
    inside_BNK = place_BNK < ids_BL.shape[1]
    place_BNK = place_BNK.clamp(max=ids_BL.shape[1] - 1)

    def at(values_BL: Tensor, places_BNK: Tensor) -> Tensor:
        return values_BL.gather(-1, places_BNK.flatten(1)).view(rows, anchors, -1)

    own_BNK = at(segment_BL, place_BNK) == at(segment_BL, anchor_BN[..., None])
    valid_BNK = block_BN[..., None] & inside_BNK & own_BNK & at(response_BL, place_BNK)
    # A block ends at the first token that is not predicted.
    valid_BNK = valid_BNK.cumprod(-1).bool()
    label_BNK = at(ids_BL, place_BNK) * valid_BNK
    teacher_BNK = torch.where(valid_BNK, anchor_BN[..., None] + offset_K - 1, 0)
    return Blocks(anchor_BN, block_BN, label_BNK, valid_BNK, teacher_BNK)


def places_in_document(segment_BL: Int[Tensor, "B L"]) -> Int[Tensor, "B L"]:
    """The place of every token inside its document: where its absolute position counts from."""
    place_BL = torch.arange(segment_BL.shape[1], device=segment_BL.device).expand_as(segment_BL)
    begins_BL = torch.ones_like(segment_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segment_BL[:, 1:] != segment_BL[:, :-1]
    return place_BL - (place_BL * begins_BL).cummax(-1).values


def draw_blocks(
    ids_BL: Int[Tensor, "B L"],
    response_BL: Bool[Tensor, "B L"],
    segment_BL: Int[Tensor, "B L"],
    uniform_BL: Float[Tensor, "B L"],
    count: int,
    per_document: int,
    predicted: int,
    bucket: int | None = None,
) -> dict[str, Any]:
    """The blocks of a batch, and the places at which the target is asked about them.

    Args:
        ids_BL, response_BL, segment_BL: tokens, which of them belong to an answer, documents.
        uniform_BL: numbers in [0, 1) that decide.
        count, per_document: most anchors of a row, and of a document.
        predicted: K.
        bucket: round the number of anchors per row up to a multiple of this, instead of `count`.

    Returns:
        `anchors` [B, N] and which of them exist, `exists`; `places` [B, L] in the documents; `kept`
        [M], the blocks' places in the flattened [B * N], with their `row` [M], `labels` [M, K] and
        `valid` [M, K], of which there are `slots`; `asked` [U] places in the flattened [B * L], and
        `teacher` [M, K], which of these predicts the label.
    """
    length = segment_BL.shape[1]
    eligible_BL = eligible_anchors(response_BL, segment_BL)
    anchor_BN, block_BN = deal_anchors(eligible_BL, segment_BL, uniform_BL, count, per_document)
    if bucket is not None:
        used = max(-(-int(block_BN.sum(-1).max()) // bucket) * bucket, 1)
        anchor_BN, block_BN = anchor_BN[:, :used], block_BN[:, :used]
    blocks = blocks_at(anchor_BN, block_BN, ids_BL, response_BL, segment_BL, predicted)
    kept_M = block_BN.flatten().nonzero()[:, 0]
    row_M = kept_M // block_BN.shape[1]
    valid_MK = blocks.valid_BNK.flatten(0, 1)[kept_M]
    place_MK = blocks.teacher_BNK.flatten(0, 1)[kept_M] + row_M[:, None] * length
    asked_U, teacher_MK = place_MK.unique(return_inverse=True)
    return {
        "anchors": anchor_BN,
        "exists": block_BN,
        "places": places_in_document(segment_BL),
        "kept": kept_M,
        "row": row_M,
        "labels": blocks.label_BNK.flatten(0, 1)[kept_M],
        "valid": valid_MK,
        "slots": int(valid_MK.sum()),
        "asked": asked_U,
        "teacher": teacher_MK,
    }
