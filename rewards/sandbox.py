"""Running a program that nobody has read: a process for it, walled in, with a limit on everything.

A program gets the standard library and nothing else: no network, no other processes, no files but
those of its own small folder, an empty environment, and one hash seed, so that a run can be
repeated. What it prints is lost. The walls and which of them a system must have are described in
`rewards.jail.walls`.

Its tests run in another process, behind the same walls, which asks for the values of a function and
alone reports (`rewards.jail.trial`). Whatever a program writes and wherever, it passes by values
that the tests hold right; nothing in its process knows which these are.

Not promised: that nothing can be read. Where the kernel has Landlock a program reads only Python
and the system's libraries; elsewhere it reads what its user can, but has nowhere to send it to. On
a kernel with neither Landlock nor namespaces of users nor Yama that is the memory of the process
that started it as well, where the tests are. Nor that a program without tests has run to its end:
that is its own word.
"""

import functools
import json
import os
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
    MEMORY,
    PASSED,
    REFUSED,
    TIMEOUT,
    decode_report,
    how_it_ended,
    read_until,
)

Status = Literal["passed", "failed", "timeout", "memory", "killed"]

_ROOT = Path(__file__).resolve().parents[1]
_START = (
    "import sys; sys.path.insert(0, sys.argv[1]); from rewards.jail.trial import main;"
    " del sys.path[0]; main(sys.argv[2])"
)
# No site-packages, no folder of the user's, nothing of the environment, no bytecode written.
_OPTIONS = ("-P", "-s", "-S", "-B")
_ENVIRONMENT = {"PYTHONHASHSEED": "0", "PYTHONUTF8": "1"}
# The process that tests keeps the limit itself, unless its tests hang where no signal is heard.
_GRACE_S = 1.0
# The interpreter itself needs some of it.
LEAST_MEMORY_MB = 64


@dataclass(frozen=True)
class Outcome:
    """How a program ended.

    Attributes:
        status: "passed": its tests ran to their end; without any, it says that it did. "failed":
            an exception, or an end before the end. "timeout", "memory": a limit. "killed": by a
            signal.
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
    """Run a program, then tests of it that it can neither change nor see (`rewards.jail.trial`).

    Args:
        program: its text.
        tests: their text, in a namespace of its own.
        entry_point: a function of the program, which the tests know as `candidate`; plain values
            go in and come out (`rewards.jail.values`), as copies.
        timeout_s: limit in seconds of wall-clock time, the start of the processes included.
        memory_mb: limit in MiB of the address space of either process, the interpreter included.
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
    limits = {
        "memory_mb": memory_mb, "cpu_s": ceil(timeout_s) + 1, "network": allow_network,
        "without": without,
    }  # fmt: skip
    job = {"program": program, "tests": tests, "entry_point": entry_point}
    report, code = _start(job, limits, timeout_s)
    return _outcome(report, code, timeout_s, memory_mb)


@functools.cache
def find_walls(without: tuple[str, ...] = ()) -> tuple[str, ...]:
    """The walls that this system can put up, found out once by a process that runs nothing.

    Raises:
        ValueError: it lacks one that programs are not run without.
    """
    if not sys.platform.startswith("linux"):
        raise ValueError(f"sandbox: what models write is run on Linux only; this is {sys.platform}")
    limits = {"memory_mb": 512, "cpu_s": 60, "network": False, "without": without}
    job = {"program": "", "tests": "", "entry_point": None}
    report, code = _start(job, limits, timeout_s=60)
    if not report or report[0] != PASSED:
        reason = report[1] if report else f"no report, exit code {code}"
        raise ValueError(
            f"sandbox: no programs are run here, the walls around them cannot be put up ({reason});"
            " needed at least: seccomp, on x86_64 or aarch64"
        )
    return tuple(report[2])


def _start(
    job: dict[str, Any], limits: dict[str, Any], timeout_s: float
) -> tuple[list[Any] | None, int | None]:
    """Run the processes of a job to their end.

    Returns:
        Their report, if they made one; the exit code of the one that reports, None if it was still
        running long after the deadline.
    """
    deadline = time.monotonic() + timeout_s
    folder = tempfile.mkdtemp(prefix="sandbox-")
    file = os.memfd_create("job")
    try:
        with open(file, "w", closefd=False) as stream:
            json.dump(job | {"deadline": deadline}, stream)
        os.lseek(file, 0, os.SEEK_SET)
        command = [sys.executable, *_OPTIONS, "-c", _START, str(_ROOT), json.dumps(limits)]
        process = subprocess.Popen(
            command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=folder,
            env=_ENVIRONMENT, start_new_session=True,
        )  # fmt: skip
        data = _await(process, deadline + _GRACE_S)
    finally:
        os.close(file)
        os.rmdir(folder)
    if data is None:
        return None, None
    return decode_report(data), process.returncode


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
    if report is not None:
        status, detail = report[:2]
    else:
        status, detail = (TIMEOUT, "") if code is None else how_it_ended(code)
    if status == REFUSED:
        raise RuntimeError(f"sandbox: the walls could not be put up: {detail}")
    if status == TIMEOUT:
        return Outcome(TIMEOUT, f"timed out after {timeout_s:g} s")
    if status == MEMORY:
        return Outcome(MEMORY, f"more than {memory_mb} MiB")
    return Outcome(status, detail)
