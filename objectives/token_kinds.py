"""Text, thoughts and the delimiters between them: what the kind of a token decides.

A row with thoughts says of every token what it is: text of the document, a thought, or one of the
two delimiters around a thought. Anything else (fill, padding) counts as text; what is not scored is
said elsewhere, by `segment` and `response`.

Legend: B rows, L tokens, K kinds.
"""

import torch
from jaxtyping import Bool, Int
from torch import Tensor

TEXT, THOUGHT, DELIMITER = 0, 1, 2
KINDS = ("text", "thought", "delimiter")  # names, in the order of the numbers
_NO_DOCUMENT = -1  # `segment` and `response` of padding


def behind_thoughts(
    kind_BL: Int[Tensor, "B L"], segment_BL: Int[Tensor, "B L"], reach: int
) -> Bool[Tensor, "B L"]:
    """The first `reach` tokens of text behind every closing delimiter, in the same document.

    Delimiters of a document open and close in turn, so behind an even number of them there is text.
    """
    place_L = torch.arange(kind_BL.shape[1], device=kind_BL.device)
    begins_BL = torch.ones_like(kind_BL, dtype=torch.bool)
    begins_BL[:, 1:] = segment_BL[:, 1:] != segment_BL[:, :-1]
    first_BL = torch.where(begins_BL, place_L, 0).cummax(1).values
    is_delimiter_BL = kind_BL == DELIMITER
    last_BL = torch.where(is_delimiter_BL, place_L, -1).cummax(1).values
    count_BL = is_delimiter_BL.cumsum(1)
    earlier_BL = (count_BL - is_delimiter_BL.long()).gather(1, first_BL)  # in other documents
    is_text_BL = (kind_BL != THOUGHT) & ~is_delimiter_BL & (segment_BL >= 0)
    is_near_BL = (last_BL >= first_BL) & (place_L - last_BL <= reach)
    is_outside_BL = (count_BL - earlier_BL) % 2 == 0
    return is_text_BL & is_near_BL & is_outside_BL


def without_thoughts(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The raw rows: those of `batch` with thoughts and delimiters taken out.

    What is left moves together, so that positions are those of the text alone; the room behind it
    becomes padding.

    Args:
        batch: `input_ids`, `segment`, `response` and `kind` [B, L]; `index` [B].

    Returns:
        `input_ids`, `segment`, `response` [B, L] and `index` [B].
    """
    kind_BL = batch["kind"]
    dropped_BL = (kind_BL == THOUGHT) | (kind_BL == DELIMITER)
    # A stable sort keeps the order of what is left.
    order_BL = dropped_BL.int().argsort(dim=1, stable=True)
    is_padding_BL = dropped_BL.gather(1, order_BL)
    raw = {name: batch[name].gather(1, order_BL) for name in ("input_ids", "segment", "response")}
    for name in ("segment", "response"):
        raw[name] = raw[name].masked_fill(is_padding_BL, _NO_DOCUMENT)
    return raw | {"index": batch["index"]}
