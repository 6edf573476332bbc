"""Two-stage rollouts of generators: an HTTP server, and ones that answer by the book or not."""

import logging
from dataclasses import replace

import pytest
import torch

from decoding.generate import GenerationResult
from decoding.local import LocalGenerator
from decoding.rollout_record import RolloutSettings
from decoding.rollout_server import ERROR, GeneratorRollouts, ServerRollouts, stage_settings
from models.tiny_causal import tiny_causal
from objectives.token_log_probs import token_log_probs
from tests.decoding.servers import answer_server

OPEN, CLOSE, END = ord("("), ord("X"), ord(".")
SETTINGS = RolloutSettings(OPEN, CLOSE, (END,), 6, 9)
ONE = [("a", [5, OPEN])]


class Scripted:
    """Answers by the id of the request; what it has no answer for fails. The last comes first."""

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def identity(self):
        return {}

    def generate(self, requests):
        self.asked = list(requests)
        for request in reversed(self.asked):
            found = self.answers.get(request.id.replace("/", "_"))
            if found is None:
                yield GenerationResult(request.id, error="HTTP 500: no")
            elif isinstance(found, dict):
                yield GenerationResult(request.id, "x", finish="stop", **found)
            else:
                ids, finish = found
                logprobs = [-0.5 - n for n in range(len(ids))]
                yield GenerationResult(request.id, "x", ids, logprobs, len(ids), finish)


def rolled(thoughts, suffixes, samples=1, prompts=ONE, settings=SETTINGS, **options):
    return GeneratorRollouts(thoughts, suffixes, settings, **options).sample(prompts, samples)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with answer_server(tmp_path_factory.mktemp("rollouts")) as running:
        yield running


def behind(server, settings=SETTINGS, **options):
    fast = {"retries": 1, "backoff_s": 0.0, "max_failures": 100, "sync": "none", **options}
    return ServerRollouts(server.url, "toy", **fast).rollouts(settings)


def test_a_server_is_asked_in_two_stages(server):
    """It answers in capitals, and does not stop by itself."""
    first, second = behind(server, replace(SETTINGS, seed=3)).sample(
        [("p", list(b"ab x(")), ("q", list(b"cdefghij("))], 1
    )
    assert (first.prefix_id, first.k, bytes(first.thought_ids)) == ("p", 0, b"AB ")
    assert first.closed_autonomously and first.thought_finish == "stop"
    assert first.thought_logprobs == [-0.5] * 4 and first.boundary_ids == [CLOSE]
    assert bytes(first.suffix_ids) == b"AB X(AB X" and first.suffix_finish == "length"
    assert bytes(second.thought_ids) == b"CDEFGH" and second.thought_finish == "length"
    assert not second.closed_autonomously and second.boundary_ids == [CLOSE]
    assert second.chosen() == [True] * 6 + [False] + [True] * 9
    assert len(second.logprobs()) == sum(second.chosen())
    bodies = server.seen("bodies")
    thought, suffix = bodies["ab x("], bodies["ab x(AB X"]
    assert suffix["prompt"] == list(b"ab x(AB X"), "the boundary is appended"
    assert (thought["stop_token_ids"], suffix["stop_token_ids"]) == ([CLOSE, END], [END])
    assert (thought["max_tokens"], suffix["max_tokens"]) == (6, 9)
    assert thought["seed"] != suffix["seed"], "draws of their own"


def test_seeds_depend_on_step_prefix_and_number(server):
    def seed(name, step, k):
        behind(server, replace(SETTINGS, seed=step)).sample([(name, list(b"seed("))], k + 1)
        return server.seen("bodies")["seed("]["seed"]

    seeds = [seed("p", 1, 0), seed("q", 1, 0), seed("p", 2, 0)]
    assert len({*seeds}) == 3 and seed("p", 1, 0) == seeds[0]


def test_one_sample_without_an_answer_ends_the_call_or_is_marked(server, caplog):
    prompts = [("good", list(b"fine(")), ("bad", list(b"500 b("))]
    with pytest.raises(ValueError, match=r"1 of 2 samples .* bad/0: HTTP 500.*max_failed=0\.0"):
        behind(server).sample(prompts, 1)
    with caplog.at_level(logging.WARNING):
        good, bad = behind(server, max_failed=0.5).sample(prompts, 1)
    assert "1 of 2 samples got no answer; sample bad/0: HTTP 500" in caplog.text
    assert good.suffix_finish == "length" and len(good.suffix_ids) == 9
    assert bad.suffix_finish == bad.thought_finish == ERROR
    assert bad.sampled_ids == [CLOSE] and bad.chosen() == [False] and bad.logprobs() == []


def test_answers_come_in_any_order():
    thoughts = Scripted(a_0=([1, 2, CLOSE], "stop"), a_1=([3, CLOSE], "stop"))
    suffixes = Scripted(a_0_suffix=([4, END], "stop"), a_1_suffix=([5] * 9, "length"))
    first, second = rolled(thoughts, suffixes, 2)
    assert first.sampled_ids == [1, 2, CLOSE, 4, END]
    assert first.logprobs() == [-0.5, -1.5, -2.5, -0.5, -1.5]
    assert second.sampled_ids == [3, CLOSE, *[5] * 9]
    assert [one.suffix_finish for one in (first, second)] == ["stop", "length"]
    assert [r.prompt_ids for r in suffixes.asked] == [[5, OPEN, 1, 2, CLOSE], [5, OPEN, 3, CLOSE]]


