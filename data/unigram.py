"""The floor that any model must beat: the training unigram distribution on held-out rows."""

import numpy as np

from data.arrow import Rows
from data.blocks import IDS, LENGTH


def unigram_cross_entropy(
    train: Rows,
    held_out: Rows,
    vocab_size: int,
    *,
    score_padding: bool = False,
    ignore_bos: bool = False,
    max_train_rows: int | None = 100_000,
) -> float:
    """Cross-entropy of the training unigrams on `held_out`, in nats per scored token.

        H = - sum_v (m_v / M) ln((n_v + 1) / (N + V)),

    with n_v, m_v the counts of token v among the scored tokens of the two sets, N, M their sums,
    and V the vocabulary size (add-one smoothing). Its exponential is a perplexity.

    Args:
        score_padding: padding counts as scored.
        ignore_bos: the first position does not.
        max_train_rows: count only the first rows of a large training set; None counts all.
    """
    counts_V = token_counts(train, vocab_size, score_padding, ignore_bos, max_train_rows)
    held_out_V = token_counts(held_out, vocab_size, score_padding, ignore_bos)
    log_prob_V = np.log((counts_V + 1) / (counts_V.sum() + vocab_size))
    return float(-(held_out_V * log_prob_V).sum() / held_out_V.sum())


def token_counts(
    rows: Rows,
    vocab_size: int,
    score_padding: bool = False,
    ignore_bos: bool = False,
    max_rows: int | None = None,
) -> np.ndarray:
    """How often each token is scored [V]."""
    counts_V = np.zeros(vocab_size, dtype=np.int64)
    first = int(ignore_bos)
    for block in rows.blocks(max_rows):
        ids = block[IDS][:, first:]
        if LENGTH in block and not score_padding:
            place = np.arange(first, first + ids.shape[1])
            ids = ids[place < block[LENGTH].astype(np.int64)[:, None]]
        counts_V += np.bincount(ids.reshape(-1), minlength=vocab_size)
    return counts_V
