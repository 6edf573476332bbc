"""The harness's view of a model: what it is told equals what transformers computes plainly."""

import contextlib
from dataclasses import replace

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -r requirements-extra.txt")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from data.errors import DataError
from decoding.generate import GenerationResult
from decoding.likelihood import CausalScores
from decoding.local import LocalGenerator
from evaluation.harness import NAME, HarnessModel, Respondent
from evaluation.harness_run import HarnessOptions, load_tasks, numbers, run_tasks
from models.tiny_causal import tiny_causal
from tests.evaluation.harness_tasks import NAMES, write_tasks

LONGEST = 64
TARGET = tiny_causal(
    num_hidden_layers=2, hidden_size=32, max_position_embeddings=LONGEST, dtype="float64"
)


@contextlib.contextmanager
def silent(description, unit, total):
    done = []
    yield done.append
    assert sum(done) == total, "the bar ends where it should"


def respondent():
    return Respondent(
        name="a/model",
        tokenizer=TARGET.tokenizer,
        make_generator=lambda settings: LocalGenerator(TARGET, settings, batch_size=3),
        scores=CausalScores(TARGET, batch_size=3),
        max_positions=TARGET.max_positions,
        max_pair=TARGET.max_positions + 1,
        stop_ids=TARGET.stop_ids,
    )


def harness_model(**changes):
    return HarnessModel(replace(respondent(), **changes), silent, batch_size=4, seed=5)


def requests(kind, arguments, repeats=1):
    found = [
        Instance(kind, {}, given, 0, metadata=("task", number, repeats))
        for number, given in enumerate(arguments)
    ]
    return [one for one in found for _ in range(repeats)]


def ids(text):
    return TARGET.tokenizer.encode(text)


@torch.no_grad()
def plain_answer(context, new_tokens):
    answer = TARGET.model.generate(
        torch.tensor([ids(context)]), max_new_tokens=new_tokens, do_sample=False
    )
    return TARGET.tokenizer.decode(answer[0, len(ids(context)) :], skip_special_tokens=True)


@torch.no_grad()
def plain_likelihood(read, predicted):
    """Sum of log p of the last tokens, where `read` ends one token before they do."""
    logits = TARGET.model(torch.tensor([read])).logits[0, -len(predicted) :].log_softmax(-1)
    target = torch.tensor(predicted)
    value = logits.gather(-1, target[:, None]).sum()
    return float(value), bool((logits.argmax(-1) == target).all())


CONTEXTS = ["a", "a longer question?", "mid one", "the longest of all of them: so"]


def test_answers_are_those_of_generate_in_the_order_of_the_requests():
    whole = [plain_answer(context, 16) for context in CONTEXTS]
    # A character that is in one of the answers, and one that is in none.
    stop = next(char for char in whole[1][3:] if char.isascii())
    options = {"until": [stop, "nowhere to be found"], "max_gen_toks": 16}
    found = harness_model().generate_until(
        requests("generate_until", [(context, options) for context in CONTEXTS])
    )
    assert found == [text.split(stop)[0] for text in whole]
    assert found[1] != whole[1]


def test_every_request_has_its_own_options():
    lengths = [4, 9, 4, 6]
    arguments = [(c, {"max_gen_toks": n}) for c, n in zip(CONTEXTS, lengths, strict=True)]
    model = harness_model()
    found = model.generate_until(requests("generate_until", arguments))
    assert found == [plain_answer(c, n) for c, n in zip(CONTEXTS, lengths, strict=True)]
    assert [model.notes["task", n][0]["num_tokens"] for n in range(4)] == lengths
    assert model.notes["task", 0] == [{"num_tokens": 4, "finish": "length", "work": {"nfe": 4.0}}]


