"""What a folder of answers keeps, what it refuses, and what is read from it."""

import json

import pytest

from data.errors import DataError
from decoding.local import LocalGenerator
from modes import benchmark_table
from modes.benchmark_eval import run
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.benchmark_runs import GYM, TINY, configured, gsm8k_files, rows_of
from tests.support import compose_config

pytest.importorskip("reasoning_gym", reason="needs the package reasoning_gym")

GSM8K = "benchmark.gsm8k"


def gsm8k(folder, *overrides):
    """The configuration of GSM8K alone, from the files of `gsm8k_files`."""
    cfg = compose_config(
        "mode=benchmark_eval", "benchmark=gsm8k", *gsm8k_files(folder), *TINY, "mode.limit=2",
        *overrides, run_dir=folder / "run",
    )  # fmt: skip
    validate(cfg)
    return cfg


def change(path, number, **fields):
    rows = rows_of(path)
    rows[number] |= fields
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_item_that_cannot_be_judged_is_told_before_anything_is_answered(tmp_path, monkeypatch):
    cfg = gsm8k(tmp_path, "mode.limit=5")
    change(tmp_path / "test.jsonl", 3, answer=18)
    monkeypatch.setattr(LocalGenerator, "generate", None)
    with pytest.raises(DataError, match=r"gsm8k\.prompts: item 'gsm8k/3': answer=18; allowed: a"):
        run(cfg)
    assert not (tmp_path / "run").exists()


def test_a_mended_answer_is_judged_anew_without_another_question(tmp_path, monkeypatch):
    cfg = gsm8k(tmp_path)
    assert run(cfg)["benchmark/gsm8k/correct"] == 0
    answered = (tmp_path / "run" / "partial.jsonl").read_bytes()
    said = [row["extracted"] for row in rows_of(tmp_path / "run" / "items.jsonl")]
    for number, last in enumerate(said):
        change(tmp_path / "test.jsonl", number, answer=last or "nothing")
    with monkeypatch.context() as patch:
        patch.setattr(LocalGenerator, "_prefill", None)
        assert run(cfg)["benchmark/gsm8k/correct"] == sum(last is not None for last in said) > 0
    assert (tmp_path / "run" / "partial.jsonl").read_bytes() == answered
    change(tmp_path / "test.jsonl", 1, question="What else?")
    with pytest.raises(
        ConfigError, match=r"gsm8k was begun with prompts\.items\.table=\"\w+\", now"
    ):
        run(cfg)


def test_results_of_other_benchmarks_stay(tmp_path):
    folder = tmp_path / "run"
    first = run(configured(folder, "mode.limit=2"))
    before = json.loads((folder / "benchmark.json").read_text())["benchmarks"]
    metrics = run(gsm8k(tmp_path))
    assert {key.split("/")[1] for key in metrics} == {"gsm8k"}
    content = (folder / "items.jsonl").read_bytes()
    assert [row["task"] for row in rows_of(folder / "items.jsonl")] == (
        ["reasoning_gym"] * 2 + ["gsm8k"] * 2
    )
    found = json.loads((folder / "benchmark.json").read_text())["benchmarks"]
    assert list(found) == ["reasoning_gym", "gsm8k"]
    assert found["reasoning_gym"] == before["reasoning_gym"]
    lines = (folder / "benchmark.md").read_text().splitlines()
    assert [line.split()[1] for line in lines if line.startswith("| ")][1:] == ["---", *found]
    # Asked again, a benchmark keeps its place.
    again = run(configured(folder, "mode.limit=2"))
    assert again.keys() < first.keys() and (folder / "items.jsonl").read_bytes() == content
    results = benchmark_table.read_run(folder).results
    assert [(name, one.items) for name, one in results.items()] == [
        ("reasoning_gym", 2), ("gsm8k", 2),
    ]  # fmt: skip


def test_benchmarks_of_one_folder_are_of_one_model(tmp_path):
    run(configured(tmp_path / "run", "mode.limit=1"))
    other = gsm8k(tmp_path, "model.seed=3")
    begun = r"reasoning_gym was begun with model\.fingerprint=\"\w+\", now \"\w+\"; allowed"
    with pytest.raises(ConfigError, match=begun):
        run(other)
    # Without its answers, its result still says whose it is.
    (tmp_path / "run" / "partial.jsonl").unlink()
    with pytest.raises(ConfigError, match=begun):
        run(other)


