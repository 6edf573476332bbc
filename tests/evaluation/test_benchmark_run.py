"""Asking and counting: every item once, whatever the generator does."""

import pytest

from data.errors import DataError
from data.few_shot import Prompt
from data.journal import Journal
from data.prompt_sets import TablePrompts
from decoding.generate import GenerationResult, GenerationSettings
from evaluation.benchmark import Benchmark
from evaluation.benchmark_run import Answered, answer_prompts, item_row, score, with_verdict
from evaluation.statistics import wilson_interval
from tests.plugins.toy_benchmark import LastWord, LastWordGrader


def prompts(*names, text="ask {}"):
    return [Prompt({"id": name, "answer": name}, text=text.format(name)) for name in names]


class Echo:
    """Answers in reverse order, by the last word; "bad" has no answer."""

    def __init__(self):
        self.asked = []

    def generate(self, requests):
        requests = list(requests)
        self.asked += requests
        for request in reversed(requests):
            if request.id == "bad":
                yield GenerationResult(request.id, error="no room")
            else:
                work = {"nfe": 2.0, "flips": 1.0}
                yield GenerationResult(
                    request.id, f"it is {request.id}", num_tokens=4, finish="stop", work=work
                )


def ask(path, asked, generator, encode=None):
    ticks = []
    with Journal(path) as journal:
        fresh = answer_prompts("toy", asked, generator, journal, encode, ticks.append)
        rows = [
            item_row("toy", one, journal.read(one.id) if one.id in journal else None,
                     fresh.errors.get(one.id))
            for one in asked
        ]  # fmt: skip
    return fresh, rows, sum(ticks)


def test_rows_have_all_that_is_known(tmp_path):
    def encode(text):
        if text.endswith("odd"):
            raise ValueError("no Unicode text")
        return [0] * len(text)

    echo = Echo()
    fresh, rows, ticks = ask(tmp_path / "a.jsonl", prompts("a", "bad", "odd", "b"), echo, encode)
    assert [request.id for request in echo.asked] == ["a", "bad", "b"]
    assert [len(request.prompt_ids) for request in echo.asked] == [5, 7, 5]
    assert rows[0] == {
        "id": "a", "task": "toy", "prompt_hash": prompts("a")[0].hash, "num_prompt_tokens": 5,
        "text": "it is a", "num_tokens": 4, "finish": "stop", "work": {"nfe": 2.0, "flips": 1.0},
        "error": None,
    }  # fmt: skip
    assert [row["error"] for row in rows] == [None, "no room", "no Unicode text", None]
    assert rows[1]["text"] == "" and rows[1]["work"] is None and rows[1].keys() == rows[0].keys()
    assert fresh.tokens == 8 and ticks == 4


def test_what_is_answered_is_not_asked_again_and_what_failed_is(tmp_path):
    path, echo = tmp_path / "a.jsonl", Echo()
    ask(path, prompts("a", "bad"), echo)
    assert [request.prompt for request in echo.asked] == ["ask a", "ask bad"]
    echo.asked.clear()
    fresh, rows, ticks = ask(path, prompts("a", "bad", "b"), echo)
    assert [request.id for request in echo.asked] == ["bad", "b"]
    assert (fresh.tokens, ticks, list(fresh.errors)) == (4, 2, ["bad"]) and rows[0]["error"] is None
    with pytest.raises(DataError, match="'a' was answered under another prompt; allowed"):
        ask(path, prompts("a", text="other {}"), echo)


def test_a_conversation_is_asked_as_it_is(tmp_path):
    turns, echo = [{"role": "user", "content": "Hi"}], Echo()
    ask(tmp_path / "a.jsonl", [Prompt({"id": "a"}, messages=turns)], echo, encode=len)
    assert echo.asked[0].messages == turns and echo.asked[0].prompt_ids is None


def test_a_score_by_hand():
    def row(right, tokens=4, finish="stop", work=None, error=None):
        row = {"num_tokens": tokens, "finish": finish, "work": work, "error": error}
        return with_verdict(row, None if error else LastWord(right, "x", "r"))

    rows = [
        row(True, 8, work={"nfe": 2.0, "flips": 3.0}), row(True, 4, work={"nfe": 4.0}),
        row(False, 9, "length"), row(True, 0, "", error="gone"),
    ]  # fmt: skip
    assert rows[3] | {"extracted": None, "correct": False, "reason": "no answer"} == rows[3]
    found = score(rows, 5, Answered({}, 30, 2.0))
    low, high = wilson_interval(2, 4)
    assert (found.items, found.correct, found.accuracy, found.expected) == (4, 2, 0.5, 5)
    assert (found.low, found.high, found.errors, found.capped) == (low, high, 1, 1)
    assert (found.capped_rate, found.tokens, found.tokens_per_s) == (0.25, 21, 15.0)
    assert (found.nfe, found.tokens_per_forward, found.work) == (3.0, 2.0, {"flips": 3.0})
    bare = score([row(False)], None, Answered({}, 0, 0.0))
    assert bare.nfe is bare.tokens_per_forward is bare.tokens_per_s is None


class Table:
    libraries = ()

    def items(self):
        yield from (("here", {"q": text, "a": "x"}) for text in ("one", "two", "three"))

    def fingerprint(self):
        return "t"


def benchmark(**options):
    prompt_set = TablePrompts("set", Table(), "q", keep={"answer": "a"})
    given = {"grader": LastWordGrader(), "prompts": prompt_set, "max_new_tokens": 9} | options
    return Benchmark("toy", **given)


def test_a_benchmark_ends_answers_and_counts_items():
    made = benchmark(stop=["\n"], limit=2)
    base = GenerationSettings(temperature=0.5, seed=3)
    found = made.settings(base)
    assert (found.max_new_tokens, found.stop_strings, found.temperature) == (9, ("\n",), 0.5)
    assert len(made.make_prompts(1)) == 2 and len(benchmark().make_prompts(1)) == 1
    assert len(benchmark().make_prompts()) == 3
    # A conversation ends by itself.
    assert benchmark(stop=["\n"], format="chat").stop == ()
    conditions = made.conditions(base)
    assert conditions["settings"]["seed"] == 3
    assert made.conditions(GenerationSettings(seed=3))["settings"]["seed"] is None
    assert benchmark(stop=["\n"]).conditions(base) == conditions
    assert benchmark(stop=["x"]).conditions(base) != conditions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, r"benchmark\.toy\.max_new_tokens=0: allowed: an integer >= 1"),
        ({"limit": 0}, r"benchmark\.toy\.limit=0: allowed"),
        ({"stop": ["a", ""]}, r"benchmark\.toy\.stop=\['a', ''\]: allowed: a list of texts"),
        ({"stop": "Question:"}, r"benchmark\.toy\.stop=Question:: allowed: a list of texts"),
        ({"stop": None}, r"benchmark\.toy\.stop=None: allowed: a list of texts"),
        ({"max_new_tokens": "abc"}, r"toy\.max_new_tokens=abc: allowed: an integer >= 1"),
        ({"max_new_tokens": None}, r"toy\.max_new_tokens=None: allowed: an integer >= 1"),
        ({"limit": True}, r"toy\.limit=True: allowed: an integer >= 1"),
        ({"limit": 1.5}, r"toy\.limit=1\.5: allowed: an integer >= 1"),
        ({"grader": {"a": 1}}, r"toy\.grader=\{'a': 1\}: allowed: a choice of the group grader"),
        ({"shots": -1}, r"benchmark\.toy\.shots=-1: allowed"),
    ],
)
def test_impossible_benchmarks(options, message):
    with pytest.raises(DataError, match=message):
        benchmark(**options)
