"""What a process under judgement and the one that started it say to each other.

A report is a list as JSON: one of the words below, and what belongs to it.
"""

import json
import os
import select
import signal
import time
from typing import Any, Final, NoReturn

PASSED: Final = "passed"
FAILED: Final = "failed"
TIMEOUT: Final = "timeout"
MEMORY: Final = "memory"
KILLED: Final = "killed"
REFUSED: Final = "refused"
_REPORTED = (PASSED, FAILED, TIMEOUT, MEMORY, KILLED, REFUSED)
# What tests call the function that they test.
CANDIDATE = "candidate"
TOKEN_BYTES = 32
# Reports are short; whoever writes more is not the one who should.
MAX_REPORT = 8192
_LONGEST_DETAIL = 300
# Descriptors of the program itself are lower, and most systems allow at least 256.
_HIDDEN = range(100, 250)


class Channel:
    """The way back from a judge, out of the way of what prints, reads or closes 0, 1 and 2.

    A token, random and unread until the report is made, comes before it; what comes without it is
    no report. That keeps out a judge's own prints, and whoever writes to every descriptor, but not
    text that makes its judge run code of its own: it shares the process, and finds both
    descriptors if it reads them all.

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


def decode_report(data: bytes, token: bytes = b"") -> list[Any] | None:
    """A report that comes behind this token; None: it is none."""
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


def keep_only(*descriptors: int) -> None:
    """Close all but these; nothing to read on 0, and what is written to 1 and 2 is lost."""
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    kept = sorted({0, 1, 2, *descriptors})
    for left, right in zip(kept, [*kept[1:], _HIDDEN.stop], strict=True):
        os.closerange(left + 1, right)


def how_it_ended(code: int) -> tuple[str, str]:
    """The word, and a line, about a process that has said nothing, by its exit code."""
    if code == -signal.SIGXCPU:
        return TIMEOUT, ""
    if code < 0:
        names = {known.value: known.name for known in signal.Signals}
        return KILLED, f"killed by {names.get(-code, f'signal {-code}')}"
    return FAILED, f"ended before its end, with exit code {code}"


def describe(error: BaseException) -> str:
    """One line about an exception; its text may be the work of what is judged."""
    name = type(error).__name__
    try:
        text = str(error)
    except BaseException:
        text = ""
    return one_line(f"{name}: {text}" if text else name)


def one_line(text: str) -> str:
    """The first line of a text that nobody vouches for."""
    first = next(iter(text[: 2 * _LONGEST_DETAIL].splitlines()), "")
    # Neither what moves a cursor nor what no file can hold.
    return "".join(c if c.isprintable() else "?" for c in first[:_LONGEST_DETAIL])
