"""What a pass predicts, and how training draws its passes: hand numbers, slow sums, frequencies."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from objectives.refinement import (
    allowed_log_probabilities,
    filled_left,
    injection_rate,
    number_of_passes,
    predict,
    token_errors,
)

ALL = torch.zeros(4, dtype=torch.bool)


def test_a_prediction_by_hand():
    """Odds 1 : 2 : 4 : 1; without token 2 it is 1 : 2 : 1."""
    logits = torch.tensor([[[1.0, 2.0, 4.0, 1.0]]]).log()
    found = predict(logits, ALL, top=2)
    assert found.token_P.tolist() == [[2]]
    assert found.confidence_P.item() == pytest.approx(0.5)
    entropy = 0.5 * math.log(2) + 0.25 * math.log(4) + 2 * 0.125 * math.log(8)
    assert found.entropy_P.item() == pytest.approx(entropy)
    assert found.top_token_PT.tolist() == [[[2, 1]]]
    assert found.top_probability_PT[0, 0].tolist() == pytest.approx([0.5, 0.25])
    less = predict(logits, torch.tensor([False, False, True, False]), top=2)
    assert less.token_P.tolist() == [[1]]
    assert less.confidence_P.item() == pytest.approx(0.5)
    assert less.entropy_P.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(4))
    assert 2 not in less.top_token_PT


def test_forbidden_tokens_are_no_tokens():
    logits = torch.tensor([[0.0, 50.0, 1.0, -1.0], [3.0, 0.0, torch.nan, 0.0]])
    forbidden = torch.tensor([False, True, True, False])
    log_p = allowed_log_probabilities(logits, forbidden)
    assert log_p[:, forbidden].eq(-torch.inf).all()
    torch.testing.assert_close(log_p[:, ~forbidden], logits[:, ~forbidden].log_softmax(-1))
    assert torch.isfinite(predict(logits, forbidden).entropy_P).all()


def test_one_token_is_left():
    found = predict(torch.randn(3, 4), torch.tensor([True, True, False, True]))
    assert found.token_P.tolist() == [2] * 3
    assert found.confidence_P.tolist() == [1.0] * 3 and found.entropy_P.tolist() == [0.0] * 3
    assert found.top_token_PT.shape == (3, 0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_probabilities_are_not_rounded_to_the_logits_type(dtype):
    logits = torch.linspace(0.0, 0.5, 64).to(dtype)[None]
    found = predict(logits, torch.zeros(64, dtype=torch.bool), top=64)
    exact = logits.double().softmax(-1).sort(descending=True).values
    torch.testing.assert_close(found.top_probability_PT.double(), exact, rtol=1e-6, atol=0)
    wanted = torch.float64 if dtype == torch.float64 else torch.float32
    assert found.confidence_P.dtype == found.entropy_P.dtype == wanted


def test_the_injected_share_falls_and_stays():
    """0.3 to 0.1 in the first 4e9 tokens (arXiv 2606.08357)."""
    for seen, rate in ((0, 0.3), (1e9, 0.25), (2e9, 0.2), (4e9, 0.1), (9e9, 0.1)):
        assert injection_rate(seen, 0.3, 0.1, 4e9) == pytest.approx(rate)
    assert injection_rate(0, 0.3, 0.1, 0) == pytest.approx(0.1)


def test_the_number_of_passes_is_uniform_and_the_key_decides_it():
    counts = Counter(number_of_passes((1, 12, step), 3) for step in range(3000))
    assert set(counts) == {1, 2, 3}
    # Standard deviation of a count: sqrt(3000 * 2 / 9) = 26.
    assert all(abs(count - 1000) < 100 for count in counts.values())
    assert {number_of_passes((1, 12, step), 1) for step in range(50)} == {1}
    assert number_of_passes((1, 12, 5), 3) == number_of_passes((1, 12, 5), 3)
    other = [number_of_passes((2, 12, step), 3) for step in range(50)]
    assert other != [number_of_passes((1, 12, step), 3) for step in range(50)]


def test_the_chain_rule_by_hand():
    """A prompt's token, then three places: each hides itself and what is behind it."""
    hidden, wanted = filled_left(torch.tensor([[False, True, True, True]]), 4)
    assert hidden[0].int().tolist() == [[0, 1, 1, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 1]]
    assert wanted[0].int().tolist() == [[0, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]


@given(st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=4))
def test_every_place_is_asked_for_once_and_sees_nothing_of_itself(places):
    predict_MS = torch.tensor(places)
    hidden, wanted = filled_left(predict_MS, 5)
    assert torch.equal(wanted.sum(1), predict_MS.long())
    for m, v, s in wanted.nonzero().tolist():
        assert v == s
        assert torch.equal(hidden[m, v, s:], predict_MS[m, s:]) and not hidden[m, v, :s].any()


def test_wrong_places_count_where_they_were_to_be_found():
    token = torch.tensor([[1, 2, 3], [1, 2, 3]])
    target = torch.tensor([[9, 2, 4], [1, 9, 3]])
    predicted = torch.tensor([[False, True, True], [True, True, True]])
    assert token_errors(token, target, predicted).tolist() == [1, 1]
