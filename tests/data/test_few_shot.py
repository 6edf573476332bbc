"""Few-shot prompts against texts written by hand, and items that must never be shown solved."""

import json

import pytest

from data.errors import DataError
from data.few_shot import FewShot, Prompt, fill_fields
from data.prompt_sets import TablePrompts


class Rows:
    """A table of rows."""

    libraries = ()

    def __init__(self, rows):
        self.listed = rows

    def items(self):
        yield from ((f"row {n}", row) for n, row in enumerate(self.listed))

    def fingerprint(self):
        return str(self.listed)


def prompt_set(name, *questions, expected=None, **columns):
    rows = [
        {"q": question, "a": f"{question}!", **{k: v[n] for k, v in columns.items()}}
        for n, question in enumerate(questions)
    ]
    keep = {"answer": "a", **{column: column for column in columns}}
    return TablePrompts(name, Rows(rows), "q", "Say {question}", keep=keep, expected=expected)


def made(items, exemplars=None, **options):
    options = {"template": "Q: {question}\nA:", "answer": " {answer}"} | options
    return FewShot("benchmark.toy", items, exemplars, **options)


def texts(few_shot):
    return [prompt.text for prompt in few_shot.prompts()]


def test_exemplars_of_their_own_come_before_every_item():
    shots = prompt_set("train", "one", "two", "three")
    few_shot = made(prompt_set("test", "x", "y", expected=2), shots, shots=2)
    head = "Q: one\nA: one!\n\nQ: two\nA: two!\n\n"
    assert texts(few_shot) == [head + "Q: x\nA:", head + "Q: y\nA:"]
    assert [prompt.id for prompt in few_shot.prompts()] == ["test/0", "test/1"]
    assert few_shot.expected == 2
    assert texts(made(prompt_set("test", "x"), shots)) == ["Q: x\nA:"]


def test_of_198_the_first_five_are_shown_and_193_are_asked():
    questions = [f"question {n}" for n in range(198)]
    few_shot = made(prompt_set("gpqa", *questions, expected=198), shots=5)
    prompts = few_shot.prompts()
    assert len(prompts) == few_shot.expected == 193
    assert [prompt.id for prompt in prompts] == [f"gpqa/{n}" for n in range(5, 198)]
    for prompt in prompts:
        solved = [f"Q: question {n}\nA: question {n}!" for n in range(5)]
        assert prompt.text.split("\n\n") == [*solved, f"Q: {prompt.row['question']}\nA:"]


def test_a_conversation_has_the_prompts_of_the_set():
    few_shot = made(
        prompt_set("test", "x"), prompt_set("train", "one"), shots=1, format="chat",
        instruction="Be brief.",
    )  # fmt: skip
    (prompt,) = few_shot.prompts()
    assert prompt.text is None and prompt.messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say one"},
        {"role": "assistant", "content": "one!"},
        {"role": "user", "content": "Say x"},
    ]


def test_exemplars_alike():
    shots = prompt_set("train", "1+1", "rev a", "2+2", "rev b", task=["add", "rev", "add", "rev"])
    few_shot = made(
        prompt_set("test", "rev x", "3+3", task=["rev", "add"]), shots, shots=2, alike="task",
        instruction="Solve.\n", separator="\n", template="{task}: {question} =",
    )  # fmt: skip
    assert texts(few_shot) == [
        "Solve.\nrev: rev a = rev a!\nrev: rev b = rev b!\nrev: rev x =",
        "Solve.\nadd: 1+1 = 1+1!\nadd: 2+2 = 2+2!\nadd: 3+3 =",
    ]
    few_shot.shots = 3
    with pytest.raises(DataError, match=r"2 rows of task=rev in .*\.exemplars; allowed"):
        few_shot.prompts()
    few_shot.alike = "kind"
    with pytest.raises(DataError, match=r"benchmark\.toy\.alike=kind: no field of row 'test/0'"):
        few_shot.prompts()