def test_sampled_answers_differ_between_repeats_but_not_between_runs_and_neighbours():
    options = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 12}
    asked = requests("generate_until", [(c, options) for c in CONTEXTS], repeats=2)
    first = harness_model().generate_until(asked)
    assert first == harness_model().generate_until(asked)
    assert first[:2] == harness_model().generate_until(asked[:2])
    assert len({first[0], first[1], plain_answer(CONTEXTS[0], 12)}) == 3


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {"temperature": 0.0, "max_new_tokens": 256}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0.0}),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 4}, {"temperature": 0.7, "top_p": 0.9}),
        ({"do_sample": True}, {"temperature": 1.0, "top_p": 1.0, "top_k": 0}),
        ({"max_new_tokens": 7, "num_beams": 1}, {"max_new_tokens": 7}),
        ({"until": "x", "max_length": None}, {"stop_strings": ("x",), "stop_ids": (2,)}),
        ({"until": ["", "x", "x"]}, {"stop_strings": ("x",), "seed": 5}),
        # It is a token: nowhere in the text, but known by its number.
        ({"until": ["<|im_start|>"]}, {"stop_ids": (1, 2)}),
    ],
)
def test_options_of_a_task_become_settings(options, expected):
    asked = []

    class Recorded(LocalGenerator):
        def generate(self, incoming):
            return (GenerationResult(one.id) for one in incoming)

    def make(settings):
        asked.append(settings)
        return Recorded(TARGET, settings)

    model = harness_model(make_generator=make, max_positions=1000)
    model.generate_until(requests("generate_until", [("a", options)]))
    assert {key: getattr(asked[0], key) for key in expected} == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 4}, "generation_kwargs num_beams=4: not to be had here; allowed: do_sample"),
        ({"max_gen_toks": 64}, "max_gen_toks=64: model=a/model has 64 positions"),
    ],
)
def test_options_that_cannot_be_had_are_refused(options, message):
    with pytest.raises(DataError, match=message):
        harness_model().generate_until(requests("generate_until", [("a", options)]))


def test_long_prompts_lose_their_beginning_and_are_counted():
    long = "".join(chr(97 + n % 26) for n in range(100))
    model = harness_model()
    found = model.generate_until(
        requests("generate_until", [(long, {"max_gen_toks": 10}), ("ab", {"max_gen_toks": 10})])
    )
    assert found == [plain_answer(long[-54:], 10), plain_answer("ab", 10)]
    assert model.counts == {"truncated": 1, "failed": 0}
    ((value, _),) = model.loglikelihood(requests("loglikelihood", [(long, " so")]))
    expected, _ = plain_likelihood(ids(long + " so")[-65:][:-1], ids(" so"))
    assert value == pytest.approx(expected, abs=1e-5)
    assert model.counts["truncated"] == 2


def test_requests_without_an_answer_are_counted():
    class Broken(LocalGenerator):
        def generate(self, incoming):
            return (GenerationResult(one.id, error="no room") for one in incoming)

    model = harness_model(make_generator=lambda settings: Broken(TARGET, settings))
    asked = requests("generate_until", [("a", {"max_gen_toks": 4})])
    assert model.generate_until(asked) == [""]
    assert model.counts["failed"] == 1 and model.notes["task", 0][0]["error"] == "no room"


@pytest.mark.parametrize("repeats", [1, 2])
def test_what_only_makes_ranks_even_is_neither_asked_nor_counted(repeats):
    """The last request comes beyond its repeats, as lm_eval's `evaluate` pads a rank."""
    long = "".join(chr(97 + n % 26) for n in range(100))
    options = {"do_sample": True, "temperature": 2.0, "max_gen_toks": 10}
    asked = requests("generate_until", [("ab", options), (long, options)], repeats)
    model, plain = harness_model(), harness_model()
    expected = plain.generate_until(asked)
    found = model.generate_until([*asked, *[asked[-1]] * 3])
    assert found == [*expected, *[expected[-1]] * 3]
    assert model.notes == plain.notes and len(model.notes["task", 1]) == repeats
    assert model.counts == plain.counts == {"truncated": repeats, "failed": 0}
    asked = requests("loglikelihood", [("a", " b"), (long, " so")], repeats)
    expected = plain.loglikelihood(asked)
    assert model.loglikelihood([*asked, *[asked[-1]] * 3]) == [*expected, *[expected[-1]] * 3]
    assert model.counts == plain.counts == {"truncated": 2 * repeats, "failed": 0}
    texts = requests("loglikelihood_rolling", [("a text",), (long,)], repeats)
    expected = plain.loglikelihood_rolling(texts)
    assert model.loglikelihood_rolling([*texts, texts[-1]]) == [*expected, expected[-1]]


