"""Tokens from logits: against hand-made distributions."""

import math

import pytest
import torch

from decoding.categorical import draw, invert, keyed_uniform64, nucleus


@pytest.mark.parametrize(
    ("mass", "kept"),
    [
        (0.5, [0.5, 0.0, 0.0, 0.0]),  # reached exactly by the first token
        (0.51, [0.5, 0.3, 0.0, 0.0]),  # the token that crosses is kept
        (0.8, [0.5, 0.3, 0.0, 0.0]),
        (0.9, [0.5, 0.3, 0.15, 0.0]),
        (1e-9, [0.5, 0.0, 0.0, 0.0]),
        (1.0, [0.5, 0.3, 0.15, 0.05]),
    ],
)
def test_nucleus_keeps_the_token_that_crosses(mass, kept):
    p = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    cut = nucleus(p[order][None], mass)
    assert torch.equal(cut[0], torch.tensor(kept, dtype=torch.float64)[order])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mass", [0.1, 0.9, 0.9999])
@pytest.mark.parametrize("scale", [0.0, 0.1, 3.0, 8.0])
def test_nucleus_of_a_large_vocabulary_equals_the_full_sort(scale, mass, dtype):
    """Peaked rows are cut by their head, flat ones by radix; with ties (scale 0) all stay."""
    logits = scale * torch.randn(3, 2000, generator=torch.Generator().manual_seed(0))
    p = logits.to(dtype).softmax(-1)
    cut = nucleus(p, mass)
    for row, kept in zip(p, cut, strict=True):
        values = row.sort(descending=True).values
        count = int((values.double().cumsum(0) < mass).sum()) + 1
        assert torch.equal(kept > 0, row.float() >= values[count - 1].float())
        assert kept.sum() >= mass - 1e-6


def test_nucleus_of_flat_and_peaked_rows_together():
    """Each row is cut as if it were alone, with zeros and subnormal numbers among its entries."""
    p = torch.zeros(3, 2000)
    p[0, 7], p[1], p[2, :1500] = 1.0, 1 / 2000, 1 / 1500
    p[2, 1500:] = 1e-40
    cut = nucleus(p, 0.9)
    assert (cut > 0).sum(-1).tolist() == [1, 2000, 1500]


def test_inversion_splits_the_unit_interval_by_probability():
    p = torch.tensor([[0.0, 2.0, 0.0, 6.0, 0.0]])
    for uniform, token in [(0.0, 1), (0.2499, 1), (0.25, 3), (0.5, 3), (1.0 - 2**-53, 3)]:
        drawn = invert(p, torch.tensor([uniform], dtype=torch.float64))
        assert drawn.tolist() == [token], uniform


@pytest.mark.parametrize("float64", [False, True])
def test_frequencies_follow_the_tempered_nucleus(float64):
    p = torch.tensor([0.4, 0.1, 0.3, 0.2])
    num = 20_000
    uniform = keyed_uniform64((3,), torch.arange(num), 1)[:, 0]
    options = {"temperature": 0.5, "nucleus_p": 0.9, "float64": float64}
    tokens = draw(p.log().expand(num, -1), uniform, **options)
    # Squared: 0.16 0.01 0.09 0.04, of which the first three in order hold 29/30 >= 0.9.
    expected = torch.tensor([0.16, 0.0, 0.09, 0.04]) / 0.29
    found = tokens.bincount(minlength=4) / num
    assert torch.allclose(found, expected, atol=4 * math.sqrt(0.25 / num))
    assert found[1] == 0


def test_temperature_zero_is_greedy_and_excluded_tokens_are_never_drawn():
    logits = torch.tensor([[0.0, 3.0, -torch.inf, 2.0]])
    assert draw(logits, torch.tensor([0.99]), temperature=0.0).tolist() == [1]
    uniform = keyed_uniform64((1,), torch.arange(500), 1)[:, 0]
    assert 2 not in draw(logits.expand(500, -1), uniform).tolist()


def test_uniform_numbers_belong_to_their_row_and_column():
    few = keyed_uniform64((1, 2), torch.tensor([5]), 3)
    many = keyed_uniform64((1, 2), torch.arange(8), 10)
    assert torch.equal(few[0], many[5, :3])
    assert not torch.equal(many, keyed_uniform64((1, 3), torch.arange(8), 10))
    wide = keyed_uniform64((0,), torch.arange(100), 1000)
    assert wide.min() >= 0 and wide.max() < 1
    assert abs(float(wide.mean()) - 0.5) < 4 * math.sqrt(1 / 12 / wide.numel())
