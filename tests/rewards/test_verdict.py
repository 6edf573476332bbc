"""Many texts are graded side by side, in their order; every grader is built from its yaml."""

import re
import threading
import time

import pytest
from omegaconf import OmegaConf

from rewards.exact import ExactGrader
from rewards.verdict import NO_ANSWER, Verdict, grade_many, needed
from runtime.config import instantiate
from tests.support import ROOT

GRADERS = sorted((ROOT / "configs" / "grader").glob("*.yaml"))


class SlowFirst:
    """Earlier texts take longer; counts how many are graded at a time."""

    def __init__(self) -> None:
        self.now = self.most = 0
        self.lock = threading.Lock()

    def grade(self, item, text):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        time.sleep(0.01 * (6 - item["place"]))
        with self.lock:
            self.now -= 1
        if text == "bad":
            raise ValueError("bad item")
        return Verdict(item["place"] % 2 == 0, text)

    def fingerprint(self):
        return {}


@pytest.mark.parametrize("workers", [1, 3])
def test_the_order_is_kept(workers):
    grader, done = SlowFirst(), []
    pairs = [({"place": place}, str(place)) for place in range(6)]
    verdicts = grade_many(grader, pairs, workers, done.append)
    assert verdicts == [Verdict(place % 2 == 0, str(place)) for place in range(6)]
    assert done == [1] * 6 and grader.most == workers


def test_an_error_ends_it():
    pairs = [({"place": 5}, "bad")] + [({"place": 5}, "good")] * 3
    with pytest.raises(ValueError, match="bad item"):
        grade_many(SlowFirst(), pairs, 2)
    with pytest.raises(ValueError, match=r"workers=0: allowed"):
        grade_many(SlowFirst(), pairs, 0)


def test_nothing_to_grade():
    assert grade_many(SlowFirst(), [], 2) == []


@pytest.mark.parametrize(
    "text, verdict",
    [
        (" 4\n", Verdict(True, "4")),
        ("5", Verdict(False, "5")),
        ("4.", Verdict(False, "4.")),
        (" \n", NO_ANSWER),
    ],
)
def test_exact(text, verdict):
    assert ExactGrader().grade({"answer": "4 "}, text) == verdict


def test_an_item_without_an_answer():
    with pytest.raises(ValueError, match=re.escape("grader=exact: item 'x/1': answer=None")):
        needed({"id": "x/1"}, "answer", "exact")


@pytest.mark.parametrize("path", GRADERS, ids=lambda path: path.stem)
def test_every_yaml_builds_its_grader(path):
    """And says all options: what is left out of it would be no override."""
    grader = instantiate(OmegaConf.load(path))
    assert grader.fingerprint()["grader"] == path.stem
    options = {key for key in OmegaConf.load(path) if key not in ("name", "_target_")}
    assert options <= set(grader.fingerprint())


# What graders need of an item, good and bad values of one field.
NEEDED = {
    "choice": ({"answer": "(B)"}, {"answer": "E"}),
    "exact": ({"answer": "4"}, {"answer": 4}),
    "humaneval": ({"question": "def f():", "tests": "", "entry_point": "f"}, {"tests": None}),
    "math": ({"answer": "18"}, {"answer": 18}),
    "reasoning_gym": ({"task": "chain_sum", "question": "1 + 1"}, {"task": None}),
}


@pytest.mark.parametrize("path", GRADERS, ids=lambda path: path.stem)
def test_an_item_is_checked_before_it_is_answered_as_it_is_when_it_is_graded(path):
    grader = instantiate(OmegaConf.load(path))
    good, change = NEEDED[path.stem]
    grader.check({"id": "x/1", **good})
    ((field, value),) = change.items()
    said = re.escape(f"grader={path.stem}: item 'x/1': {field}={value!r}; allowed: ")
    for judge in (grader.check, lambda item: grader.grade(item, "4")):
        with pytest.raises(ValueError, match=said):
            judge({"id": "x/1", **good, **change})
