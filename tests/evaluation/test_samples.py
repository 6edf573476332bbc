"""Measures of samples, by hand and against small random scoring models."""

import math
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel, Qwen3Config, Qwen3ForCausalLM

from data.errors import DataError
from evaluation.samples import (
    distinct_n,
    generative_perplexity,
    mauve_score,
    sample_metrics,
    self_repetition,
    unigram_entropy,
    windows,
)
from tests.small import word_tokenizer


def test_entropy_by_hand():
    assert unigram_entropy([7, 7, 7]) == 0.0
    assert unigram_entropy([1, 2, 3, 4]) == pytest.approx(math.log(4))
    expected = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert unigram_entropy([5, 5, 6, 5]) == pytest.approx(expected)


def test_distinct_n_by_hand():
    rows = [[1, 2, 1, 2], [1, 2, 3]]
    assert distinct_n(rows, 1) == 3 / 7
    assert distinct_n(rows, 2) == 3 / 5  # 12 21 23 of 12 21 12 12 23
    assert distinct_n(rows, 3) == 1.0  # 121 212 123
    assert math.isnan(distinct_n(rows, 5))


def test_self_repetition_by_hand():
    assert self_repetition([1, 2, 3, 4, 5, 6]) == 0.0
    assert self_repetition([1, 1, 1, 1, 1, 1]) == 1 - 1 / 3
    assert self_repetition([1, 2, 1, 2, 1], n=2) == 0.5
    assert math.isnan(self_repetition([1, 2, 3]))


def test_metrics_leave_special_tokens_out():
    metrics = sample_metrics([[0, 5, 6, 1, 2, 2], [0, 5, 5, 5, 5, 5, 1]], special={0, 1, 2})
    assert metrics["num_samples"] == 2 and metrics["mean_length"] == 3.5
    assert metrics["entropy"] == pytest.approx(math.log(2) / 2)
    assert metrics["distinct_1"] == 2 / 7 and metrics["self_repetition"] == 0.5
    assert sample_metrics([[0, 1]], special={0, 1})["entropy"] == 0.0
    with pytest.raises(DataError, match="at least 1 row"):
        sample_metrics([], special=set())


@pytest.mark.parametrize("length", [0, 1, 2, 5, 8, 9, 16, 21])
def test_windows_score_every_token_but_the_first_once(length):
    ids = list(range(length))
    scored = []
    for number, window in enumerate(windows(ids, 3, width=8, stride=4)):
        assert window.text == 3 and len(window.ids) <= 8
        assert number == 0 or len(window.ids) - window.scored >= 4, "context"
        scored += window.ids[len(window.ids) - window.scored :]
    assert scored == ids[1:]


WORDS = ["a", "b", "c", "d", "e", "f"]
TEXTS = ["a b c", "f", "e d c b a a b c d", "b b"]


def saved_scorer(folder, family: str, positions: int = 32):
    """A random causal model with its tokenizer on disk, as users have it."""
    torch.manual_seed(0)
    tokenizer = word_tokenizer(WORDS)
    sizes = {"vocab_size": len(tokenizer), "max_position_embeddings": positions}
    if family == "gpt2":
        config = GPT2Config(n_embd=16, n_layer=2, n_head=2, initializer_range=0.3, **sizes)
        model = GPT2LMHeadModel(config)
    else:
        config = Qwen3Config(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, head_dim=8, initializer_range=0.3, **sizes,
        )  # fmt: skip
        model = Qwen3ForCausalLM(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model.eval(), tokenizer


@torch.no_grad()
def token_losses(model, ids: list[int]) -> list[float]:
    logits = model(torch.tensor([ids])).logits[0, :-1]
    return F.cross_entropy(
        logits, torch.tensor(ids[1:], dtype=torch.long), reduction="none"
    ).tolist()


@pytest.mark.parametrize("family", ["gpt2", "qwen3"])
@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_generative_perplexity_equals_one_text_at_a_time(tmp_path, family, batch_size):
    model, tokenizer = saved_scorer(tmp_path, family)
    losses = [x for text in TEXTS for x in token_losses(model, tokenizer(text)["input_ids"])]
    found = generative_perplexity(TEXTS, str(tmp_path), batch_size=batch_size)
    assert found["gen_tokens"] == len(losses) == 2 + 0 + 8 + 1
    assert found["gen_nll"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)
    assert found["gen_ppl"] == pytest.approx(math.exp(found["gen_nll"]))
    assert found["gen_nll_se"] > 0


def test_end_of_text_is_context_but_not_scored(tmp_path):
    model, tokenizer = saved_scorer(tmp_path, "gpt2")
    ids = tokenizer("a b [EOS] c [PAD] d")["input_ids"]
    losses = token_losses(model, ids)
    found = generative_perplexity(["a b [EOS] c [PAD] d"], str(tmp_path))
    assert found["gen_tokens"] == 3
    assert found["gen_nll"] == pytest.approx((losses[0] + losses[2] + losses[4]) / 3, rel=1e-5)


def test_long_texts_are_scored_in_overlapping_windows(tmp_path):
    """The model knows 8 positions: tokens 8..11 are scored in a window of tokens 4..11."""
    model, tokenizer = saved_scorer(tmp_path, "gpt2", positions=8)
    text = "a b c d e f a c e b d f"
    ids = tokenizer(text)["input_ids"]
    expected = token_losses(model, ids[:8]) + token_losses(model, ids[4:])[-4:]
    found = generative_perplexity([text], str(tmp_path))
    assert found["gen_tokens"] == 11
    assert found["gen_nll"] == pytest.approx(sum(expected) / 11, rel=1e-5)


def test_scorer_errors_are_one_line(tmp_path):
    with pytest.raises(DataError, match=r"eval\.generative_model=.*missing: not a causal") as e:
        generative_perplexity(["a"], str(tmp_path / "missing"))
    assert "\n" not in str(e.value)
    saved_scorer(tmp_path, "gpt2")
    with pytest.raises(DataError, match="no sample has a token to score"):
        generative_perplexity(["a", "", "b"], str(tmp_path))


def test_mauve_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "mauve", None)
    with pytest.raises(ImportError):
        mauve_score(["a"], ["b"])
    asked = {}

    def compute_mauve(**options):
        asked.update(options)
        return SimpleNamespace(mauve=0.5)

    monkeypatch.setitem(sys.modules, "mauve", SimpleNamespace(compute_mauve=compute_mauve))
    assert mauve_score(["a"], ["b"]) == 0.5
    assert asked["p_text"] == ["b"] and asked["q_text"] == ["a"]
