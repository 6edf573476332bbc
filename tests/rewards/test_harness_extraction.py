"""What is taken for the answer of a completion is what lm-evaluation-harness takes for it."""

import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from rewards.math_answers import locate_answer

BOXED = [
    r"Half of 6 is 3, so the answer is $\boxed{3}$.",
    r"\boxed{\frac{1}{2}}",
    r"First \boxed{4}. No: \boxed{5}.",
    r"We get $\boxed{\left( 3, \frac{\pi}{2} \right)}$ in polar coordinates.",
    r"The set is $\boxed{\{1, 2\}}$",
    r"\boxed{x^{2} + \sqrt{3}} is what remains.",
    r"Thus $p - q = \boxed{p - q}$." "\n\nWe are done.",
    r"$$\boxed{-\frac{14}{3}}$$",
    r"The name is \boxed{\text{Evelyn}}.",
    r"It costs \boxed{\$5.40}, tax included.",
    r"\boxed{10^{100}} or so; 7 more words follow here",
    r"A: \boxed{2k + 2}" "\nB: none",
]
MARKED = [
    "16 - 3 - 4 = 9 eggs.\n9 * 2 = 18 dollars.\n#### 18",
    "#### 3",
    "It is 70,000 in all.\n#### 70,000",
    "She loses.\n#### -5",
    "2.5 hours\n#### 2.5",
    "The answer is 7? No.\n#### 8",
    "Problem: 1\n#### 42\n",
    "#### 1,234,567",
]


@pytest.fixture(scope="module")
def tasks():
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("needs the package lm_eval")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"


def test_the_last_box(tasks, monkeypatch):
    # By its file, and without what it needs for annotations alone: both would import for seconds.
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(Dataset=None))
    spec = importlib.util.spec_from_file_location(
        "harness_math", tasks / "hendrycks_math" / "utils.py"
    )
    harness = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(harness)
    for text in BOXED:
        expected = harness.remove_boxed(harness.last_boxed_only_string(text))
        assert locate_answer(text)[0] == expected


def test_what_follows_the_marks(tasks):
    task = yaml.safe_load((tasks / "gsm8k" / "gsm8k.yaml").read_text())
    (strict,) = (one for one in task["filter_list"] if one["name"] == "strict-match")
    (pattern,) = (one["regex_pattern"] for one in strict["filter"] if "regex_pattern" in one)
    for text in MARKED:
        assert locate_answer(text)[0] == re.search(pattern, text)[1]