def test_an_item_that_was_answered_for_another_benchmark(tmp_path):
    run(gsm8k(tmp_path))
    cfg = gsm8k(tmp_path, "benchmark.gsm8k.name=other")
    with pytest.raises(ConfigError, match="other: item 'gsm8k/0' was answered for 'gsm8k'; allow"):
        run(cfg)


def test_an_option_that_a_grader_does_not_have_is_named(tmp_path):
    cfg = configured(tmp_path, f"+{GYM}.grader.letters=AB")
    with pytest.raises(ConfigError, match=rf"{GYM}\.grader\.letters: unknown option of LastWordG"):
        run(cfg)


ROW = {
    "id": "a", "task": "toy", "prompt_hash": "p", "correct": True, "error": None, "finish": "stop",
    "num_tokens": 3, "work": {"nfe": 2.0},
}  # fmt: skip
ABOUT = {
    "score": {"items": 2, "expected": None}, "grader": "g",
    "conditions": {"model": {}, "settings": {}},
}  # fmt: skip


def write(folder, rows=(ROW, ROW | {"id": "b", "correct": False}), about=ABOUT):
    (folder / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {"label": "x", "benchmarks": {"toy": about}}
    (folder / "benchmark.json").write_text(json.dumps(found))
    return folder


def test_what_a_folder_says(tmp_path):
    (one,) = benchmark_table.read_run(write(tmp_path)).results.values()
    assert (one.correct, one.items, one.grader, list(one.rows)) == (1, 2, "g", ["a", "b"])


BAD_ROWS = {
    "correct": ([None, "yes", 1], "true, false"),
    "work": ([5, {"nfe": "many"}, {"nfe": float("nan")}, []], r"\{NAME: NUMBER, \.\.\.\} or null"),
    "task": ([["toy"], None], "a text"),
    "id": ([3], "a text"),
    "prompt_hash": ([None], "a text"),
    "error": ([5], "a text or null"),
    "finish": ([None], "a text"),
    "num_tokens": ([-1, 1.5, True], "an integer >= 0"),
}


@pytest.mark.parametrize("field", BAD_ROWS)
def test_rows_of_other_types(tmp_path, field):
    values, allowed = BAD_ROWS[field]
    wrong = [ROW | {"id": "b", field: value} for value in values]
    wrong.append({key: value for key, value in ROW.items() if key != field})
    for row in wrong:
        message = rf"items\.jsonl:2: {field}=.*; allowed: {allowed} \(what mode=benchmark_eval"
        with pytest.raises(DataError, match=message):
            benchmark_table.read_run(write(tmp_path, [ROW, row]))


def test_rows_that_are_there_twice_or_of_no_benchmark(tmp_path):
    ten = write(tmp_path, [ROW] * 10, ABOUT | {"score": {"items": 10, "expected": None}})
    with pytest.raises(DataError, match=r"items\.jsonl:2: a second row of 'a'; allowed: what"):
        benchmark_table.read_run(ten)
    with pytest.raises(DataError, match=r"items\.jsonl:1: task='x' is no benchmark of benchmark\."):
        benchmark_table.read_run(write(tmp_path, [ROW | {"task": "x"}]))


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"score": {}}, r"toy\.score: items=0, expected=None; allowed: an integer >= 1"),
        ({"score": {"items": 2.0}}, r"toy\.score: items=2\.0, expected=None; allowed"),
        ({"score": {"items": 2, "expected": "9"}}, r"toy\.score: items=2, expected=9; allowed"),
        ({"score": 7}, r"benchmarks\.toy: needs score, grader and conditions; allowed: what"),
        ({"grader": ...}, r"benchmarks\.toy: needs score, grader and conditions"),
        ({"conditions": {"model": {}}}, r"benchmarks\.toy\.conditions: needs model and settings"),
    ],
)
def test_results_that_say_too_little(tmp_path, about, message):
    kept = {key: value for key, value in (ABOUT | about).items() if value is not ...}
    with pytest.raises(ConfigError, match=message):
        benchmark_table.read_run(write(tmp_path, about=kept))
    for content in ('{"label": "x"}', '{"benchmarks": {}}', '{"label": "x", "benchmarks": []}'):
        (tmp_path / "benchmark.json").write_text(content)
        with pytest.raises(ConfigError, match=r"json: no label or no benchmarks; allowed: what"):
            benchmark_table.read_run(tmp_path)


def test_a_damaged_folder_is_not_gone_on_with(tmp_path):
    cfg = configured(tmp_path, "mode.limit=1")
    run(cfg)
    (tmp_path / "conditions.json").write_text("{")
    with pytest.raises(ConfigError, match=r"conditions\.json: cannot be read \(JSONDecodeError\)"):
        run(cfg)
