"""Answers of a model in this process, against transformers' loop and hand-made distributions."""

import math
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from decoding.generate import (
    GenerationRequest,
    GenerationResult,
    GenerationSettings,
    choose,
    request_key,
)
from decoding.local import LocalGenerator
from models.tiny_causal import tiny_causal

# In double precision, so that no tie is broken by how a batch rounds.
TARGET = tiny_causal(num_hidden_layers=2, max_position_embeddings=96, dtype="float64")
STOPS = (2, 9, 77, 100)


def answers(requests, options=None, **generator):
    made = LocalGenerator(TARGET, options or GenerationSettings(max_new_tokens=20), **generator)
    results = list(made.generate(requests))
    assert len({result.id for result in results}) == len(results)
    return {result.id: result for result in results}


def ids(*prompts):
    return [GenerationRequest(str(n), prompt_ids=prompt) for n, prompt in enumerate(prompts)]


def reference(prompt, max_new_tokens, stop_ids):
    """The loop of transformers, one prompt at a time."""
    ids_1S = torch.tensor([prompt])
    written = TARGET.model.generate(
        ids_1S, attention_mask=torch.ones_like(ids_1S), do_sample=False,
        max_new_tokens=max_new_tokens, eos_token_id=list(stop_ids), pad_token_id=0,
    )  # fmt: skip
    return written[0, len(prompt) :].tolist()


@settings(max_examples=25, deadline=None)
@given(
    prompts=st.lists(st.lists(st.integers(0, 259), min_size=1, max_size=30), max_size=9),
    batch_size=st.integers(1, 5),
    prefill_tokens=st.integers(1, 90),
    max_new_tokens=st.integers(1, 24),
)
def test_greedy_is_that_of_transformers(prompts, batch_size, prefill_tokens, max_new_tokens):
    options = GenerationSettings(max_new_tokens=max_new_tokens, stop_ids=STOPS)
    found = answers(ids(*prompts), options, batch_size=batch_size, prefill_tokens=prefill_tokens)
    assert len(found) == len(prompts)
    for number, prompt in enumerate(prompts):
        expected = reference(prompt, max_new_tokens, STOPS)
        result = found[str(number)]
        assert result.token_ids == expected and result.num_tokens == len(expected)
        assert result.finish == ("stop" if expected[-1] in STOPS else "length")


def test_both_ways_of_ending_occur():
    draw = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 260, (5,), generator=draw).tolist() for _ in range(20)]
    found = answers(ids(*prompts), GenerationSettings(max_new_tokens=24, stop_ids=STOPS))
    finishes = Counter(result.finish for result in found.values())
    assert finishes["stop"] >= 3 and finishes["length"] >= 3


def test_logprobs_are_those_of_the_model():
    prompt = [5, 80, 33]
    for temperature in (0.0, 1.3):
        options = GenerationSettings(
            max_new_tokens=12, temperature=temperature, top_k=40, logprobs=True, stop_ids=(300,)
        )
        (result,) = answers(ids(prompt), options).values()
        row = torch.tensor([prompt + result.token_ids])
        logits = TARGET.model(row).logits[0, len(prompt) - 1 : -1].float()
        expected = logits.log_softmax(-1).gather(-1, row[0, len(prompt) :, None])[:, 0]
        assert result.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert next(iter(answers(ids(prompt)).values())).logprobs is None


def test_sampled_answers_depend_on_seed_and_id_not_on_the_batch():
    prompts = [[7, 8, 9]] * 12 + [list(range(10, 40))]
    options = GenerationSettings(max_new_tokens=15, temperature=1.0, top_p=0.95, seed=4)
    wide = answers(ids(*prompts), options, batch_size=13)
    narrow = answers(ids(*prompts[::-1]), options, batch_size=2)
    for same in map(str, range(1, 12)):
        assert wide[same].token_ids == narrow[same].token_ids
    assert len({tuple(wide[str(n)].token_ids) for n in range(12)}) == 12
    other = answers(ids(*prompts), GenerationSettings(max_new_tokens=15, temperature=1.0, seed=5))
    assert wide["3"].token_ids != other["3"].token_ids


def test_the_text_has_no_special_tokens_but_the_ids_do():
    made = LocalGenerator(TARGET, GenerationSettings(max_new_tokens=30))
    requests = ids(*([n, n + 1] for n in range(10, 60)))
    stopped = [r for r in made.generate(requests) if r.finish == "stop"]
    assert stopped
    for result in stopped:
        assert result.token_ids[-1] == TARGET.tokenizer.eos_token_id
        assert result.text == TARGET.tokenizer.decode(result.token_ids, skip_special_tokens=True)
        assert "<|im_end|>" not in result.text


def test_a_conversation_is_its_tokens():
    messages = [{"role": "user", "content": "Hi"}]
    for thinking in (False, True):
        options = GenerationSettings(max_new_tokens=10, thinking=thinking)
        (chat,) = answers([GenerationRequest("a", messages=messages)], options).values()
        (plain,) = answers(ids(TARGET.chat_ids(messages, thinking)), options).values()
        assert chat.token_ids == plain.token_ids


