"""What lies between documents and rows: token columns, and the count of what became of them."""

from dataclasses import dataclass, field

import numpy as np

IDS = "input_ids"
LENGTH = "length"
# 1 on tokens the model is to write, 0 on those of a prompt, `FEATURE_FILL` on fill and padding;
# and the document of a row, which fill belongs to and padding does not.
RESPONSE, SEGMENT = "response", "segment"
# Beside the rows, for each document of a row: the number of the text that it was cut from, and
# `FEATURE_FILL` behind the last one. Parts of one text depend on each other.
ORIGIN = "origin"
FEATURE_DTYPE = np.int8
# What a token without a word carries in a feature column: special tokens, padding, white space,
# and text that no word was found in.
FEATURE_FILL = -1

_ALWAYS = ("documents", "tokens", "unknown_tokens", "rows", "dropped_tokens")

Block = dict[str, np.ndarray]


@dataclass
class PackingReport:
    """What became of the documents: everything that is not in a row is counted here.

    `unanswered_documents` are conversations whose answer has fewer than two tokens in its row; they
    are left out, and their tokens are among `dropped_tokens`. `fill_tokens` are those put behind
    documents that have to end at a multiple of `data.align`.
    `documents_with_mask` are conversations in which the mask token occurs as text.

    Documents that are cut in two (`data.prefix_suffix`, `data.thought_rows`) are left out where
    they are too short for both parts (`short_documents`), have no place to be cut at
    (`unmarked_documents`), or a beginning that leaves no room in a row (`long_documents`); what was
    tokenized of them is among `dropped_tokens`. `rejected_documents` are those that a check
    refused, by its reason. `added_tokens_in_text` are tokens of their text that the tokenizer was
    given beside its vocabulary, white space aside: words, and special tokens or delimiters that it
    knows no other tokens for (`data.tokenization.text_backend`).

    With features, tokens = tokens_of_words + tokens_without_word: each has the value of a word or
    `FEATURE_FILL`. A token that reaches into several words has the value of the one that it shares
    most characters with; a word without token is one whose characters the tokenizer dropped or
    gave to other words' tokens.
    """

    documents: int = 0
    empty_documents: int = 0
    tokens: int = 0
    unknown_tokens: int = 0
    rows: int = 0
    dropped_tokens: int = 0
    truncated_documents: int = 0
    truncated_tokens: int = 0
    unanswered_documents: int = 0
    fill_tokens: int = 0
    documents_with_mask: int = 0
    short_documents: int = 0
    unmarked_documents: int = 0
    long_documents: int = 0
    rejected_documents: dict[str, int] = field(default_factory=dict)
    added_tokens_in_text: int = 0
    tokens_of_words: int = 0
    tokens_without_word: int = 0
    tokens_of_several_words: int = 0
    words_without_token: int = 0

    def __str__(self) -> str:
        shown = {name: value for name, value in vars(self).items() if value or name in _ALWAYS}
        reasons = shown.pop("rejected_documents", {})
        shown |= {f"rejected ({reason})": count for reason, count in sorted(reasons.items())}
        return ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in shown.items())

    def reject(self, reason: str) -> None:
        """Count a document that a check refused."""
        self.rejected_documents[reason] = self.rejected_documents.get(reason, 0) + 1


@dataclass(frozen=True)
class TokenBatch:
    """Several encoded documents: columns [sum(lengths)] one document after the other.

    `origins` [number of documents] are what `ORIGIN` says of them; None: each is a text of its own.
    """

    columns: Block
    lengths: np.ndarray
    origins: np.ndarray | None = None
