"""Which blocks of packed documents a model has to write, and what each of them may look at.

Rows hold whole documents, each beginning at a multiple of the block size (`data.align`), so a row
is N = L / S blocks and no block belongs to two documents. Block n of a document is predicted from
the clean tokens of its own document before it, an interval of places, and from itself:

    visible(n) = [start of the document, start of block n)  and  block n, both ways.

The same interval serves the noisy half of training, every candidate of a block, and decoding.
Blocks without a place to write are left out: of a prompt only clean tokens are needed.

Legend: B rows, L tokens, S block size, N blocks of a row, M blocks that are written (padded), D
features.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

FILL = -1  # `response` of a place behind the end of a document, `segment` of padding


class BlockLayout(NamedTuple):
    """Blocks of a batch.

    Attributes:
        position_BL: place of every token inside its document.
        start_BN: first place of the document of block n, the begin of what it sees.
        stop_BN: first place of block n, the end of it.
        block_BM: numbers of the blocks that are written; padded with 0.
        exists_BM: false where padded.
        predict_BMS: places that a decoder has to find: those of the answer, and behind its end up
            to the end of the block.
        scored_BMS: of these the places of the answer itself, which likelihoods count.
        target_BMS: the tokens there, also at places that are given.
    """

    position_BL: Tensor
    start_BN: Tensor
    stop_BN: Tensor
    block_BM: Tensor
    exists_BM: Tensor
    predict_BMS: Tensor
    scored_BMS: Tensor
    target_BMS: Tensor

    def of_blocks(self, values_BL: Tensor) -> Tensor:
        """[B, M, S, ...] of something that every token has."""
        return _taken(values_BL, self.block_BM, self.target_BMS.shape[-1])

    @property
    def written_BN(self) -> Tensor:
        """Which blocks of the rows are written."""
        # Padded entries name block 0, which must not undo that it is written itself.
        counts_BN = torch.zeros_like(self.start_BN)
        return counts_BN.scatter_add(1, self.block_BM, self.exists_BM.to(counts_BN.dtype)) > 0


def _taken(values_BL: Tensor, block_BM: Tensor, size: int) -> Tensor:
    row_B1 = torch.arange(len(block_BM), device=block_BM.device)[:, None]
    return values_BL.unflatten(1, (-1, size))[row_B1, block_BM]


def block_layout(
    ids_BL: Int[Tensor, "B L"],
    segment_BL: Int[Tensor, "B L"],
    response_BL: Int[Tensor, "B L"],
    block_size: int,
    bucket: int = 1,
    chosen_BN: Bool[Tensor, "B N"] | None = None,
) -> BlockLayout:
    """Find the blocks that are written.

    Args:
        ids_BL: tokens.
        segment_BL: number of the document of every token, -1 on padding.
        response_BL: 1 on text to write, 0 on prompts, -1 behind the end of a document.
        block_size: S, which divides L.
        bucket: M is rounded up to a multiple of this, so that compiled code sees few shapes.
        chosen_BN: if given, only these blocks are kept.

    Raises:
        ValueError: rows that do not consist of blocks, or a document that begins or ends inside of
            one.
    """
    length = ids_BL.shape[1]
    if length % block_size:
        raise ValueError(f"block_size={block_size}: allowed are divisors of model.length={length}")
    place_L = torch.arange(length, device=ids_BL.device)
    begins_BL = torch.ones_like(segment_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segment_BL[:, 1:] != segment_BL[:, :-1]
    if bool((begins_BL & (place_L % block_size != 0)).any()):
        raise ValueError(
            f"block_size={block_size}: a document begins or ends inside of a block; allowed:"
            f" data.align={block_size} (data.join=true)"
        )
    begins_BL &= segment_BL != FILL
    first_BL = (place_L * begins_BL).cummax(dim=1).values
    stop_N = place_L[::block_size]
    start_BN = first_BL[:, ::block_size]

    real_BL = segment_BL != FILL
    scored_BL, predict_BL = real_BL & (response_BL == 1), real_BL & (response_BL != 0)
    written_BN = scored_BL.unflatten(1, (-1, block_size)).any(-1)
    if chosen_BN is not None:
        written_BN = written_BN & chosen_BN
    most = int(written_BN.sum(-1).max()) if len(ids_BL) else 0
    most = max(bucket, most + -most % bucket)
    most = min(most, written_BN.shape[1])
    # A stable sort lists the written ones first, in order.
    block_BM = written_BN.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    exists_BM = written_BN.gather(1, block_BM)
    block_BM = block_BM.masked_fill(~exists_BM, 0)

    return BlockLayout(
        place_L - first_BL,
        start_BN,
        stop_N.expand_as(start_BN),
        block_BM,
        exists_BM,
        _taken(predict_BL, block_BM, block_size) & exists_BM[..., None],
        _taken(scored_BL, block_BM, block_size) & exists_BM[..., None],
        _taken(ids_BL, block_BM, block_size),
    )


def document_of(
    prompt: Sequence[int],
    continuation: Sequence[int],
    block_size: int,
    longest: int,
    vocabulary: int,
    eos: int,
) -> tuple[list[int], list[int]]:
    """A text and what is written of it as one document of whole blocks, as training has it.

    Args:
        prompt: what is given; without any the text begins as behind the end of another one.
        continuation: what is written.
        block_size: S; behind the end the last block is filled with `eos`.
        longest: most tokens; of what is longer the end is kept.
        vocabulary: number of ids.
        eos: the end token.

    Returns:
        Tokens, and for every one 1 where it is written, 0 where it is given, -1 behind the end.

    Raises:
        ValueError: a continuation without tokens or too long; unknown ids.
    """
    longest = longest // block_size * block_size
    if not 1 <= len(continuation) <= longest:
        raise ValueError(f"a continuation of {len(continuation)} tokens; allowed 1 .. {longest}")
    tokens = [*(prompt or [eos]), *continuation][-longest:]
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise ValueError(f"token ids outside 0 .. {vocabulary - 1}")
    given, fill = len(tokens) - len(continuation), -len(tokens) % block_size
    response = [*[0] * given, *[1] * len(continuation), *[FILL] * fill]
    return [*tokens, *[eos] * fill], response


def rows_of(
    documents: Sequence[tuple[Sequence[int], Sequence[int]]], padding: int
) -> dict[str, Int[Tensor, "B L"]]:
    """Columns input_ids, segment and response of rows with one document each, padded."""
    shape = len(documents), max(len(tokens) for tokens, _ in documents)
    ids_BL = torch.full(shape, padding)
    response_BL, segment_BL = torch.full(shape, FILL), torch.full(shape, FILL)
    for row, (tokens, response) in enumerate(documents):
        ids_BL[row, : len(tokens)] = torch.tensor(tokens)
        response_BL[row, : len(tokens)] = torch.tensor(response)
        segment_BL[row, : len(tokens)] = 0
    return {"input_ids": ids_BL, "segment": segment_BL, "response": response_BL}
