"""Paired differences between arms of supervised fine-tuning, from the rows of mode=sft_eval.

    delta = (sum over rows of nats of the right arm - sum of those of the left) / sum of tokens

in nats per token, which is the difference of their losses, as both have to predict the same tokens
of every row. Rows are joined by document (all rows of one are added up), or by index where it is
not known, and drawn together (`evaluation.grouped`), once for all pairs on as many.

Legend: R rows, or documents.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from math import isclose, nan
from typing import Any, NamedTuple

import numpy as np

from data.errors import DataError
from evaluation.grouped import RESAMPLES, Groups
from evaluation.kind_likelihood import DOCUMENT, RowLikelihoods, by_document

ROWS = "rows.jsonl"


class Loss(NamedTuple):
    """A part of the rows that is compared.

    Attributes:
        column: where its loss stands in the table of arms.
        same: parts that have as many tokens in every document where two arms predict one text.
    """

    column: str
    same: tuple[str, ...]


# A full row has as many tokens with thoughts as without, so kinds tell the form.
_FORM = ("raw", "selected", "text", "thought", "delimiter")
LOSSES = {"raw": Loss("Val Loss Raw", ("raw",)), "selected": Loss("Val Loss Selected", _FORM)}
NOTES = (
    "Differences are right minus left, in nats per token, on the same validation documents (rows,"
    " where it is not known of which documents they are): below 0 the right arm predicts better. 95"
    f" %: {RESAMPLES} resamples of them, percentiles; p: twice the smaller share of resamples on"
    f" either side of zero, not below 1/{RESAMPLES}, nor below 2^(1 - m) where m of them differ;"
    " nothing is adjusted for the number of comparisons. Documents are drawn and trainings are not:"
    " other seeds may differ by more.",
    "Val Loss Raw is compared between arms that have as many tokens without thoughts in every"
    " document; Val Loss Selected only between arms of one form (as many tokens of every kind), as"
    " the losses with and without thoughts are losses of different texts.",
)

Cells = tuple[list[str], list[list[str]]]


@dataclass(frozen=True)
class LossDifference:
    """A loss of the right arm minus that of the left, on documents (or rows) of both.

    Attributes:
        right, left: names of the arms.
        loss: `val_loss_raw` or `val_loss_selected`.
        value: nats per token.
        low, high: 95 % of it, drawing documents; None for a single one.
        p: two-sided, from the same draws (`Groups.difference`); None for a single one.
        joined_by: `document` or `index`.
        drawn: how many documents, or rows.
        tokens: of all of them.
    """

    right: str
    left: str
    loss: str
    value: float
    low: float | None
    high: float | None
    p: float | None
    joined_by: str
    drawn: int
    tokens: int


class _Joined(NamedTuple):
    """Rows of two arms that may be paired, and what they are joined by."""

    right: RowLikelihoods
    left: RowLikelihoods
    by: str

    @property
    def unit(self) -> str:
        return "documents" if self.by == DOCUMENT else "rows"

    @classmethod
    def of(cls, right: RowLikelihoods, left: RowLikelihoods) -> "_Joined":
        """By document if both say of which their rows are."""
        if right.document_R is None or left.document_R is None:
            return cls(right, left, "index")
        return cls(by_document(right), by_document(left), DOCUMENT)

    def other_rows(self) -> str | None:
        """What tells the rows of the two apart; None: they are the same."""
        ours_R, theirs_R = self.right.index_R, self.left.index_R
        if np.array_equal(ours_R, theirs_R):
            return None
        shared = len(np.intersect1d(ours_R, theirs_R))
        return (
            f"not the same validation {self.unit}, {len(ours_R)} and {len(theirs_R)} of which"
            f" {shared} are of both"
        )

    def other_texts(self, loss: Loss) -> str | None:
        """How many of them are not the same text; None: none."""
        # Rows of two forms are in two orders, so that one index means two documents.
        same, hint = loss.same, ""
        if self.by != DOCUMENT and same != _FORM:
            same, hint = _FORM, f", and {ROWS} does not say of both which documents they are"
        differs_R = np.zeros(len(self.right.index_R), dtype=bool)
        for part in same:
            differs_R |= self.right.part(part)[1] != self.left.part(part)[1]
        number, what = int(differs_R.sum()), "of each kind" if same == _FORM else "without thoughts"
        if not number:
            return None
        return (
            f"{number} of {len(differs_R)} {self.unit} differ in their number of tokens"
            f" {what}{hint}"
        )


def loss_differences(
    arms: Mapping[str, RowLikelihoods | None],
) -> tuple[list[LossDifference], list[str]]:
    """All pairs that can be compared, right after left in the order of the arms, and remarks on
    the others.

    Args:
        arms: rows by name, in the order of their index; None where an arm left none.
    """
    there = {name: rows for name, rows in arms.items() if rows is not None}
    lost = ", ".join(name for name in arms if name not in there)
    found: list[LossDifference] = []
    remarks: list[str] = []
    if lost and len(arms) > 1:
        remarks.append(f"Not compared in pairs, as no {ROWS} stands beside metrics.json: {lost}")
    groups: dict[int, Groups] = {}
    for left, right in combinations(there, 2):
        pair, rows = f"{right} vs {left}", _Joined.of(there[right], there[left])
        if problem := rows.other_rows():
            remarks.append(f"{pair} is not compared: {problem}")
            continue
        number = len(rows.right.index_R)
        for part, loss in LOSSES.items():
            if problem := rows.other_texts(loss):
                remarks.append(f"{loss.column} of {pair} is not compared: {problem}")
                continue
            if number not in groups:
                groups[number] = Groups(np.arange(number))
            found.append(_difference(right, left, part, rows, groups[number]))
    return found, remarks


def _difference(right: str, left: str, part: str, rows: _Joined, groups: Groups) -> LossDifference:
    nats_R, tokens_R = rows.right.part(part)
    measure, p = groups.difference(nats_R, rows.left.part(part)[0], tokens_R)
    assert measure.value is not None, "an arm has its losses (`require_rows_of`)"
    return LossDifference(
        right, left, f"val_loss_{part}", measure.value, measure.low, measure.high, p, rows.by,
        len(tokens_R), int(tokens_R.sum()),
    )  # fmt: skip


def require_rows_of(arm: Mapping[str, Any], rows: RowLikelihoods) -> None:
    """See that rows are those that an arm's losses were made of.

    Args:
        arm: what metrics.json says (`evaluation.sft_table`).
        rows: of the file beside it.

    Raises:
        DataError: they give another loss, as those of a run that was broken off may.
    """
    for part in LOSSES:
        nats_R, tokens_R = rows.part(part)
        loss = float(nats_R.sum() / tokens_R.sum()) if tokens_R.sum() > 0 else nan
        said = arm[f"val_loss_{part}"]
        if not isclose(loss, said, rel_tol=1e-9):
            raise DataError(
                f"arm {arm['arm']!r}: val_loss_{part}={said} in metrics.json, {loss} by {ROWS};"
                " allowed: both of one mode=sft_eval, run it again"
            )


def difference_cells(found: list[LossDifference]) -> Cells:
    """Header and a row per pair and loss."""
    header = ["Comparison", "Loss", "Delta", "95 % of Delta", "p", "Drawn", "Tokens"]
    return header, [
        [
            f"{one.right} vs {one.left}", _column(one), f"{one.value:+.6f}",
            "-" if one.low is None else f"[{one.low:+.6f}, {one.high:+.6f}]",
            "-" if one.p is None else f"{one.p:.2g}", _drawn(one), f"{one.tokens:,d}",
        ]
        for one in found
    ]  # fmt: skip


def _column(one: LossDifference) -> str:
    return LOSSES[one.loss.removeprefix("val_loss_")].column


def _drawn(one: LossDifference) -> str:
    return f"{one.drawn:,d} {'documents' if one.joined_by == DOCUMENT else 'rows'}"


def difference_metrics(found: list[LossDifference]) -> dict[str, float]:
    """`delta_LOSS/RIGHT-LEFT` of every pair, with delta_LOSS_low, delta_LOSS_high, delta_LOSS_p."""
    metrics: dict[str, float] = {}
    for one in found:
        numbers = {"": one.value, "_low": one.low, "_high": one.high, "_p": one.p}
        for ending, value in numbers.items():
            if value is not None:
                metrics[f"delta_{one.loss}{ending}/{one.right}-{one.left}"] = value
    return metrics
