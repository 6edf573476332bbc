"""Log-probabilities of drawn tokens: by hand, in pieces, and with a set of tokens to draw from."""

import math

import pytest
import torch

from objectives.token_log_probs import log_probs_of, token_log_probs


def test_by_hand():
    logits = torch.tensor([[0.0, math.log(2.0), math.log(5.0)]])
    assert log_probs_of(logits, torch.tensor([1])).item() == pytest.approx(math.log(2 / 8))
    kept = log_probs_of(logits, torch.tensor([1]), lambda p: p >= 0.2)
    assert kept.item() == pytest.approx(math.log(2 / 7))
    # A token that only rounding leaves out counts itself in.
    outside = log_probs_of(logits, torch.tensor([0]), lambda p: p >= 0.2)
    assert outside.item() == pytest.approx(math.log(1 / 8))


def test_temperature_and_forbidden_tokens():
    head = torch.nn.Linear(3, 3, bias=False)
    torch.nn.init.eye_(head.weight)
    hidden = torch.tensor([[0.0, 2 * math.log(2.0), 2 * math.log(5.0)]])
    forbidden = torch.tensor([False, False, True])
    token = torch.tensor([1])
    found = token_log_probs(hidden, head, token, temperature=2.0, forbidden_V=forbidden)
    assert found.item() == pytest.approx(math.log(2 / 3))


def test_pieces_change_neither_value_nor_gradient():
    torch.manual_seed(0)
    head = torch.nn.Linear(5, 11, bias=False)
    hidden, token = torch.randn(17, 5, requires_grad=True), torch.randint(0, 11, (17,))
    weight = torch.randn(17)

    def gradients(rows, keep):
        found = token_log_probs(hidden, head, token, 0.7, keep=keep, rows=rows)
        return found, torch.autograd.grad((found * weight).sum(), [hidden, head.weight])

    for keep in (None, lambda p: p > 0.05):
        whole, wanted = gradients(17, keep)
        parts, found = gradients(4, keep)
        torch.testing.assert_close(parts, whole)
        torch.testing.assert_close(found, wanted)
        with torch.no_grad():
            torch.testing.assert_close(
                token_log_probs(hidden, head, token, 0.7, keep=keep, rows=4), whole.detach()
            )
    logits = head(hidden) / 0.7
    slow = torch.stack([logits[n].log_softmax(-1)[token[n]] for n in range(17)])
    torch.testing.assert_close(token_log_probs(hidden, head, token, 0.7), slow)
