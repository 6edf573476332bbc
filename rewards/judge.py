"""Asking a judge that may hang, die or run what it reads: in forks of a process kept for it."""

import json
import math
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rewards.jail.channel import KILLED, MEMORY, PASSED, REFUSED, TIMEOUT, read_until
from rewards.sandbox import find_walls

_ROOT = str(Path(__file__).resolve().parents[1])
_START = (
    "import sys; sys.path[:] = sys.argv[3:]; from rewards.jail.judge import main;"
    " main(*sys.argv[1:3])"
)
_OPTIONS = ("-P", "-s", "-S", "-B")
# Libraries that compute may start threads, which no fork has.
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0", "PYTHONUTF8": "1", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1",
}  # fmt: skip
_IMPORTS_S, _GRACE_S = 120.0, 10.0


@dataclass(frozen=True)
class Answer:
    """What a judge said.

    Attributes:
        value: its value, plain as JSON; None: it has none.
        reason: one line why there is none.
    """

    value: Any = None
    reason: str = ""


class Judge:
    """A module's function `judge`, asked in walled forks of a process that has imported it.

    May be asked from several threads; every one that waits has a process to itself.

    Args:
        module: what `rewards.jail.judge.main` imports.
        timeout_s: limit in seconds of one question.
        memory_mb: limit in MiB of the address space of a fork, its imports included.

    Raises:
        ValueError: this system has no walls to put around it.
    """

    def __init__(self, module: str, timeout_s: float, memory_mb: int) -> None:
        find_walls()
        self.module, self.timeout_s, self.memory_mb = module, timeout_s, memory_mb
        self._idle: list[subprocess.Popen] = []
        self._lock = threading.Lock()
        self._end = weakref.finalize(self, _end_all, self._idle)

    def ask(self, **arguments: Any) -> Answer:
        """What the judge says.

        Raises:
            RuntimeError: its process does not start, or the walls could not be put up this time.
        """
        walls = {"memory_mb": self.memory_mb, "cpu_s": math.ceil(self.timeout_s) + 1}
        question = {"arguments": arguments, "timeout_s": self.timeout_s, "walls": walls}
        with self._process() as process:
            status, value = _exchange(process, question, self.timeout_s + _GRACE_S)
        if status == PASSED:
            return Answer(value)
        if status == REFUSED:
            raise RuntimeError(f"judge {self.module}: the walls could not be put up: {value}")
        known = {
            TIMEOUT: f"timed out after {self.timeout_s:g} s",
            MEMORY: f"more than {self.memory_mb} MiB",
        }
        return Answer(reason=known.get(status, value))

    def close(self) -> None:
        """End the processes."""
        self._end()

    @contextmanager
    def _process(self) -> Iterator[subprocess.Popen]:
        """A process that nobody else asks; kept for the next one if it is still in order."""
        with self._lock:
            process = self._idle.pop() if self._idle else None
        if process is None:
            process = self._start()
        fit = False
        try:
            yield process
            fit = process.poll() is None
        finally:
            if fit:
                with self._lock:
                    self._idle.append(process)
            else:
                _end(process)

    def _start(self) -> subprocess.Popen:
        paths = [_ROOT, *(path for path in sys.path if path)]
        process = subprocess.Popen(
            [sys.executable, *_OPTIONS, "-c", _START, _ROOT, self.module, *paths],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            env=_ENVIRONMENT, start_new_session=True, bufsize=0,
        )  # fmt: skip
        status, reason = _exchange(process, None, _IMPORTS_S)
        if status != PASSED:
            _end(process)
            raise RuntimeError(f"judge {self.module}: its process does not start ({reason})")
        return process


def _exchange(
    process: subprocess.Popen, question: dict[str, Any] | None, timeout_s: float
) -> tuple[str, Any]:
    """Ask, and read a line; whatever goes wrong ends the process."""
    assert process.stdin is not None and process.stdout is not None
    line: bytes | None = b""
    try:
        if question is not None:
            rest = memoryview(json.dumps(question).encode() + b"\n")
            while rest:
                rest = rest[process.stdin.write(rest) :]
        line = read_until(process.stdout.fileno(), time.monotonic() + timeout_s, b"\n")
    except BrokenPipeError:
        pass
    if line is None:
        _end(process)
        return TIMEOUT, None
    if not line.endswith(b"\n"):
        _end(process)
        return KILLED, f"the judge's process ended with exit code {process.returncode}"
    status, value = json.loads(line)
    return status, value


def _end(process: subprocess.Popen) -> None:
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
    process.kill()
    process.wait()


def _end_all(processes: list[subprocess.Popen]) -> None:
    while processes:
        _end(processes.pop())
