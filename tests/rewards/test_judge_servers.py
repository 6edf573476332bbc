"""Judges behind servers that fail in every way: invalid, counted, and never a reward."""

import os
import socket
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest

from decoding.generate import GenerationSettings
from decoding.local import LocalGenerator
from decoding.server_protocol import ServerError
from rewards.judge_backends import WrittenReplies
from rewards.judge_counts import JudgeError
from rewards.judges import PromptedReward
from tests.decoding.servers import answer_server
from tests.decoding.test_server import wait_for
from tests.rewards.judging import case, score_prompt, server_reward, taught

GOOD = ['{"score": 1}', '{"score": 0}', 'so {"score": 7}, no: {"score": 0.5}']
BAD = {
    "500 a": "no answer", "html b": "no answer", "drop c": "no answer", "empty d": "no answer",
    "null e": "no answer", "deep f": "no answer", "i think 1": "no JSON object",
    '{"score": 7}': "not an allowed answer", '{"other": 1}': "no SCORE in the answer",
}  # fmt: skip


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with answer_server(tmp_path_factory.mktemp("judge")) as running:
        yield running


def test_what_a_server_gets_wrong_is_invalid_and_counted(server):
    judge = server_reward(server.url)
    found = judge.judge([case(text) for text in (*GOOD, *BAD)])
    assert [one.score for one in found] == [1.0, 0.0, 0.5, *[None] * len(BAD)]
    for judgement, kind in zip(found[len(GOOD) :], BAD.values(), strict=True):
        assert judgement.reason.startswith(f"{kind}: ") and "\n" not in judgement.reason
    assert judge.counts.metrics() == {
        "asked": 12, "valid": 3, "cached": 0, "invalid": 9, "invalid/no answer": 6,
        "invalid/no JSON object": 1, "invalid/not an allowed answer": 1,
        "invalid/no SCORE in the answer": 1, "invalid_rate": 0.75,
    }  # fmt: skip


def test_an_answer_that_is_late_is_invalid(server):
    found = server_reward(server.url, timeout_s=0.2).judge([case(GOOD[0]), case("hang x")])
    assert [one.score for one in found] == [1.0, None]
    assert found[1].reason == "no answer: no answer within 0.2 s"


def test_cached_answers_make_no_calls(server, tmp_path):
    text = '{"score": 1} once'
    for _ in range(2):
        judge = server_reward(server.url, cache=tmp_path / "answers.jsonl")
        assert judge.judge([case(text), case(text, "again")])[1].score == 1.0
        judge.close()
    assert server.seen("attempts")[text] == 1


def test_a_server_that_lies_ends_the_run(server):
    judge = server_reward(server.url, max_invalid_rate=0.5, window=8)
    lies = [case(f"1! {n}") for n in range(8)]
    with pytest.raises(JudgeError, match="judge toy: 8 of the last 8 questions without a valid"):
        judge.judge(lies)


def test_a_server_that_dies_ends_the_run_and_what_it_said_is_kept(tmp_path):
    with answer_server(tmp_path, die_after=5) as server:
        judge = server_reward(
            server.url, max_failures=3, concurrency=1, cache=tmp_path / "answers.jsonl"
        )
        with pytest.raises(ServerError, match="requests in a row got no answer, after 5 that did"):
            judge.judge([case(f'{{"score": 1}} {n}') for n in range(20)])
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 5


def test_no_more_questions_than_allowed_are_under_way(tmp_path):
    with answer_server(tmp_path) as server:
        meeting = [case(f'meet 3 {name} {{"score": 1}}') for name in "abcdef"]
        found = server_reward(server.url, concurrency=3).judge(meeting)
        assert [one.score for one in found] == [1.0] * 6
        assert server.seen("state")["most"] == 3


@pytest.mark.slow
def test_a_judge_behind_the_server_of_transformers(tmp_path):
    """Half a minute: a model that knows two verdicts, and none on anything else."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    target, name = taught(), str(tmp_path / "model")
    target.model.save_pretrained(name)
    target.tokenizer.save_pretrained(name)
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    program = Path(sys.executable).with_name("transformers")
    where = ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    process = subprocess.Popen(
        [str(program), "serve", name, *where],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        wait_for(f"http://127.0.0.1:{port}/health", process)
        judge = server_reward(f"http://127.0.0.1:{port}/v1", model=name, timeout_s=120.0)
        found = judge.judge([case("good"), case("bad"), case("500 " * 30)])
    finally:
        process.terminate()
        process.wait(60)
    assert [one.score for one in found[:2]] == [1.0, 0.0]
    assert judge.counts.metrics()["asked"] == 3
    expected = PromptedReward(
        score_prompt(),
        WrittenReplies(
            lambda settings: LocalGenerator(target, settings), GenerationSettings(max_new_tokens=50)
        ),
    ).judge([case("good"), case("bad"), case("500 " * 30)])
    assert [one.score for one in found] == [one.score for one in expected]
