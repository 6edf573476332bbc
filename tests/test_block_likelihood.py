"""Likelihoods of models that write blocks: sums over all blocks, and the chain rule one by one."""

import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from data.tokenization import tokenizer_state, with_mask_token
from decoding.generate import GenerationRequest, GenerationSettings
from models.backbone import architecture_of
from pretrained import PretrainedAlgorithm
from refine import DraftRefine
from runtime.config import to_plain
from tests.block_runs import configure
from tests.blocks import small_target

SIZE = 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("likelihood")


def four_words():
    backend = Tokenizer(WordLevel({"a": 0, "b": 1, "end": 2, "blank": 3}, unk_token="a"))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="end", pad_token="end", mask_token="blank"
    )


def narrow(folder, size=SIZE):
    """A model of three words and BLANK, so that all blocks can be listed."""
    config = to_plain(configure(folder, folder / "unused", "draft_refine", f"block_size={size}"))
    shape = architecture_of(small_target(num_hidden_layers=2).model)
    config["algo"]["backbone"] = {**shape, "vocab_size": 4}
    torch.manual_seed(1)
    algorithm = DraftRefine(config, tokenizer_state(with_mask_token(four_words(), 3)))
    with torch.no_grad():
        for parameter in algorithm.backbone.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, 0.3)
    assert algorithm.special.mask == 3
    return algorithm


def every(places):
    return [list(block) for block in itertools.product(range(3), repeat=places)]


def rows_of(prompt, answers):
    """A batch of one document each."""
    size = len(prompt) + len(answers[0])
    ids = torch.tensor([[*prompt, *answer] for answer in answers])
    response = torch.tensor([[0] * len(prompt) + [1] * (size - len(prompt))]).expand(len(ids), -1)
    batch = {"input_ids": ids, "segment": torch.zeros_like(ids), "response": response}
    return batch | {"index": torch.arange(len(ids))}


@pytest.mark.parametrize("prompt", [[1, 0, 2, 2], [1, 0, 2, 2, 0]])
def test_the_likelihoods_of_all_blocks_sum_to_one(folder, prompt):
    """A whole block behind a prompt, and what a prompt has left of one."""
    algorithm = narrow(folder)
    answers = every(8 - len(prompt))
    batch = rows_of(prompt, answers)
    found = algorithm.evaluate({**batch, "layout": algorithm.layout(batch)}, 0)
    p = (-found.nll).exp()
    assert len(p) == 3 ** (8 - len(prompt)) and p.sum().item() == pytest.approx(1.0, abs=1e-5)
    assert p.max() > 3 * p.min() and (found.tokens == 8 - len(prompt)).all()
    few = [0, 7, 20]
    scored = algorithm.loglikelihood([(prompt, answers[n]) for n in few])
    for n, (nats, _) in zip(few, scored, strict=True):
        assert nats == pytest.approx(-float(found.nll[n]), rel=1e-5)


def test_what_stands_behind_an_answer_is_summed_over(folder):
    """The last block is filled up with places to write, which the likelihood leaves out."""
    algorithm = narrow(folder)
    p = [
        math.exp(nats) for nats, _ in algorithm.loglikelihood([([1, 0, 2, 2], a) for a in every(3)])
    ]
    assert sum(p) == pytest.approx(1.0, abs=1e-5)
    whole = [
        math.exp(nats)
        for nats, _ in algorithm.loglikelihood(
            [([1, 0, 2, 2], [0, 2, 1, last]) for last in range(3)]
        )
    ]
    assert sum(whole) == pytest.approx(p[every(3).index([0, 2, 1])], rel=1e-5)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_chain_rule_one_token_after_the_other(folder, size):
    """Blocks of one token are a causal model that is asked at a BLANK behind the text, and with
    larger ones each place is asked with BLANKs up to the end of its block."""
    algorithm = narrow(folder, size)
    tokens, prompt = [1, 0, 2, 2, 0, 1, 1, 2], 3
    wanted = 0.0
    for place in range(prompt, len(tokens)):
        end = place // size * size + size
        ids = torch.tensor([[*tokens[:place], *[3] * (end - place)]])
        block = torch.arange(end) // size
        bias = torch.zeros(end, end).masked_fill(block[:, None] < block[None], -torch.inf)
        algorithm.backbone.model.set_attn_implementation("eager")
        with torch.no_grad():
            logits = algorithm.backbone.model(ids, attention_mask=bias[None, None]).logits[0, place]
            if size == 1:
                algorithm.backbone.model.set_attn_implementation("sdpa")
                causal = algorithm.backbone.model(ids).logits[0, place]
                torch.testing.assert_close(causal, logits, rtol=1e-4, atol=1e-5)
        wanted += float(logits[:3].log_softmax(-1)[tokens[place]])
    algorithm.backbone.model.set_attn_implementation("block_pattern")
    [(nats, _)] = algorithm.loglikelihood([(tokens[:prompt], tokens[prompt:])])
    assert nats == pytest.approx(wanted, rel=1e-5)
    # It is no likelihood of the causal model itself, which predicts from the token before.
    [(causal, _)] = PretrainedAlgorithm.loglikelihood(
        algorithm, [(tokens[:prompt], tokens[prompt:])]
    )
    assert abs(causal - nats) > 0.01


def test_greedy_is_what_refinement_writes(folder):
    algorithm = narrow(folder)
    prompt = [1, 0, 2, 2, 0]
    settings = GenerationSettings(max_new_tokens=3, stop_ids=())
    generator = algorithm.generator(settings, device="cpu")
    [result] = generator.generate([GenerationRequest("a", prompt_ids=prompt)])
    pairs = [(prompt, answer) for answer in every(3)]
    greedy = [
        answer
        for answer, (_, best) in zip(every(3), algorithm.loglikelihood(pairs), strict=True)
        if best
    ]
    assert greedy == [result.token_ids]


def test_a_likelihood_without_a_prompt_begins_behind_an_end(folder):
    algorithm = narrow(folder)
    [(nats, _)] = algorithm.loglikelihood([([], [0, 1, 2])])
    [(same, _)] = algorithm.loglikelihood([([algorithm.special.eos], [0, 1, 2])])
    assert nats == same
