"""Prefixes that rows share give what copies of them give."""

import pytest
import torch

from decoding.rollout import LocalRollouts
from decoding.rollout_record import RolloutSettings
from models.grouped_attention import NAME
from models.row_cache import RowCache, prefill
from models.shared_prefix import PrefixCache
from models.tiny_causal import tiny_causal

PROMPTS = [list(range(5, 30)), [40, 41, 42]]


@pytest.fixture(scope="module")
def model():
    return tiny_causal(extra_tokens=["<think>", "</think>"]).decoding_model


@torch.no_grad()
def read(model, cache, ids_BQ, counts):
    """One pass behind all rows; hidden states of the tokens that stay."""
    queries = ids_BQ.shape[1]
    hidden = model.base_model(
        input_ids=ids_BQ, position_ids=cache.positions(queries),
        attention_mask=cache.mask(queries, model.dtype), past_key_values=cache, use_cache=True,
        **cache.attention_options(),
    ).last_hidden_state  # fmt: skip
    cache.commit(counts)
    return [hidden[row, :count] for row, count in enumerate(counts)]


def test_passes_over_rows_of_unlike_lengths_are_those_of_copies(model):
    """Rows grow unevenly, leave, and others enter behind another prompt."""
    if model.config._attn_implementation != NAME:
        pytest.skip("this build of torch packs no weights for decoding")
    layers, draw = model.config.num_hidden_layers, torch.Generator().manual_seed(0)
    caches = [RowCache(layers, 8), PrefixCache(layers, 8)]

    def step(queries, counts):
        ids = torch.randint(5, 250, (len(counts), queries), generator=draw)
        for copied, shared in zip(*(read(model, c, ids, counts) for c in caches), strict=True):
            torch.testing.assert_close(shared, copied, atol=1e-5, rtol=1e-5)

    with torch.no_grad():
        assert torch.equal(*(prefill(model, PROMPTS, cache, 3) for cache in caches))
        step(1, [1] * 6)
        step(2, [2, 1, 1, 2, 2, 1])
        for cache in caches:
            cache.drop(1)
            cache.drop(3)
        step(1, [1] * 4)
        for cache in caches:
            prefill(model, [list(range(60, 71))], cache, 2)
        step(3, [3, 1, 2, 1, 1, 3])
        step(1, [1] * 6)
    copied, shared = caches
    assert torch.equal(copied.positions(2), shared.positions(2))
    for cache in caches:
        cache.keep([0])
    assert len(shared.attention_options()["shared"]) == 1, "prompts leave with their rows"


def test_rollouts_are_those_of_copies(model, monkeypatch):
    settings = RolloutSettings(260, 261, (2,), 6, 7, rows=8)
    prompts = [(str(n), [*prompt, 260]) for n, prompt in enumerate(PROMPTS)]
    made = []
    for kind in (PrefixCache, RowCache):
        monkeypatch.setattr("decoding.rollout.PrefixCache", kind)
        made.append(LocalRollouts(model, settings).sample(prompts, 5))
    for shared, copied in zip(*made, strict=True):
        assert shared.sampled_ids == copied.sampled_ids
        assert shared.logprobs() == pytest.approx(copied.logprobs(), abs=1e-4)


def test_rows_that_end_at_once_leave_an_empty_cache(model):
    settings = RolloutSettings(260, 261, (2,), 0, 1, rows=4)
    found = LocalRollouts(model, settings).continuations([("a", [5, 6]), ("b", [7])], 3)
    assert [len(one.suffix_ids) for one in found] == [1] * 6
