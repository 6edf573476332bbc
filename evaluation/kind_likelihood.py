"""Likelihood of rows with thoughts: as they are, without their thoughts, and by kind of token.

    loss = sum over rows of nats / sum over rows of tokens          token-weighted, as reported
    batch mean = mean over groups of G rows of each group's loss    as published numbers were made

Legend: R rows, N documents, C counts. Likelihoods are in nats.
"""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from evaluation.comparison import is_number
from evaluation.statistics import Estimate, ratio_with_standard_error

Array = NDArray[np.float64]

# What is counted of every row: in its own format, raw, and by kind of the predicted token.
PARTS = ("selected", "raw", "text", "thought", "delimiter", "after_thought")
_KINDS = PARTS[2:]
DOCUMENT = "document"


class RowLikelihoods(NamedTuple):
    """Place in the dataset [R], and of each of `PARTS` the nats and tokens of every row [R, C].

    `document_R` are the numbers of the documents that the rows are of; None where that is not
    known, or rows have several. Two forms of one text stand at unlike places, as longer rows come
    first, but have one number.
    """

    index_R: NDArray[np.int64]
    nll_RC: Array
    tokens_RC: Array
    document_R: NDArray[np.int64] | None = None

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
    """One row for a file: its index, its document if known, nats and tokens of every part."""
    nats = {f"nll_{name}": float(x) for name, x in zip(PARTS, rows.nll_RC[row], strict=True)}
    tokens = {f"tokens_{name}": int(x) for name, x in zip(PARTS, rows.tokens_RC[row], strict=True)}
    document = {} if rows.document_R is None else {DOCUMENT: int(rows.document_R[row])}
    return {"index": int(rows.index_R[row]), **document, **nats, **tokens}


def read_plain_rows(lines: Iterable[tuple[str, Mapping[str, Any]]]) -> RowLikelihoods:
    """Rows as `plain_row` writes them, in the order of their index; each after its place.

    Raises:
        DataError: a row that lacks a number, or an index that is there twice, by its place.
    """
    names = ["index", *(f"{of}_{name}" for of in ("nll", "tokens") for name in PARTS)]
    table: dict[int, list[float]] = {}
    documents: dict[int, int] = {}
    for place, row in lines:
        for name in [*names, *({DOCUMENT} & row.keys())]:
            if not is_number(row.get(name)):
                raise DataError(f"{place}: {name}={row.get(name)!r:.40}; allowed: a number")
        index = row["index"]
        if index in table:
            raise DataError(f"{place}: a second row of index={index}; allowed: one each")
        table[index] = [float(row[name]) for name in names]
        if DOCUMENT in row:
            documents[index] = row[DOCUMENT]
    rows = from_table(np.array(list(table.values())).reshape(-1, len(names)))
    return with_documents(rows, documents)


def with_documents(rows: RowLikelihoods, documents: Mapping[int, int]) -> RowLikelihoods:
    """The rows with the numbers of their documents, given by index; as they are if one lacks it."""
    found = [documents.get(int(index)) for index in rows.index_R]
    known = [number for number in found if number is not None]
    if not found or len(known) < len(found):
        return rows
    return rows._replace(document_R=np.array(known, np.int64))


def by_document(rows: RowLikelihoods) -> RowLikelihoods:
    """Sums over the rows of every document, whose numbers take the place of the index."""
    assert rows.document_R is not None
    number_N, place_R = np.unique(rows.document_R, return_inverse=True)
    shape = len(number_N), len(PARTS)
    nll_NC, tokens_NC = np.zeros(shape), np.zeros(shape)
    np.add.at(nll_NC, place_R, rows.nll_RC)
    np.add.at(tokens_NC, place_R, rows.tokens_RC)
    return RowLikelihoods(number_N, nll_NC, tokens_NC, number_N)
