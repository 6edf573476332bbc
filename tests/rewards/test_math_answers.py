"""Mathematics: what equals the right answer, and expressions that never end."""

import sys
import threading
import time

import pytest

from rewards.math_answers import MathGrader, locate_answer
from rewards.verdict import NO_ANSWER

pytest.importorskip("math_verify", reason="needs the package math-verify")
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="walls are of Linux only")
GSM8K = "He sold 48/2 = <<48/2=24>>24 clips.\nAltogether 48+24 = <<48+24=72>>72.\n#### 72"


@pytest.fixture(scope="module")
def grader():
    grader = MathGrader(timeout_s=60)
    yield grader
    grader.close()


@pytest.mark.parametrize(
    "gold, text, extracted",
    [
        (GSM8K, "So 48 + 24 = 72.\n#### 72", "72"),
        (GSM8K, "The answer is **72** clips, as 48 + 24 shows. ", "72 clips, as 48 + 24 shows"),
        (GSM8K, "**Final answer:** $72.00", "$72.00"),
        (GSM8K, r"\boxed{71}? No: \boxed{72}.", "72"),
        (GSM8K, "48 and 24 make 72 clips.", "72"),
        ("#### 1,234", "The answer is $1234.", "$1234"),
        ("1234", r"\boxed{1,234}", "1,234"),
        (r"\frac{14}{3}", r"\boxed{\dfrac{14}{3}}", r"\dfrac{14}{3}"),
        (r"\frac{1}{2}", r"\boxed{0.5}", "0.5"),
        (r"\left( 3, \frac{\pi}{2} \right)", r"\boxed{(3, \pi/2)}", r"(3, \pi/2)"),
        ("p - q", "$-q+p$", "-q+p"),
        (r"\text{Evelyn}", "The answer is Evelyn.", "Evelyn"),
        (r"90^\circ", r"\boxed{90}", "90"),
        ("1,-2", r"\boxed{-2,1}", "-2,1"),
        ("x=5", r"\boxed{5}", "5"),
    ],
)
def test_equal(grader, gold, text, extracted):
    verdict = grader.grade({"answer": gold}, text)
    assert (verdict.correct, verdict.extracted, verdict.reason) == (True, extracted, "")


@pytest.mark.parametrize(
    "gold, text, extracted",
    [
        (GSM8K, "#### 24", "24"),
        (GSM8K, "The answer is 72 or so? The answer is 73", "73"),
        (r"\frac{1}{2}", r"\boxed{2}", "2"),
        ("(3, 4]", r"\boxed{(3, 4)}", "(3, 4)"),
        ("4", r"\boxed{4, 5}", "4, 5"),
        (r"\text{Evelyn}", r"\boxed{\text{Carla}}", r"\text{Carla}"),
    ],
)
def test_different(grader, gold, text, extracted):
    verdict = grader.grade({"answer": gold}, text)
    assert (verdict.correct, verdict.extracted) == (False, extracted)


@pytest.mark.parametrize("text", ["", "I do not know", r"\boxed{}", r"\boxed{7"])
def test_nothing_found(grader, text):
    assert grader.grade({"answer": "4"}, text) == NO_ANSWER


@pytest.mark.parametrize(
    "answer", ["9**9**9**9", "9^{9^{9^{9}}}", "10000000!", r"\sqrt{" * 60 + "2" + "}" * 60]
)
def test_expressions_that_never_end(grader, monkeypatch, answer):
    """Within the limit, and the next text is graded as ever."""
    grader.grade({"answer": "1/2"}, r"\boxed{0.5}")
    monkeypatch.setattr(grader._judge, "timeout_s", 0.4)
    start = time.monotonic()
    for text in (f"\\boxed{{{answer}}}", f"The answer is {answer}"):
        assert not grader.grade({"answer": "4"}, text).correct
    assert time.monotonic() - start < 8
    monkeypatch.undo()
    assert grader.grade({"answer": "1/2"}, r"\boxed{0.5}").correct


def test_the_limit_is_named(grader, monkeypatch):
    monkeypatch.setattr(grader._judge, "timeout_s", 0.4)
    verdict = grader.grade({"answer": "4"}, "The answer is 9**9**9**9")
    assert (verdict.extracted, verdict.reason) == ("9**9**9**9", "timed out after 0.4 s")
    assert not verdict.decided


def test_an_answer_of_the_item_that_is_not_understood_decides_nothing(grader):
    verdict = grader.grade({"answer": "}{"}, "The answer is 4")
    assert verdict.reason == "the item's answer '}{' is not understood"
    assert not verdict.correct and not verdict.decided
    assert grader.grade({"answer": "5"}, "The answer is 4").decided


def test_a_long_answer_is_none(grader):
    verdict = grader.grade({"answer": "4"}, "\\boxed{" + "(" * 5000 + "4" + ")" * 5000 + "}")
    assert verdict.reason == "the answer has 10001 characters, more than 500"
    assert not verdict.correct and len(verdict.extracted) == 500


def test_text_is_not_run(grader, tmp_path):
    canary = tmp_path / "canary"
    code = f"__import__('os').mkdir('{canary}')"
    for text in (f"\\boxed{{{code}}}", f"The answer is {code}", code):
        assert not grader.grade({"answer": "4"}, text).correct
    assert not canary.exists()


def test_from_another_thread(grader):
    """math-verify's own limits are signals, which only a main thread can set."""
    verdicts = []
    thread = threading.Thread(
        target=lambda: verdicts.append(grader.grade({"answer": "1/2"}, r"\boxed{0.5}"))
    )
    thread.start()
    thread.join()
    assert verdicts[0].correct


def test_where_answers_are_located():
    assert locate_answer("#### 4\nThe answer is 5") == ("4", "The final answer is 4")
    assert locate_answer(r"#### 4 \boxed{5}") == ("5", r"\boxed{5}")
    assert locate_answer("4 apples")[0] is None


def test_fingerprint(grader):
    versions = grader.fingerprint()["versions"]
    assert versions["math-verify"] and grader.fingerprint()["timeout_s"] == 60
    with pytest.raises(ValueError, match="grader=math: timeout_s=0, memory_mb=2048: allowed"):
        MathGrader(timeout_s=0)
