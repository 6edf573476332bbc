"""Rows put together from parts that are tokenized by themselves: a prefix and its suffix, a text
and the thoughts in it.

A part that is tokenized by itself has the same tokens whatever stands beside it. So a prefix reads
in training as it does when a model is asked to go on with it, and every token belongs to one part.

Legend: N tokens of all rows, one row after the other.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data.blocks import FEATURE_DTYPE, IDS, RESPONSE, PackingReport, TokenBatch
from data.tokenization import SpecialIds, added_ids, text_backend

KIND = "kind"  # the feature column that says which part of a text with thoughts a token is of
TEXT, THOUGHT, DELIMITER = 0, 1, 2


@dataclass(frozen=True)
class Part:
    """Tokens that belong together.

    Attributes:
        ids: the tokens.
        response: 1 if the model is to write them, 0 if they are given.
        kind: `TEXT`, `THOUGHT` or `DELIMITER`.
    """

    ids: Sequence[int]
    response: int
    kind: int = TEXT


class PartTokenizer:
    """Turns texts into tokens without adding any; special tokens and delimiters written out in them
    are text (`data.tokenization.text_backend`).

    Args:
        tokenizer: of the model.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._backend: Tokenizer = text_backend(tokenizer)
        self._unknown = tokenizer.unk_token_id
        self._added = added_ids(tokenizer) - {self._unknown}

    def __call__(self, texts: Iterable[str], report: PackingReport) -> list[list[int]]:
        """The tokens of every text; unknown ones and added ones among them are counted."""
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        found = [encoding.ids for encoding in encodings]
        if self._unknown is not None:
            report.unknown_tokens += sum(ids.count(self._unknown) for ids in found)
        touched = (ids for ids in found if not self._added.isdisjoint(ids))
        report.added_tokens_in_text += sum(token in self._added for ids in touched for token in ids)
        return found


def token_batch(
    rows: Sequence[Sequence[Part]],
    special: SpecialIds,
    report: PackingReport,
    origins: Sequence[int],
    with_kind: bool = False,
) -> TokenBatch:
    """Columns [N] `input_ids` and `response`, and `kind` if asked for, of at least one row.

    `origins` are the numbers of the texts that the rows are from. Rows with the mask token in them
    are counted: nothing is hidden in what is continued, so it stands for itself.
    """
    flat = [part for row in rows for part in row]
    sizes = [len(part.ids) for part in flat]
    columns = {
        IDS: np.concatenate([np.asarray(part.ids, np.uint32) for part in flat]),
        RESPONSE: np.repeat(np.array([part.response for part in flat], FEATURE_DTYPE), sizes),
    }
    if with_kind:
        columns[KIND] = np.repeat(np.array([part.kind for part in flat], FEATURE_DTYPE), sizes)
    lengths = np.array([sum(len(part.ids) for part in row) for row in rows])
    report.documents_with_mask += sum(any(special.mask in part.ids for part in row) for row in rows)
    return TokenBatch(columns, lengths, np.array(origins, np.int32))
