"""Log-likelihoods of continuations equal those that transformers computes one pair at a time."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.generate import GenerationRequest, GenerationSettings
from decoding.likelihood import (
    CausalScores,
    continuation_likelihoods,
    prefix_id,
    token_likelihoods,
)
from decoding.local import LocalGenerator
from models.tiny_causal import tiny_causal

TARGET = tiny_causal(num_hidden_layers=2, hidden_size=32, max_position_embeddings=32)


@torch.no_grad()
def slow(prompt, continuation, target=TARGET):
    """Token by token: the whole text is read anew for each."""
    longest, total, greedy = target.max_positions, 0.0, True
    for place, token in enumerate(continuation):
        text = [*prompt, *continuation[:place]]
        # What the last token of the continuation sees is what bounds the left end.
        cut = max(0, len(prompt) + len(continuation) - 1 - longest)
        logits = target.model(torch.tensor([text[cut:]])).logits[0, -1].double()
        total += float(logits.log_softmax(-1)[token])
        greedy &= int(logits.argmax()) == token
    return total, greedy


def ids(text):
    return TARGET.tokenizer.encode(text)


tokens = st.lists(st.integers(0, 259), min_size=1, max_size=12)


@settings(max_examples=15)
@given(st.lists(st.tuples(tokens, tokens), min_size=1, max_size=6), st.integers(1, 4))
def test_equal_to_the_sum_over_tokens_whatever_stands_beside(pairs, batch_size):
    found = continuation_likelihoods(TARGET, pairs, batch_size)
    for (value, is_greedy), pair in zip(found, pairs, strict=True):
        expected = slow(*pair)
        assert value == pytest.approx(expected[0], abs=1e-4) and is_greedy == expected[1]


def test_greedy_answers_are_greedy_and_others_are_not():
    generator = LocalGenerator(TARGET, GenerationSettings(max_new_tokens=8))
    (answer,) = generator.generate([GenerationRequest("a", prompt_ids=ids("hello"))])
    other = [*answer.token_ids[:-1], (answer.token_ids[-1] + 1) % 260]
    pairs = [(ids("hello"), answer.token_ids), (ids("hello"), other)]
    (_, first), (_, second) = CausalScores(TARGET).loglikelihood(pairs)
    assert first and not second


def test_too_long_a_prompt_is_cut_on_the_left():
    long = ids("x" * 20 + "the quick brown fox jumps")
    value, _ = continuation_likelihoods(TARGET, [(long, ids("over"))])[0]
    # 32 positions are read; the last of four tokens is only predicted.
    kept, _ = continuation_likelihoods(TARGET, [(long[-29:], ids("over"))])[0]
    shorter, _ = continuation_likelihoods(TARGET, [(long[-28:], ids("over"))])[0]
    assert value == kept == pytest.approx(slow(long[-29:], ids("over"))[0], abs=1e-4)
    assert value != shorter


def test_an_empty_prompt_is_the_end_of_another_text():
    value, _ = continuation_likelihoods(TARGET, [([], ids("abc"))])[0]
    assert value == pytest.approx(slow([TARGET.tokenizer.eos_token_id], ids("abc"))[0], abs=1e-4)
    assert prefix_id(TARGET.tokenizer) == TARGET.tokenizer.eos_token_id


def test_choices_of_one_token_are_read_once(monkeypatch):
    read = []
    forward = TARGET.model.base_model.forward

    def counted(input_ids, **options):
        read.append(tuple(input_ids.shape))
        return forward(input_ids=input_ids, **options)

    monkeypatch.setattr(TARGET.model.base_model, "forward", counted)
    question = ids("which one? ")
    pairs = [(question, ids(letter)) for letter in "ABCD"] + [(question, ids("AB"))]
    found = continuation_likelihoods(TARGET, pairs)
    # The pair of two tokens reads one token more.
    assert read == [(2, len(question) + 1)]
    assert [value for value, _ in found] == pytest.approx([slow(*p)[0] for p in pairs], abs=1e-4)


def test_by_hand_and_in_parts(monkeypatch):
    """logits (0, ln 3) give 1/4 and 3/4."""
    hidden = torch.ones(5, 1)
    monkeypatch.setattr("decoding.likelihood._LOGIT_ROWS", 2)
    value, best = token_likelihoods(
        hidden,
        lambda x_PD: x_PD * torch.tensor([0.0, math.log(3.0)]),
        torch.tensor([0, 1, 1, 0, 1]),
    )
    expected = torch.tensor([0.25, 0.75, 0.75, 0.25, 0.75]).log().double()
    torch.testing.assert_close(value, expected, atol=1e-6, rtol=0)
    assert best.tolist() == [False, True, True, False, True]


def test_of_equal_tokens_the_first_is_greedy():
    _, best = token_likelihoods(torch.zeros(2, 3), torch.nn.Identity(), torch.tensor([0, 1]))
    assert best.tolist() == [True, False]


@pytest.mark.parametrize(
    ("pair", "message"),
    [
        (([5], []), "a continuation of 0 tokens; allowed 1 .. 32"),
        (([5], [5] * 33), "a continuation of 33 tokens; allowed 1 .. 32"),
        (([5, 260], [5]), "token ids outside 0 .. 259"),
    ],
)
def test_what_cannot_be_scored_is_refused(pair, message):
    with pytest.raises(ValueError, match=message):
        continuation_likelihoods(TARGET, [pair])
    assert continuation_likelihoods(TARGET, []) == []
