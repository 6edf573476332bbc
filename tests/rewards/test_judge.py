"""Questions that hang, die or tamper cost their own answer, and nothing of the next one."""

import sys
import threading
import time

import psutil
import pytest

from rewards.judge import Answer, Judge
from rewards.sandbox import find_walls

MODULE = "tests.plugins.toy_judge"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="walls are of Linux only")


@pytest.fixture(scope="module")
def judge():
    judge = Judge(MODULE, timeout_s=20, memory_mb=512)
    yield judge
    judge.close()


def test_every_question_finds_the_same_state(judge):
    """The warm-up has counted once; what a question counts is gone with its fork."""
    assert [judge.ask(action="count", value=n) for n in range(3)] == [
        Answer([2, n, None]) for n in range(3)
    ]


@pytest.mark.parametrize(
    "question, reason",
    [
        ({"action": "end"}, "the judge ended without an answer"),
        ({"action": "end", "value": 3}, "the judge ended without an answer"),
        ({"action": "write"}, "the judge ended without an answer"),
        ({"action": "raise"}, "LookupError: first line"),
        ({"action": "long", "value": 10**5}, "the judge ended without an answer"),
        ({"unknown": 1}, "TypeError: judge() got an unexpected keyword argument 'unknown'"),
        ({"action": "hog"}, "more than 512 MiB"),
        ({"action": "fork"}, "PermissionError: [Errno 1] Operation not permitted"),
    ],
)
def test_a_question_that_goes_wrong(judge, question, reason):
    assert judge.ask(**question) == Answer(None, reason)
    assert judge.ask(action="count") == Answer([2, 0, None])


def test_our_own_files_are_not_readable(judge):
    reason = judge.ask(action="read").reason
    assert reason.startswith("PermissionError")


def test_a_question_that_hangs():
    judge = Judge(MODULE, timeout_s=20, memory_mb=512)
    judge.ask(action="count")
    judge.timeout_s, start = 0.3, time.monotonic()
    assert judge.ask(action="hang") == Answer(None, "timed out after 0.3 s")
    assert time.monotonic() - start < 3
    judge.close()


def test_a_process_that_was_killed_is_replaced():
    judge = Judge(MODULE, timeout_s=20, memory_mb=512)
    before = {child.pid for child in psutil.Process().children()}
    judge.ask(action="count")
    (mine,) = (child for child in psutil.Process().children() if child.pid not in before)
    mine.kill()
    assert judge.ask(action="count").reason == "the judge's process ended with exit code -9"
    assert judge.ask(action="count") == Answer([2, 0, None])
    judge.close()
    assert {child.pid for child in psutil.Process().children()} == before


def test_threads_do_not_wait_for_each_other(judge):
    """Two of them hold a process each while a third is asked."""
    with judge._process() as first, judge._process() as second:
        assert first.pid != second.pid and judge.ask(action="count").value == [2, 0, None]
    asked = []
    threads = [
        threading.Thread(target=lambda n=n: asked.append(judge.ask(action="count", value=n)))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answer.value[1] for answer in asked) == list(range(8))


def test_nothing_is_judged_without_walls(monkeypatch):
    find_walls.cache_clear()
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(ValueError, match="what models write is run on Linux only; this is darwin"):
        Judge(MODULE, timeout_s=1, memory_mb=512)


def test_a_module_that_is_not_there():
    with pytest.raises(RuntimeError, match="judge nowhere: its process does not start"):
        Judge("nowhere", timeout_s=1, memory_mb=512).ask()