def test_a_stop_token_that_the_server_keeps_was_not_chosen():
    """Nobody knows its probability, so nothing is learned from it."""
    (one,) = rolled(Scripted(a_0=([1, 2], "stop")), Scripted(a_0_suffix=([4], "stop")))
    assert one.thought_finish == one.suffix_finish == "stop" and not one.closed_autonomously
    assert one.sampled_ids == [1, 2, CLOSE, 4] and one.chosen() == [True, True, False, True]


def test_an_end_token_ends_a_thought_and_stays():
    (one,) = rolled(Scripted(a_0=([1, END, 9, 9], "length")), Scripted(a_0_suffix=([4], "stop")))
    assert one.thought_ids == [1, END] and not one.closed_autonomously
    assert one.thought_finish == "stop" and len(one.thought_logprobs) == 2


@pytest.mark.parametrize(
    "answer",
    [
        {"token_ids": None, "logprobs": [-1.0]},
        {"token_ids": [1], "logprobs": None},
        {"token_ids": [1], "logprobs": [-1.0], "retokenised": True},
    ],
    ids=["tokens", "logprobs", "retokenised"],
)
def test_answers_that_nothing_can_be_learned_from_are_refused(answer):
    with pytest.raises(ValueError, match=r"request 'a/0': .* \(vLLM, SGLang\)"):
        rolled(Scripted(a_0=answer), Scripted())


def test_a_forbidden_token_is_a_failure():
    forbidden = torch.arange(300) == 7
    suffixes = Scripted(a_0_suffix=([7], "stop"), a_1_suffix=([8], "stop"))
    thoughts = Scripted(a_0=([1], "length"), a_1=([2], "length"))
    bad, good = rolled(thoughts, suffixes, 2, forbidden_V=forbidden, max_failed=0.5)
    assert bad.suffix_finish == ERROR and bad.logprobs() == [] and good.suffix_ids == [8]
    with pytest.raises(ValueError, match="token 7, which is forbidden"):
        rolled(thoughts, suffixes, 2, forbidden_V=forbidden)


def test_thoughts_that_are_given_or_none():
    suffixes = Scripted(a_0_suffix=([4], "stop"), a_3_suffix=([6], "stop"))
    plain = GeneratorRollouts(Scripted(), suffixes, SETTINGS)
    (given,) = plain.continue_thoughts(ONE, [[20, 21]], [3])
    assert given.sampled_ids == [20, 21, CLOSE, 6] and given.chosen() == [False] * 3 + [True]
    assert given.k == 3 and given.thought_logprobs is None
    (free,) = plain.continuations([("a", [5])], 1)
    assert free.sampled_ids == [4] and free.boundary_ids == []
    (empty,) = rolled(Scripted(), suffixes, settings=replace(SETTINGS, thought_tokens=0))
    assert empty.sampled_ids == [CLOSE, 4] and empty.thought_logprobs == []
    with pytest.raises(ValueError, match=r"prefix 'b': ends with token \[5\]"):
        plain.sample([("b", [5])], 1)


def test_log_probabilities_are_the_generator_s_own():
    """Answered by a model in this process, they are those of one pass without a cache."""
    target = tiny_causal(extra_tokens=["<think>", "</think>"])
    settings = RolloutSettings(260, 261, target.stop_ids, 5, 6)
    stages = [LocalGenerator(target, one, device="cpu") for one in stage_settings(settings)]
    for one in GeneratorRollouts(*stages, settings).sample([("a", [5, 6, 260])], 3):
        tokens = torch.tensor(one.prompt_ids + one.sampled_ids)
        chosen = torch.tensor(one.chosen()).nonzero()[:, 0] + len(one.prompt_ids)
        with torch.no_grad():
            hidden = target.model.base_model(input_ids=tokens[None]).last_hidden_state[0]
            head = target.model.get_output_embeddings()
            again = token_log_probs(hidden[chosen - 1], head, tokens[chosen])
        torch.testing.assert_close(again, torch.tensor(one.logprobs()), atol=1e-4, rtol=0)


def test_what_a_server_cannot_tell_is_not_sampled(server):
    nucleus = replace(SETTINGS, top_p=0.9)
    with pytest.raises(ValueError, match=r"top_p=0\.9: .* algo\.sampler\.processed_logprobs=true"):
        behind(server, nucleus)
    assert behind(server, nucleus, processed_logprobs=True).settings is nucleus
    with pytest.raises(ValueError, match="max_failed=2: allowed"):
        behind(server, max_failed=2)
    with pytest.raises(ValueError, match=r"algo\.sampler\.sync=sometimes: allowed none"):
        behind(server, sync="sometimes")


def test_a_server_that_keeps_its_weights_is_warned_of_once(server, caplog):
    sampler = ServerRollouts(server.url, "toy", "none")
    with caplog.at_level(logging.WARNING):
        sampler.follow(torch.nn.Linear(1, 1))
        sampler.follow(torch.nn.Linear(1, 1))
        sampler.close()
    assert caplog.text.count("algo.sampler.sync=none: the server keeps its weights") == 1
