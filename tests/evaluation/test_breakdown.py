"""Classes of tokens, by hand and against the ratio over rows."""

import math

import numpy as np
import pytest
import torch

from evaluation.breakdown import (
    NO_WORD,
    PADDING,
    ClassRatios,
    class_name,
    classes_by_value,
    metrics_by,
    nll_lines,
)
from evaluation.statistics import ratio_with_standard_error


def test_classes_by_hand():
    """Two rows: [no word, 0, 1 | padding], [no word, 0, 0, 1]; the first token is not scored."""
    depth = torch.tensor([[-1, 0, 1, -1], [-1, 0, 0, 1]])
    text = torch.tensor([[True, True, True, False], [True] * 4])
    scored = torch.tensor([[False, True, True, True]] * 2)
    nats = torch.tensor([[9.0, 1.0, 2.0, 0.5], [9.0, 3.0, 5.0, 4.0]])
    ratios = ClassRatios(3)
    ratios.add(classes_by_value(depth, text), nats, scored)
    found = ratios.estimates()
    assert list(found) == [PADDING, 0, 1], "what is not scored is in no class"
    assert found[0][:1] == (3.0,) and found[0][2:] == (9.0, 3, 2)
    # Rows 1/1 and 8/2: residuals 1 - 3 and 8 - 6, error sqrt(2 / 1 * (4 + 4)) / 3.
    assert found[0].standard_error == pytest.approx(4 / 3)
    assert found[1].value == 3.0 and found[1].standard_error == pytest.approx(1.0)
    assert found[PADDING].value == 0.5 and math.isnan(found[PADDING].standard_error)
    assert [class_name(number) for number in (PADDING, NO_WORD, 4)] == ["padding", "no word", 4]


def test_equals_the_ratio_over_the_rows_that_have_the_class():
    generator = torch.Generator().manual_seed(0)
    classes = torch.randint(-2, 6, (300, 20), generator=generator)
    classes[:, 0] = torch.randint(0, 60, (300,), generator=generator).clamp(max=5)
    nats = torch.rand(300, 20, generator=generator) * (classes + 3)
    scored = torch.rand(300, 20, generator=generator) < 0.8
    ratios = ClassRatios(6)
    for part in zip(classes.split(64), nats.split(64), scored.split(64), strict=True):
        ratios.add(*part)
    for number, found in ratios.estimates().items():
        here = (classes == number) & scored
        above, below = (nats.double() * here).sum(-1).numpy(), here.sum(-1).double().numpy()
        expected = ratio_with_standard_error(above[below > 0], below[below > 0])
        assert (found.value, found.standard_error) == pytest.approx(expected, rel=1e-9)
        assert (found.tokens, found.rows) == (below.sum(), np.count_nonzero(below))


def test_rows_that_agree_leave_no_error():
    ratios = ClassRatios(1)
    ratios.add(torch.zeros(5, 3, dtype=torch.long), torch.full((5, 3), 0.1), torch.ones(5, 3))
    assert ratios.estimates()[0].standard_error == pytest.approx(0.0, abs=1e-8)


def test_lines_carry_counts_and_shares():
    ratios = ClassRatios(2)
    ratios.add(
        torch.tensor([[-1, 0, 1, 1]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(1, 4)
    )
    lines = nll_lines("depth", ratios.estimates())
    assert [line["depth"] for line in lines] == ["no word", 0, 1]
    assert [line["share"] for line in lines] == pytest.approx([0.1, 0.2, 0.7])
    assert sum(line["nats"] for line in lines) == 10 and lines[2]["tokens"] == 2
    named = metrics_by(lines, "depth", "nll")
    assert named == {"nll/depth_no_word": 1.0, "nll/depth_0": 2.0, "nll/depth_1": 3.5}
