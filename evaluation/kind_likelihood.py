"""Likelihood of rows with thoughts: as they are, without their thoughts, and by kind of token.

    loss = sum over rows of nats / sum over rows of tokens          token-weighted, as reported
    batch mean = mean over groups of G rows of each group's loss    as published numbers were made

Legend: R rows, C counts. Likelihoods are in nats.
"""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evaluation.statistics import Estimate, ratio_with_standard_error

Array = NDArray[np.float64]

# What is counted of every row: in its own format, raw, and by kind of the predicted token.
PARTS = ("selected", "raw", "text", "thought", "delimiter", "after_thought")
_KINDS = PARTS[2:]


class RowLikelihoods(NamedTuple):
    """Place in the dataset [R], and of each of `PARTS` the nats and tokens of every row [R, C]."""

    index_R: NDArray[np.int64]
    nll_RC: Array
    tokens_RC: Array

    def part(self, name: str) -> tuple[Array, Array]:
        """Nats [R] and tokens [R] of one part."""
        column = PARTS.index(name)
        return self.nll_RC[:, column], self.tokens_RC[:, column]


def from_table(table_RC: Array) -> RowLikelihoods:
    """Rows of several processes, in any order: [R, 1 + 2 C], the index, all nats, all tokens."""
    assert table_RC.shape[1] == 1 + 2 * len(PARTS)
    table_RC = table_RC[table_RC[:, 0].argsort(kind="stable")]
    nll_RC, tokens_RC = np.split(table_RC[:, 1:], 2, axis=1)
    return RowLikelihoods(table_RC[:, 0].astype(np.int64), nll_RC, tokens_RC)


def losses(rows: RowLikelihoods, group: int) -> dict[str, float]:
    """The losses of a validation.

    `loss_selected` is that of the rows in their own format, `loss_raw` that of the same rows
    without thoughts; with `_batch_mean` the mean over groups of `group` rows, in the order of the
    dataset, whatever the number of processes. `nll_KIND` is per token of that kind, and absent
    where the rows have none.
    """
    found: dict[str, float] = {}
    for name in ("raw", "selected"):
        found[f"loss_{name}"] = ratio_with_standard_error(*rows.part(name)).value
        found[f"loss_{name}_batch_mean"] = batch_mean(*rows.part(name), group)
    return found | {f"nll_{name}": one.value for name, one in by_kind(rows).items()}


def by_kind(rows: RowLikelihoods) -> dict[str, Estimate]:
    """Nats per token of every kind that the rows have, with the standard error over rows."""
    return {
        name: ratio_with_standard_error(*rows.part(name))
        for name in _KINDS
        if rows.part(name)[1].sum() > 0
    }


def batch_mean(nll_R: Array, tokens_R: Array, group: int) -> float:
    """Mean over groups of `group` rows of sum(nats) / sum(tokens); the last may be smaller.

    A group without a token to predict has no loss and is left out.
    """
    starts = np.arange(0, len(nll_R), group)
    nll_G = np.add.reduceat(nll_R, starts)
    tokens_G = np.add.reduceat(tokens_R, starts)
    counted_G = tokens_G > 0
    return float((nll_G[counted_G] / tokens_G[counted_G]).mean())


def plain_row(rows: RowLikelihoods, row: int) -> Mapping[str, float | int]:
    """One row for a file: its index, and nats and tokens of every part."""
    nats = {f"nll_{name}": float(x) for name, x in zip(PARTS, rows.nll_RC[row], strict=True)}
    tokens = {f"tokens_{name}": int(x) for name, x in zip(PARTS, rows.tokens_RC[row], strict=True)}
    return {"index": int(rows.index_R[row]), **nats, **tokens}
