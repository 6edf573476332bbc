"""`python main.py` in a forked process: one to signal and to kill, seconds of imports less."""

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from tests.runs import call_main
from tests.support import ROOT, environment


class Fork(multiprocessing.get_context("fork").Process):  # type: ignore[misc, name-defined]
    """A job in a copy of this process and its modules, which begins as a new process would.

    It has a session of its own, as what a terminal starts has: `os.killpg` reaches its children.
    Its errors go to the file `said`, its output to one beside it that ends in .out.
    """

    def __init__(self, job: Callable[[], object], said: Path, **variables: str) -> None:
        super().__init__()
        self.job, self.said, self.variables = job, said, variables
        self.start()

    def run(self) -> None:
        """In the child."""
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.chdir(ROOT)
        variables = environment(**self.variables)
        os.environ.clear()
        os.environ.update(variables)
        for number, path in ((1, self.said.with_suffix(".out")), (2, self.said)):
            with path.open("w") as file:
                os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
        torch.set_num_threads(1)  # the threads of the parent do not exist here
        self.job()

    def wait(self, seconds: float = 120) -> int:
        """The exit code; minus the number of a signal that ended it."""
        self.join(seconds)
        assert self.exitcode is not None, f"still runs: {self.errors()}"
        return self.exitcode

    def errors(self) -> str:
        """What it has said of errors so far."""
        return self.said.read_text() if self.said.is_file() else ""

    def output(self) -> str:
        """What it has put out so far."""
        return self.said.with_suffix(".out").read_text()


def start_main(
    *arguments: str, said: Path, before: Callable[[], None] = lambda: None, **variables: str
) -> Fork:
    """main.py with arguments, from its first line; `before` runs ahead of it."""

    def job() -> None:
        before()
        sys.exit(call_main(arguments))

    return Fork(job, said, **variables)


def fork_main(*arguments: str, said: Path, **variables: str) -> subprocess.CompletedProcess:
    """`run_main` in a fork."""
    child = start_main(*arguments, said=said, **variables)
    code = child.wait()
    return subprocess.CompletedProcess(arguments, code, child.output(), child.errors())
