"""A number per token, broken down by the class of the token: its depth, its position.

Legend: B rows of a batch, L tokens, C classes.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from data.blocks import FEATURE_FILL
from evaluation.tables import Cell

# Classes that are no depth and no position; those start at 0.
NO_WORD = FEATURE_FILL
PADDING = FEATURE_FILL - 1
_NAMES = {NO_WORD: "no word", PADDING: "padding"}


class ClassEstimate(NamedTuple):
    """Sum over the tokens of a class / number of these tokens.

    `standard_error` is nan where a single row has such tokens. `total` is the sum, `tokens` their
    number, `rows` the number of rows that have any.
    """

    value: float
    standard_error: float
    total: float
    tokens: int
    rows: int


def class_name(number: int) -> int | str:
    """A depth or position as it is, the others by name."""
    return _NAMES.get(number, number)


class ClassRatios:
    """Mean per token of every class, r = sum(a) / sum(n), where the rows are independent.

    Tokens of one row share its draws and its text, so the error is that of a ratio of sums over
    rows (`evaluation.statistics.ratio_with_standard_error`), here from running moments: with a_i
    and n_i the sum and the number of tokens of the class in row i,

        se^2 = R / (R - 1) * (sum a_i^2 - 2 r sum a_i n_i + r^2 sum n_i^2) / (sum n_i)^2,

    R the number of rows with n_i > 0. The memory is that of the classes, not of the rows.

    Args:
        size: classes PADDING, NO_WORD, 0, 1, ... size - 1.
    """

    def __init__(self, size: int) -> None:
        self._classes = size - PADDING
        # rows, sum a, sum n, sum a^2, sum a n, sum n^2
        self._moments = torch.zeros(6, self._classes, dtype=torch.float64)

    def add(self, class_BL: Tensor, value_BL: Tensor, counted_BL: Tensor) -> None:
        """Add rows.

        Args:
            class_BL: class of every place; padding is PADDING.
            value_BL: what every place adds to its class.
            counted_BL: places that count; the others are ignored.
        """
        place_BL = class_BL - PADDING
        assert int(place_BL.min()) >= 0 and int(place_BL.max()) < self._classes, "a class too many"
        zero_BC = torch.zeros(len(class_BL), self._classes, dtype=torch.float64)
        count_BL = counted_BL.double()
        sum_BC = zero_BC.scatter_add(1, place_BL, value_BL.double() * count_BL)
        count_BC = zero_BC.scatter_add(1, place_BL, count_BL)
        present_BC = (count_BC > 0).double()
        powers = (present_BC, sum_BC, count_BC, sum_BC**2, sum_BC * count_BC, count_BC**2)
        self._moments += torch.stack([power_BC.sum(0) for power_BC in powers])

    def estimates(self) -> dict[int, ClassEstimate]:
        """Every class that occurred, in the order PADDING, NO_WORD, 0, 1, ..."""
        columns = enumerate(self._moments.t().tolist(), start=PADDING)
        return {number: _estimate(*moments) for number, moments in columns if moments[0]}


def _estimate(
    rows: float, total: float, tokens: float, squares: float, products: float, counts: float
) -> ClassEstimate:
    ratio = total / tokens
    # Where all rows agree the difference is zero but for rounding, which may fall below it.
    residual = max(squares - 2 * ratio * products + ratio**2 * counts, 0.0)
    error = math.sqrt(rows / (rows - 1) * residual) / tokens if rows > 1 else math.nan
    return ClassEstimate(ratio, error, total, int(tokens), int(rows))


def classes_by_value(value_BL: Tensor, token_mask_BL: Tensor) -> Tensor:
    """[B, L] class of every place: its value (a depth, a position), PADDING behind the text."""
    return torch.where(token_mask_BL, value_BL, PADDING)


def nll_lines(
    kind: str, estimates: Mapping[int, ClassEstimate], **fixed: Cell
) -> list[dict[str, Any]]:
    """Lines of a file: nats of every class, their share of the bound, and per token.

    Args:
        kind: what the classes are, the key of the class.
        estimates: one per class.
        fixed: further entries of every line.
    """
    whole = math.fsum(estimate.total for estimate in estimates.values())
    return [
        {
            **fixed,
            kind: class_name(number),
            "tokens": found.tokens,
            "rows": found.rows,
            "nats": found.total,
            "share": found.total / whole if whole else math.nan,
            "nll": found.value,
            "nll_se": found.standard_error,
        }
        for number, found in estimates.items()
    ]


def weight_lines(estimates: Mapping[int, ClassEstimate]) -> list[dict[str, Any]]:
    """Lines of a file: mean training weight of the tokens of every depth."""
    return [
        {
            "depth": class_name(number),
            "tokens": found.tokens,
            "rows": found.rows,
            "weight": found.value,
            "weight_se": found.standard_error,
        }
        for number, found in estimates.items()
    ]


def metrics_by(lines: Iterable[Mapping[str, Any]], kind: str, name: str) -> dict[str, float]:
    """Scalars of a summary, `name/kind_class`: "nll/depth_0", "nll/depth_no_word"."""
    return {f"{name}/{kind}_{str(line[kind]).replace(' ', '_')}": line[name] for line in lines}