def test_the_end_of_the_context_is_the_limit():
    found = answers(ids([5] * 90, [5] * 95), GenerationSettings(max_new_tokens=20, stop_ids=(300,)))
    assert [(found[i].num_tokens, found[i].finish) for i in "01"] == [(6, "length"), (1, "length")]


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (GenerationRequest("x", prompt_ids=[5] * 96), "a prompt of 96 tokens; allowed 1 .. 95"),
        (GenerationRequest("x", prompt_ids=[]), "a prompt of 0 tokens"),
        (GenerationRequest("x", prompt_ids=[260]), "token ids outside 0 .. 259"),
        (GenerationRequest("x", prompt_ids=[-1]), "token ids outside"),
        (GenerationRequest("x", messages=[{"role": "user", "content": "long " * 99}]), "a prompt"),
        (GenerationRequest("x", messages=[{"role": "user", "content": "\ud83d"}]), "refuses"),
    ],
)
def test_a_prompt_that_cannot_be_answered_is_a_result(request_, reason):
    found = answers([request_, *ids([5, 6])])
    assert reason in found["x"].error and found["x"].token_ids is None
    assert found["0"].error is None and found["0"].num_tokens > 0


def test_requests_are_read_as_they_are_needed():
    taken = []

    def requests():
        for request in ids(*([n] for n in range(100))):
            taken.append(request.id)
            yield request

    next(LocalGenerator(TARGET, GenerationSettings(2), batch_size=2).generate(requests()))
    assert len(taken) <= 12


def test_without_stop_tokens_every_answer_is_as_long_as_allowed():
    options = GenerationSettings(max_new_tokens=30, stop_ids=())
    found = answers(ids(*([n, n + 1] for n in range(10, 60))), options)
    assert {(result.num_tokens, result.finish) for result in found.values()} == {(30, "length")}


def test_nothing_to_answer():
    assert answers([]) == {}


def test_a_model_that_forgets_is_refused():
    target = tiny_causal(num_hidden_layers=2)
    target.model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match=r"tiny_causal: layers of sliding_attention; .*a server"):
        LocalGenerator(target, GenerationSettings())
    target.model.config.layer_types = None
    target.model.config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0}
    with pytest.raises(ValueError, match=r"target tiny_causal: rope_type=dynamic, .*a server"):
        LocalGenerator(target, GenerationSettings())
    target.model.config.rope_parameters = None
    target.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation=flash_attention_2, which"):
        LocalGenerator(target, GenerationSettings())


def test_the_identity_tells_numbers_and_texts_apart():
    one, other = tiny_causal(num_hidden_layers=2), tiny_causal(num_hidden_layers=2)
    settings_ = GenerationSettings()
    assert LocalGenerator(one, settings_).identity() == LocalGenerator(other, settings_).identity()
    other.tokenizer.chat_template += " "
    found = LocalGenerator(one, settings_).identity(), LocalGenerator(other, settings_).identity()
    assert {key for key in found[0] if found[0][key] != found[1][key]} == {"tokenizer"}
    assert found[0]["dtype"] == "float32"
    wide = LocalGenerator(tiny_causal(num_hidden_layers=2, dtype="float64"), settings_).identity()
    assert {key for key in wide if wide[key] != found[0][key]} >= {"dtype"}


def test_choose_follows_temperature_top_k_and_top_p():
    p_V = torch.tensor([0.05, 0.4, 0.25, 0.2, 0.1])
    logits = p_V.log().expand(20_000, 5)
    key_B = torch.arange(20_000)

    def shares(**options):
        chosen = choose(logits, key_B, GenerationSettings(**options))
        return torch.bincount(chosen, minlength=5) / 20_000

    close = {"atol": 0.015, "rtol": 0}
    torch.testing.assert_close(shares(temperature=1.0), p_V, **close)
    squared = p_V.square() / p_V.square().sum()
    torch.testing.assert_close(shares(temperature=0.5), squared, **close)
    of_three = torch.tensor([0.0, 0.4, 0.25, 0.2, 0.0]) / 0.85
    torch.testing.assert_close(shares(temperature=1.0, top_k=3), of_three, **close)
    of_two = torch.tensor([0.0, 0.4, 0.25, 0.0, 0.0]) / 0.65
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.6), of_two, **close)
    # The mass is that of what top_k has left: 0.4 of 0.85 is less than 0.5, with 0.25 it is more.
    torch.testing.assert_close(shares(temperature=1.0, top_p=0.5, top_k=3), of_two, **close)
    assert shares(temperature=0.0)[1] == 1.0


def test_keys_of_requests_differ():
    keys = {request_key(str(n)) for n in range(1000)} | {request_key(f"{n}é") for n in range(1000)}
    assert len(keys) == 2000 and min(keys) < 0 < max(keys)
    assert math.log2(max(map(abs, keys))) > 60


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens=0: allowed an integer >= 1"),
        ({"temperature": -1.0}, r"temperature=-1\.0: allowed"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"top_p": 0.0}, r"top_p=0\.0: allowed"),
        ({"top_k": -1}, "top_k=-1: allowed"),
    ],
)
def test_bad_settings(options, message):
    with pytest.raises(ValueError, match=message):
        GenerationSettings(**options)


def test_a_request_is_either_or():
    with pytest.raises(ValueError, match="request 'a': give either messages or prompt_ids"):
        GenerationRequest("a")
    with pytest.raises(ValueError, match="give either"):
        GenerationRequest("a", messages=[], prompt_ids=[])
    assert GenerationResult("a").error is None
