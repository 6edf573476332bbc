"""Speculative decoding: the target's own answers, at the cost that the draft deserves."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MixtralConfig,
    Phi3Config,
    PhiConfig,
    PhiForCausalLM,
    Starcoder2Config,
)

from decoding.drafts import NetworkDraft, NoDraft, OracleDraft, RandomDraft
from decoding.speculate import LENGTH, STOP, TargetPass, speculate
from decoding.verification import Greedy
from models.decodable import check_decodable, check_head
from models.tiny_causal import tiny_causal
from tests.decoding.speculation import VOCABULARY, network_draft, slow_greedy, tiny_target

PROMPT = [3, 1, 4, 1, 5]


def greedy(model, draft, prompts, count, stop_ids=()):
    return speculate(model, draft, prompts, Greedy(), max_new_tokens=count, stop_ids=stop_ids)


def oracle(model, prompts, drafted, count, error_rate=0.0):
    answers = {tuple(p): slow_greedy(model, p, count + drafted + 1) for p in prompts}
    return OracleDraft(answers, drafted, VOCABULARY, error_rate)


def check_counts(result, ceiling):
    assert 1 + sum(result.cycles) == len(result.token_ids)
    assert all(1 <= cycle <= ceiling for cycle in result.cycles)
    assert (result.last_uncut is None) == (not result.cycles)
    assert result.last_uncut is None or result.cycles[-1] <= result.last_uncut <= ceiling


@settings(deadline=None, max_examples=25)
@given(
    family=st.sampled_from(["qwen3", "llama"]),
    seed=st.integers(0, 2),
    layers=st.integers(2, 3),
    block_size=st.integers(2, 16),
    from_anchor=st.booleans(),
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=3),
    count=st.integers(1, 24),
    stops=st.integers(0, 3),
)
def test_any_draft_gives_the_greedy_answer(
    family, seed, layers, block_size, from_anchor, lengths, count, stops
):
    """Network, chance and half an oracle, alone and together, against a loop without a cache."""
    model = tiny_target(family, seed, layers)
    torch.manual_seed(sum(lengths) + count)
    prompts = [torch.randint(0, VOCABULARY, (length,)).tolist() for length in lengths]
    plain = [slow_greedy(model, prompt, count) for prompt in prompts]
    stop_ids = tuple(plain[0][1 : 1 + stops])
    plain = [slow_greedy(model, prompt, count, stop_ids) for prompt in prompts]
    drafts = (
        network_draft(model, 16, block_size, from_anchor, seed),
        RandomDraft(block_size - 1, VOCABULARY, seed=seed),
        oracle(model, prompts, block_size - 1, count, error_rate=0.3),
        NoDraft(),
    )
    for draft in drafts:
        together = greedy(model, draft, prompts, count, stop_ids)
        assert [result.token_ids for result in together] == plain
        for result, answer in zip(together, plain, strict=True):
            check_counts(result, draft.drafted + 1)
            assert result.finish == (STOP if answer[-1] in stop_ids else LENGTH)
    alone = greedy(model, drafts[0], prompts[:1], count, stop_ids)[0]
    assert alone == greedy(model, drafts[0], prompts, count, stop_ids)[0], "costs do not change"


@pytest.mark.parametrize("block_size", [2, 7, 16])
def test_an_oracle_commits_exactly_a_block_per_cycle(block_size):
    """tau = B, not B + 1: one anchor, B - 1 drafts, one token of the target's own."""
    model = tiny_target()
    count = 1 + 3 * block_size
    found = greedy(model, oracle(model, [PROMPT], block_size - 1, count), [PROMPT], count)[0]
    assert found.cycles == [block_size] * 3 and found.last_uncut == block_size
    wrong = oracle(model, [PROMPT], block_size - 1, count, error_rate=1.0)
    assert greedy(model, wrong, [PROMPT], count)[0].cycles == [1] * (count - 1)


