"""From the likelihoods of rows to reported numbers, and to the truth where it is known.

Legend: R rows, K Monte-Carlo draws. All likelihoods are in nats.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.grammar_model import ProbabilisticGrammar
from evaluation.statistics import ratio_with_standard_error

Array = NDArray[np.float64]


def likelihood_metrics(nll_RK: Array, tokens_R: Array, exact: bool) -> dict[str, float]:
    """Nats per token of a data set, with two standard errors.

    `nll_se` is that of the rows: how much the number would move with other rows and other draws.
    `nll_se_draws` is that of the draws alone, on these rows: 0 where the likelihood is `exact`,
    otherwise nan for a single draw.
    """
    mean, error = ratio_with_standard_error(nll_RK.mean(1), tokens_R)
    per_draw_K = nll_RK.sum(0) / tokens_R.sum()
    draws = len(per_draw_K)
    draw_error = float(per_draw_K.std(ddof=1) / math.sqrt(draws)) if draws > 1 else math.nan
    if exact:
        draw_error = 0.0
    return {
        "nll": mean,
        "nll_se": error,
        "nll_se_draws": draw_error,
        "ppl": math.exp(mean),
        "bpd": mean / math.log(2.0),
        "rows": len(tokens_R),
        "tokens": float(tokens_R.sum()),
    }


def true_nll(texts: Sequence[str], grammar: ProbabilisticGrammar) -> Array:
    """-log p of every sentence under the grammar that produced it."""
    return -np.array([grammar.log_probability(text.split()) for text in texts])


def gap_to_truth(nll_RK: Array, tokens_R: Array, true_R: Array) -> dict[str, float]:
    """How far a likelihood is from the best possible one on the same rows.

    `gap` = sum(nll - true) / sum(tokens), the estimated KL divergence per token. Paired by row, so
    its error is much smaller than that of either likelihood. A bound cannot be below the truth: a
    gap under zero by more than two standard errors is a bug.
    """
    gap, error = ratio_with_standard_error(nll_RK.mean(1) - true_R, tokens_R)
    true, _ = ratio_with_standard_error(true_R, tokens_R)
    return {"true_nll": true, "gap": gap, "gap_se": error}


def write_likelihoods(path: Path, index_R: Array, nll_RK: Array, tokens_R: Array) -> None:
    """One JSON line per row: dataset index, nats of every draw, number of tokens."""
    with path.open("w", encoding="utf-8") as file:
        for index, draws, tokens in zip(index_R, nll_RK, tokens_R, strict=True):
            row = {"index": int(index), "nll": [float(d) for d in draws], "tokens": int(tokens)}
            file.write(json.dumps(row) + "\n")
