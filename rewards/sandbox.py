"""Running a program that nobody has read: one process, walled in, with a limit on everything.

A program gets the standard library and nothing else: no network, no other processes, no files but
those of its own small folder, an empty environment, and one hash seed, so that a run can be
repeated. What it prints is lost. The walls and which of them a system must have are described in
`rewards.jail.walls`.

Not promised: that nothing can be read. Where the kernel has Landlock a program reads only Python
and the system's libraries; elsewhere it reads what its user can, but has nowhere to send it to.
Nor that "passed" cannot be forged by a program that searches the memory of its own process.
"""

import functools
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

from rewards.jail.channel import (
    FAILED,
    KILLED,
    MEMORY,
    PASSED,
    REFUSED,
    TIMEOUT,
    TOKEN_BYTES,
    decode_report,
    encode_job,
    read_until,
)

Status = Literal["passed", "failed", "timeout", "memory", "killed"]

_ROOT = Path(__file__).resolve().parents[1]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from rewards.jail.program import main;"
    " del sys.path[0]; main()"
)
# No site-packages, no folder of the user's, nothing of the environment, no bytecode written.
_OPTIONS = ("-P", "-s", "-S", "-B")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
# The interpreter itself needs some of it.
LEAST_MEMORY_MB = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "passed": it ran to its end, and so did its tests. "failed": an exception, or an
            end before the end. "timeout", "memory": a limit. "killed": by a signal.
        detail: a line about it; of a failed program its own words, which are not to be trusted.
    """

    status: Status
    detail: str = ""


def run_python(
    program: str,
    *,
    tests: str = "",
    entry_point: str | None = None,
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    allow_network: bool = False,
    without: tuple[str, ...] = (),
) -> Outcome:
    """Run a program, then tests of it that it cannot change (`rewards.jail.program`).

    Args:
        program: its text.
        tests: their text, in a namespace of its own.
        entry_point: a function of the program, which the tests know as `candidate`.
        timeout_s: limit in seconds of wall-clock time, the start of the process included.
        memory_mb: limit in MiB of the address space, the interpreter included.
        allow_network: leave the network open.
        without: walls to leave out, as on a system that lacks them.

    Raises:
        ValueError: a limit out of range, or this system cannot hold a program.
        RuntimeError: the walls could not be put up this time.
    """
    if timeout_s <= 0 or memory_mb < LEAST_MEMORY_MB:
        raise ValueError(
            f"timeout_s={timeout_s}, memory_mb={memory_mb}: allowed above 0, and"
            f" {LEAST_MEMORY_MB} or more"
        )
    find_walls(without)
    limits = {"memory_mb": memory_mb, "cpu_s": ceil(timeout_s) + 1, "network": allow_network}
    job = {
        "program": program, "tests": tests, "entry_point": entry_point,
        "walls": limits | {"without": without},
    }  # fmt: skip
    report, code = _start(job, timeout_s)
    return _outcome(report, code, timeout_s, memory_mb)


@functools.cache
def find_walls(without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The walls that this system can put up, found out once by a process that runs nothing.

    Raises:
        ValueError: it lacks one that programs are not run without.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError(f"sandbox: programs are run on Linux only; this is {sys.platform}")
    limits = {"memory_mb": 512, "cpu_s": 60, "without": without}
    job = {"program": "", "tests": "", "entry_point": None, "walls": limits}
    report, code = _start(job, timeout_s=60)
    if not report or report[0] != PASSED:
        reason = report[1] if report else f"no report, exit code {code}"
        raise ValueError(
            f"sandbox: no programs are run here, the walls around them cannot be put up ({reason});"
            " needed: seccomp, on x86_64 or aarch64"
        )
    return tuple(report[2])


def _start(job: dict[str, Any], timeout_s: float) -> tuple[list[Any] | None, int | None]:
    """Run a process to its end.

    Returns:
        Its report, if it made one; its exit code, None if it was still running at the deadline.
    """
    deadline = time.monotonic() + timeout_s
    token = secrets.token_hex(TOKEN_BYTES // 2).encode()
    folder = tempfile.mkdtemp(prefix="sandbox-")
    file = os.memfd_create("job")
    try:
        with open(file, "wb", closefd=False) as stream:
            stream.write(encode_job(job, token))
        os.lseek(file, 0, os.SEEK_SET)
        command = [sys.executable, *_OPTIONS, "-c", _START, str(_ROOT)]
        process = subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
            env=_ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
        data = _await(process, deadline)
    finally:
        os.close(file)
        os.rmdir(folder)
    if data is None:
        return None, None
    return decode_report(data, token), process.returncode


def _await(process: subprocess.Popen, deadline: float) -> bytes | None:
    """What the process wrote until it ended or the deadline came; then it is dead."""
    assert process.stdout is not None
    with process.stdout as pipe:
        try:
            data = read_until(pipe.fileno(), deadline)
            # Most have ended when their pipe is closed.
            process.wait(max(0.0, min(0.2, deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Not yet reaped, or the number could be another's.
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    return data


def _outcome(
    report: list[Any] | None, code: int | None, timeout_s: float, memory_mb: int
) -> Outcome:
    if code is None or code == -signal.SIGXCPU:
        return Outcome(TIMEOUT, f"timed out after {timeout_s:g} s")
    if report is None and code < 0:
        names = {known.value: known.name for known in signal.Signals}
        return Outcome(KILLED, f"killed by {names.get(-code, f'signal {-code}')}")
    if report is None:
        return Outcome(FAILED, f"ended before its end, with exit code {code}")
    status, detail = report[:2]
    if status == REFUSED:
        raise RuntimeError(f"sandbox: the walls could not be put up: {detail}")
    if status == MEMORY:
        return Outcome(MEMORY, f"more than {memory_mb} MiB")
    return Outcome(status, detail)
