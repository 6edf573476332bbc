"""reasoning-gym: the tasks' own answers are right, and answers that are code do nothing."""

import json
import sys

import pytest

from data.generated_prompts import ReasoningGymPrompts
from rewards.reasoning_gym import ReasoningGymGrader, readings
from rewards.verdict import NO_ANSWER
from tests.support import compose_config

gym = pytest.importorskip("reasoning_gym", reason="needs the package reasoning_gym")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="walls are of Linux only")


@pytest.fixture(scope="module")
def grader():
    grader = ReasoningGymGrader(timeout_s=60)
    yield grader
    grader.close()


def entry(task, **options):
    """An entry as it comes out of a file of prompts."""
    made = gym.create_dataset(task, seed=3, size=1, **options)[0]
    return json.loads(json.dumps({**made, "task": task, "id": task}, default=str))


def test_rows_of_the_prompt_set(grader):
    tasks = compose_config("prompts=reasoning_gym").prompts.tasks
    rows = ReasoningGymPrompts("gym", dict(tasks), "held_out", 1, 1, seed=1).rows()
    for row in rows:
        right = grader.grade(row, f"First this, then that.\nThe answer is **{row['answer']}**.")
        assert right.correct, row
        assert not grader.grade(row, "The answer is 17 and a half.").correct


# Answers of several lines, and answers that are evaluated.
@pytest.mark.parametrize("task", ["n_queens", "polynomial_multiplication", "countdown"])
@pytest.mark.parametrize(
    "text",
    ["<answer>{}</answer>", "So:\nAnswer:\n{}", "It is \\boxed{{{}}}", "The answer is {}"],
)
def test_ways_to_write_it(grader, task, text):
    item = entry(task)
    assert grader.grade(item, text.format(item["answer"])).correct


def test_tuples_of_metadata(grader):
    """JSON has none, and arc_agi compares with them."""
    item = entry("arc_agi")
    assert grader.grade(item, f"<answer>{item['answer']}</answer>").correct


def test_part_of_an_answer_is_not_right(grader):
    item = {"task": "chain_sum", "question": "2 + 3", "answer": "5", "metadata": {}}
    assert grader.grade(item, "Answer: 5").correct
    wrong = grader.grade(item, "The sum of both is five, that is 5 in digits")
    assert not wrong.correct and wrong.reason.startswith("score 0.0")
    assert grader.grade(item, " ") == NO_ANSWER


def test_answers_that_are_code(grader, tmp_path):
    """n_queens evaluates what begins like a list."""
    canary = tmp_path / "canary"
    item = entry("n_queens")
    texts = [
        f"[__import__('os').mkdir({str(canary)!r})]",
        "[__import__('os')._exit(0)]",
        "[__import__('sys').exit(0)]",
        "[__import__('os').fork()]",
    ]
    for text in texts:
        assert not grader.grade(item, f"<answer>{text}</answer>").correct
    assert not canary.exists()
    assert grader.grade(item, f"<answer>{item['answer']}</answer>").correct


def test_readings():
    assert readings("<answer> a </answer>\nb") == ["a"]
    assert readings("The answer is `4`.\nbye") == ["`4`.", "`4`", "4", "`4`.\nbye", "4`.\nbye"]
    assert readings("Answer: **'a.'**.") == ["'a.'**.", "'a.'**", "'a.'", "a.", "a"]
    assert readings("...") == ["...", "..", "."]
    assert readings("x\n\n yes. \n") == ["yes.", "yes"]
    assert readings(" ") == []


def test_an_item_of_another_set(grader):
    with pytest.raises(ValueError, match="grader=reasoning_gym: item 'x': task=None"):
        grader.grade({"id": "x"}, "4")
