"""What a process under judgement and the one that started it say to each other.

The job is a line with its size, JSON of that size, and a token. A report is the token and JSON.
The token is random and stays unread behind the job until the report is made, so that a program
cannot say "passed" by writing it: it would have to find the place first. What comes without the
token is no report.
"""

import json
import os
import select
import time
from collections.abc import Mapping
from typing import Any, Final, NoReturn

PASSED: Final = "passed"
FAILED: Final = "failed"
TIMEOUT: Final = "timeout"
MEMORY: Final = "memory"
KILLED: Final = "killed"
REFUSED: Final = "refused"
_REPORTED = (PASSED, FAILED, MEMORY, REFUSED)
# What tests call the function that they test.
CANDIDATE = "candidate"
SIZE_BYTES, TOKEN_BYTES = 16, 32
# Reports are short; whoever writes more is not the one who should.
MAX_REPORT = 8192
_LONGEST_DETAIL = 300
# Descriptors of the program itself are lower, and most systems allow at least 256.
_HIDDEN = range(100, 250)


class Channel:
    """The way back, out of the way of a program that prints, reads or closes 0, 1 and 2.

    Args:
        report: descriptor that the report is written to.
        token: descriptor from which the token can be read, once.
    """

    def __init__(self, report: int, token: int) -> None:
        self._report, self._token = _hidden(report), _hidden(token)
        self._calls = os.read, os.write, os._exit, json.dumps

    def send(self, *report: object) -> NoReturn:
        """Report, and end this process."""
        read, write, end, dumps = self._calls
        try:
            write(self._report, read(self._token, TOKEN_BYTES) + dumps(report).encode())
        finally:
            end(0)


def encode_job(job: Mapping[str, Any], token: bytes) -> bytes:
    """A job as it is read by `read_job`."""
    text = json.dumps(job).encode()
    return f"{len(text):<{SIZE_BYTES - 1}}\n".encode() + text + token


def read_job(descriptor: int) -> dict[str, Any]:
    """The job; behind it the token can be read."""
    text, size = b"", int(os.read(descriptor, SIZE_BYTES))
    while len(text) < size:
        text += os.read(descriptor, size - len(text))
    return json.loads(text)


def decode_report(data: bytes, token: bytes) -> list[Any] | None:
    """A report: one of the words above, and what belongs to it; None: it is none."""
    if len(data) > MAX_REPORT or not data.startswith(token):
        return None
    try:
        report = json.loads(data[len(token) :])
    except ValueError:
        return None
    known = isinstance(report, list) and len(report) > 1 and report[0] in _REPORTED
    return report if known else None


def read_until(descriptor: int, deadline: float, end: bytes | None = None) -> bytes | None:
    """What is written until the other end is closed, a little more than a report at most.

    Args:
        descriptor: of the pipe.
        deadline: of `time.monotonic`.
        end: the byte after which no more is awaited.

    Returns:
        What was written; None: the deadline came first.
    """
    data = b""
    poller = select.poll()
    poller.register(descriptor, select.POLLIN)
    while len(data) <= MAX_REPORT:
        left = deadline - time.monotonic()
        if left <= 0 or not poller.poll(1000 * left):
            return None
        part = os.read(descriptor, MAX_REPORT)
        data += part
        if not part or (end is not None and part.endswith(end)):
            break
    return data


def _hidden(descriptor: int) -> int:
    free = [place for place in _HIDDEN if not _is_open(place)]
    hidden = free[int.from_bytes(os.urandom(4), "big") % len(free)]
    return os.dup2(descriptor, hidden, inheritable=False)


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


def close_others() -> None:
    """Only channels stay: nothing to read on 0, and what is written to 1 and 2 is lost."""
    os.closerange(3, _HIDDEN.start)
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nothing, descriptor)
    os.close(nothing)


def describe(error: BaseException) -> str:
    """One line about an exception; its text may be the work of what is judged."""
    name = type(error).__name__
    try:
        lines = str(error).splitlines()
    except BaseException:
        lines = []
    text = f"{name}: {lines[0]}" if lines else name
    # Neither what moves a cursor nor what no file can hold.
    return "".join(c if c.isprintable() else "?" for c in text[:_LONGEST_DETAIL])