def test_an_item_is_never_its_own_exemplar():
    items = prompt_set("test", "one", "What is  TWO?", "three")
    with pytest.raises(DataError, match="exemplars: train/0 is item test/1 itself; allowed"):
        made(items, prompt_set("train", "what is two?"), shots=1).prompts()
    # Only what is shown matters.
    made(items, prompt_set("train", "other", "what is two?"), shots=1).prompts()
    # A table that repeats a question, of which one copy is shown.
    with pytest.raises(DataError, match="exemplars: test/0 is item test/2 itself"):
        made(prompt_set("test", "one", "two", "One"), shots=1).prompts()
    with pytest.raises(DataError, match="exemplars: test/0 is item test/0 itself"):
        made(items, prompt_set("test", "another"), shots=1).prompts()


def test_hashes_tell_exact_prompts_apart():
    row = {"id": "a"}
    prompts = [
        Prompt(row, text="a b"), Prompt(row, text="a  b"), Prompt(row, text="A b"),
        Prompt(row, messages=[{"role": "user", "content": "a b"}]), Prompt(row, text="\ud83d"),
        Prompt(row, messages=[{"role": "system", "content": "a b"}]),
    ]  # fmt: skip
    assert len({prompt.hash for prompt in prompts}) == len(prompts)
    assert Prompt({"id": "b"}, text="a b").hash == prompts[0].hash
    assert all(len(prompt.hash) == 32 for prompt in prompts)


def test_what_a_field_says_is_not_looked_at_again():
    row = {"id": "a", "question": "{answer} and {x}", "answer": 7}
    assert fill_fields(r"\boxed{} {question} {answer}", row, "k") == r"\boxed{} {answer} and {x} 7"
    with pytest.raises(DataError, match=r"k='\{choices\}': row 'a' has no field 'choices'"):
        fill_fields("{choices}", row, "k")


def test_the_fingerprint_is_of_all_that_makes_prompts():
    items, shots = prompt_set("test", "x"), prompt_set("train", "one")
    found = {
        json.dumps(made(items, exemplars, **options).fingerprint())
        for exemplars, options in [
            (None, {}), (shots, {}), (shots, {"shots": 1}), (shots, {"format": "chat"}),
            (shots, {"separator": " "}), (shots, {"instruction": "I"}), (shots, {"answer": ""}),
            (shots, {"template": "{question}"}), (shots, {"alike": "task"}),
            (prompt_set("train", "two"), {}),
        ]
    }  # fmt: skip
    assert len(found) == 10


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"format": "xml"}, r"benchmark\.toy\.format=xml: allowed: text, chat"),
        ({"shots": -1}, r"benchmark\.toy\.shots=-1: allowed"),
        ({"shots": "two"}, r"benchmark\.toy\.shots=two: allowed: an integer >= 0"),
        ({"shots": 1.5}, r"benchmark\.toy\.shots=1\.5: allowed: an integer >= 0"),
        ({"shots": True}, r"benchmark\.toy\.shots=True: allowed: an integer >= 0"),
        ({"answer": None}, r"benchmark\.toy\.answer=None: allowed: a text"),
        ({"template": None}, r"benchmark\.toy\.template=None: allowed: a text"),
        ({"separator": 3}, r"benchmark\.toy\.separator=3: allowed: a text"),
        ({"instruction": ["a"]}, r"benchmark\.toy\.instruction=\['a'\]: allowed: a text"),
        ({"alike": 3}, r"benchmark\.toy\.alike=3: allowed: a text"),
        ({"template": "no place"}, r"benchmark\.toy\.template='no place': allowed: a text with"),
        ({"alike": "task"}, r"benchmark\.toy\.alike=task: needs benchmark\.toy\.exemplars"),
        ({"shots": 3}, r"shots=3: 2 rows in benchmark\.toy\.prompts; allowed: 0 to 2"),
        ({"shots": 2}, r"benchmark\.toy\.prompts: no items are left"),
    ],
)
def test_what_is_wrong_is_named(options, message):
    with pytest.raises(DataError, match=message):
        made(prompt_set("test", "x", "y"), **options).prompts()
    with pytest.raises(DataError, match=r"shots=2: 1 rows in benchmark\.toy\.exemplars"):
        made(prompt_set("test", "x"), prompt_set("train", "one"), shots=2).prompts()