def test_likelihoods_of_continuations():
    greedy = plain_answer("abc", 1)
    pairs = [("a question:", f" {word}") for word in ("yes", "no", "maybe so", "y")]
    # Without a context the end of a text stands before; a space at the end moves to what follows.
    pairs += [("", "begin"), ("with space ", "x"), ("abc", greedy)]
    found = harness_model().loglikelihood(requests("loglikelihood", pairs))
    for (value, is_greedy), (context, continuation) in zip(found, pairs, strict=True):
        before = ids(context.rstrip()) or [TARGET.tokenizer.eos_token_id]
        after = ids(context[len(context.rstrip()) :] + continuation)
        expected = plain_likelihood([*before, *after][:-1], after)
        assert value == pytest.approx(expected[0], abs=1e-5) and is_greedy == expected[1]
    assert found[-1][1] and not all(is_greedy for _, is_greedy in found)
    with pytest.raises(DataError, match=r"continuation 'x{40}': 70 tokens; allowed 1"):
        harness_model().loglikelihood(requests("loglikelihood", [("a", "x" * 70)]))


def test_rolling_likelihoods_predict_every_token_once():
    texts = ["short", "".join(chr(97 + n * n % 26) for n in range(150)), ""]
    found = harness_model().loglikelihood_rolling(
        requests("loglikelihood_rolling", [(text,) for text in texts])
    )
    end = TARGET.tokenizer.eos_token_id
    tokens = ids(texts[1])
    windows = [
        ([end, *tokens[:63]], tokens[:64]),
        (tokens[63:127], tokens[64:128]),
        # The last window is full of context; 22 tokens are new.
        (tokens[85:149], tokens[128:]),
    ]
    expected = sum(plain_likelihood(read, new)[0] for read, new in windows)
    short, _ = plain_likelihood([end, *ids("short")][:-1], ids("short"))
    assert found == pytest.approx([short, expected, 0.0], abs=1e-5)


def test_prompts_of_chats():
    model = harness_model()
    turns = [{"role": "user", "content": "hi"}]
    assert model.apply_chat_template(turns) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    )
    assert model.tokenizer_name == "a__model" and model.chat_template(True) is not None
    template, TARGET.tokenizer.chat_template = TARGET.tokenizer.chat_template, None
    try:
        with pytest.raises(
            DataError, match=r"no chat template; allowed: mode\.apply_chat_template"
        ):
            model.apply_chat_template(turns)
    finally:
        TARGET.tokenizer.chat_template = template


def test_the_harness_knows_it_by_name_and_one_process_is_all():
    model = harness_model()
    assert get_model(NAME) is HarnessModel
    assert (model.rank, model.world_size, model.gather_object("x")) == (0, 1, ["x"])


def test_whole_tasks_give_what_the_harness_finds_by_its_own_reading_of_the_model(tmp_path):
    """HFLM of lm_eval runs the same weights through code of its own."""
    reference = get_model("hf")(
        pretrained=TARGET.model, tokenizer=TARGET.tokenizer, batch_size=1, max_length=LONGEST
    )
    folder = str(write_tasks(tmp_path))
    found = []
    for model in (reference, harness_model()):
        results = run_tasks(model, load_tasks(NAMES, folder), HarnessOptions())
        answers = {
            task: [row["filtered_resps"] for row in rows]
            for task, rows in results["samples"].items()
        }
        found.append((numbers(results), answers))
    (theirs, their_answers), (ours, our_answers) = found
    assert [(n.task, n.metric, n.items) for n in ours] == [
        ("own_answers", "exact_match", 6), ("own_choices", "acc", 6),
        ("own_texts", "bits_per_byte", 3),
    ]  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        assert a.value == pytest.approx(b.value, abs=1e-6) and a.stderr == b.stderr
    assert our_answers["own_answers"] == their_answers["own_answers"]
    for name in ("own_choices", "own_texts"):
        assert flat(our_answers[name]) == pytest.approx(flat(their_answers[name]), abs=1e-4)


def flat(values):
    if isinstance(values, list | tuple):
        return [one for value in values for one in flat(value)]
    return [float(values)]