def test_the_last_cycle_is_cut_at_the_limit_and_at_a_stop_token():
    model = tiny_target()
    answer = slow_greedy(model, PROMPT, 12)
    draft = oracle(model, [PROMPT], 7, 12)
    found = greedy(model, draft, [PROMPT], 12)[0]
    assert (found.cycles, found.last_uncut, found.finish) == ([8, 3], 8, LENGTH)
    stop = next(token for token in answer[1:] if token != answer[0])
    place = answer.index(stop)
    found = greedy(model, draft, [PROMPT], 12, [stop])[0]
    assert found.token_ids == answer[: place + 1] and found.finish == STOP
    assert (found.cycles[-1], found.last_uncut) == ((place - 1) % 8 + 1, 8)
    first = greedy(model, draft, [PROMPT], 12, [answer[0]])[0]
    assert (first.token_ids, first.cycles, first.last_uncut) == (answer[:1], [], None)
    single = greedy(model, draft, [PROMPT], 1)[0]
    assert (single.token_ids, single.cycles, single.finish) == (answer[:1], [], LENGTH)


def test_a_stop_token_at_the_limit_is_a_stop():
    model = tiny_target()
    answer = slow_greedy(model, PROMPT, 9)
    new = [place for place, token in enumerate(answer) if token not in answer[:place]][-1]
    found = greedy(model, NoDraft(), [PROMPT], new + 1, [answer[new]])[0]
    assert found.token_ids == answer[: new + 1] and found.finish == STOP


def test_rows_leave_and_the_others_go_on_at_their_own_pace():
    """One prompt is drafted perfectly, one never, one in part; each costs what it costs alone."""
    model = tiny_target()
    prompts = [PROMPT, [7, 8], [9] * 11]
    known = {tuple(p): slow_greedy(model, p, 40) for p in prompts}
    known[tuple(prompts[1])] = [(token + 1) % VOCABULARY for token in known[tuple(prompts[1])]]
    known[tuple(prompts[2])][10] += 1
    draft = OracleDraft(known, 7, VOCABULARY)
    found = greedy(model, draft, prompts, 25)
    assert [len(result.cycles) for result in found] == [3, 24, 4]
    assert [result.token_ids for result in found] == [slow_greedy(model, p, 25) for p in prompts]


class Spy(NoDraft):
    """Counts what the target hands to a draft with taps."""

    layer_ids = (0, 2)

    def __init__(self, drafted):
        self.drafted, self.seen = drafted, []

    def begin(self, prompts):
        return self

    def extend(self, taps_BCE, counts):
        self.seen.append((taps_BCE, counts))

    def propose(self, anchor_B):
        return torch.zeros(len(anchor_B), self.drafted, VOCABULARY)


def test_the_draft_reads_the_features_of_what_is_committed_before_the_anchor():
    """Prompt, then n + 1 tokens per cycle: hidden_states[id + 1] of the sequence in one pass."""
    model, spy = tiny_target(), Spy(3)
    found = greedy(model, spy, [PROMPT], 12)[0]
    assert [counts for _, counts in spy.seen] == [[len(PROMPT)], *([c] for c in found.cycles[:-1])]
    ids = torch.tensor([PROMPT + found.token_ids])
    first = model(ids, output_hidden_states=True).hidden_states[1]
    want = torch.cat([first, last_layer_output(model, ids)], dim=-1)
    place = 0
    for taps_BCE, (count,) in spy.seen:
        torch.testing.assert_close(taps_BCE[:, :count], want[:, place : place + count])
        place += count
    assert place == len(PROMPT) + sum(found.cycles[:-1])


def last_layer_output(model, ids):
    kept = []
    handle = model.model.layers[-1].register_forward_hook(lambda m, a, out: kept.append(out))
    model(ids)
    handle.remove()
    return kept[0]


@pytest.mark.parametrize(
    ("prompts", "count", "message"),
    [
        ([[]], 4, r"prompt 0 has 0 tokens; allowed 1 \.\. 31"),
        ([[1], [1] * 32], 4, "prompt 1 has 32 tokens"),
        ([[1]], 0, "max_new_tokens=0: allowed an integer >= 1"),
    ],
)
def test_what_leaves_no_room_is_refused(prompts, count, message):
    model = tiny_target(longest=32)
    with pytest.raises(ValueError, match=message):
        greedy(model, NoDraft(), prompts, count)


def test_the_targets_context_is_a_limit():
    model = tiny_target(longest=32)
    found = greedy(model, network_draft(model), [[1] * 20, [2] * 30], 50)
    assert [len(result.token_ids) for result in found] == [12, 2]


