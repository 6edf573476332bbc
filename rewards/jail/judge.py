"""A process that has imported a judge, and lets a fork of itself answer every question.

A fork has paid for the imports already, puts up the walls, and takes with it whatever the question
did to it: the next one finds everything as it was. Questions and answers are lines of JSON.

A fork holds the question and the way to answer it. Text that makes its judge run code of its own is
kept in by the walls, but could answer for the judge (`rewards.jail.channel.Channel`).
"""

import gc
import importlib
import json
import os
import secrets
import signal
import sys
import time
from typing import Any

from rewards.jail.channel import (
    FAILED,
    MEMORY,
    PASSED,
    REFUSED,
    TIMEOUT,
    TOKEN_BYTES,
    Channel,
    close_others,
    decode_report,
    describe,
    read_until,
)
from rewards.jail.walls import put_up


def main(root: str, module: str) -> None:
    """Import a judge, then answer until the questions end.

    Args:
        root: the folder of our own modules, which forks have no use for.
        module: has `judge(**arguments)`, whose values are JSON, and `WARM_UP`, arguments of
            questions that make it ready.
    """
    answers = os.fdopen(os.dup(1), "w")
    # What an import prints is no answer.
    os.dup2(2, 1)
    judge = importlib.import_module(module)
    for arguments in judge.WARM_UP:
        judge.judge(**arguments)
    sys.path[:] = [path for path in sys.path if os.path.realpath(path) != root]
    # What a collection touches would be copied into every fork.
    gc.collect()
    gc.freeze()
    print(json.dumps([PASSED, None]), file=answers, flush=True)
    for line in sys.stdin.buffer:
        answer = _ask_fork(judge.judge, **json.loads(line))
        print(json.dumps(answer), file=answers, flush=True)


def _ask_fork(judge: Any, arguments: dict, timeout_s: float, walls: dict) -> tuple[str, Any]:
    """The status and the value of one question."""
    deadline = time.monotonic() + timeout_s
    token = secrets.token_hex(TOKEN_BYTES // 2).encode()
    (answers, answer), (tokens, give_token) = os.pipe(), os.pipe()
    os.write(give_token, token)
    os.close(give_token)
    child = os.fork()
    if child == 0:
        _judge_and_end(Channel(answer, tokens), judge, arguments, walls)
    os.close(answer)
    os.close(tokens)
    try:
        data = read_until(answers, deadline)
    finally:
        os.close(answers)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    if data is None:
        return TIMEOUT, None
    report = decode_report(data, token)
    return (FAILED, "the judge ended without an answer") if report is None else tuple(report)


def _judge_and_end(channel: Channel, judge: Any, arguments: dict, walls: dict) -> None:
    """What the fork does; it never returns."""
    try:
        close_others()
        put_up(**walls)
    except BaseException as error:
        channel.send(REFUSED, describe(error))
    try:
        value = judge(**arguments)
    except MemoryError:
        channel.send(MEMORY, None)
    except BaseException as error:
        channel.send(FAILED, describe(error))
    channel.send(PASSED, value)