def test_targets_that_forget_or_change_their_logits_are_refused():
    config = SimpleNamespace(
        model_type="gemma", max_position_embeddings=64, final_logit_softcapping=30.0
    )
    with pytest.raises(ValueError, match=r"target gemma: final_logit_softcapping=30\.0"):
        greedy(SimpleNamespace(config=config, device="cpu"), NoDraft(), [[1]], 4)
    config = SimpleNamespace(model_type="x", layer_types=["full_attention", "sliding_attention"])
    with pytest.raises(ValueError, match=r"target x: layers of sliding_attention; allowed: full"):
        TargetPass(SimpleNamespace(config=config), None, 1)


@pytest.mark.parametrize(
    "config_class", [MistralConfig, Phi3Config, Starcoder2Config, MixtralConfig]
)
def test_a_window_of_all_layers_is_refused(config_class):
    config = config_class(sliding_window=8, max_position_embeddings=64)
    with pytest.raises(ValueError, match="target x: sliding_window=8 of 64 positions; allowed"):
        check_decodable(config, "x")
    check_decodable(config_class(sliding_window=64, max_position_embeddings=64), "x")
    check_decodable(config_class(sliding_window=None), "x")


def test_heads_that_drafts_cannot_share_are_refused():
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    granite = GraniteForCausalLM(GraniteConfig(**sizes, intermediate_size=8, logits_scaling=8.0))
    with pytest.raises(ValueError, match=r"target x: logits_scaling=8\.0; allowed: targets"):
        check_head(granite, "x")
    phi = PhiForCausalLM(PhiConfig(**sizes, intermediate_size=8))
    with pytest.raises(ValueError, match="target x: a head with a bias; allowed for drafts"):
        check_head(phi, "x")
    check_head(tiny_target(), "x")


@pytest.mark.parametrize("heads", [(8, 2), (4, 4)])
def test_the_model_for_decoding_gives_the_same_answers(heads):
    """Packed weights and grouped attention, blocks behind rows of unlike lengths."""
    target = tiny_causal(
        num_hidden_layers=2, num_attention_heads=heads[0], num_key_value_heads=heads[1]
    )
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(0, 200, (n,), generator=draw).tolist() for n in (3, 30, 1)]
    plain = [slow_greedy(target.model, prompt, 20) for prompt in prompts]
    assert len(set(plain[0])) > 3, "more than a loop"
    answers = {tuple(p): [*answer, *[0] * 8] for p, answer in zip(prompts, plain, strict=True)}
    vocabulary = len(target.head_VD)
    for draft in (OracleDraft(answers, 5, vocabulary, 0.3), RandomDraft(5, vocabulary), NoDraft()):
        found = greedy(target.decoding_model, draft, prompts, 20)
        assert [result.token_ids for result in found] == plain


@pytest.mark.parametrize("rope", ["dynamic", "longrope"])
def test_targets_whose_rows_would_depend_on_each_other_are_refused(rope):
    config = SimpleNamespace(model_type="x", rope_parameters={"rope_type": rope})
    with pytest.raises(ValueError, match=f"target x: rope_type={rope}, which depends on the"):
        TargetPass(SimpleNamespace(config=config), None, 1)
    config.rope_parameters = {"full_attention": {"rope_type": rope, "rope_theta": 1.0}}
    with pytest.raises(ValueError, match=f"rope_type={rope}"):
        TargetPass(SimpleNamespace(config=config), None, 1)


def test_an_attention_without_masks_is_refused():
    model = tiny_target()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation=flash_attention_2, which takes no"):
        greedy(model, NoDraft(), [[1]], 4)


def test_block_sizes_up_to_the_trained_one():
    model = tiny_target()
    draft = network_draft(model, trained=8)
    assert (draft.block_size, draft.drafted) == (8, 7)
    assert network_draft(model, trained=8, block_size=3).drafted == 2
    assert network_draft(model, trained=8, sample_from_anchor=True).drafted == 8
    for size in (1, 9):
        with pytest.raises(ValueError, match=rf"mode\.block_size={size}: allowed 2 \.\. 8"):
            NetworkDraft(draft.network, draft.embedding_VD, draft.head, size)
