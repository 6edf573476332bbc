"""A process that tests a program: it starts a fork for it, asks it, and alone reports.

A program cannot say that it has passed. It runs in the fork (`rewards.jail.program`), which gets
its text and the arguments of calls, and has neither the tests nor the pipe that reports go to. What
the fork says is taken for what the function under test has returned or raised, as plain values
(`rewards.jail.values`); so it passes by right values only. The builtins and modules that tests see
are of this process, which runs nothing of the program. Arguments cross as copies: tests do not see
what the function does to them.

Of a program without tests "passed" is its own word, namely that it has run to its end.
"""

import builtins
import json
import os
import signal
import time
from contextlib import suppress
from typing import Any, NoReturn

from rewards.jail.channel import (
    CANDIDATE,
    FAILED,
    MEMORY,
    PASSED,
    REFUSED,
    TIMEOUT,
    describe,
    how_it_ended,
    keep_only,
    one_line,
)
from rewards.jail.program import RAISED, READY, VALUE, WALLED
from rewards.jail.program import main as run_program
from rewards.jail.values import decode, encode
from rewards.jail.walls import SECCOMP, refuse_calls, surround

_TESTS = "<tests>"
# A value that takes longer than that, in JSON, is none that a test expects.
MAX_ANSWER = 2**24
# Given back when memory is short, so that this can be reported.
_RESERVE_BYTES = 2**22


def main(limits: str) -> NoReturn:
    """Put up the walls, fork, read the job, test, report.

    Args:
        limits: arguments of `surround`, as JSON.
    """
    report, settings = os.dup(1), json.loads(limits)
    trial = Trial(report)
    try:
        trial.start(surround(**settings, folder=True), settings["network"])
        # After the fork, which is not to know it.
        with open(0, "rb", closefd=False) as file:
            job = json.load(file)
        trial.shut()
    except Exception as error:
        trial.finish(REFUSED, describe(error))
    trial.judge(**job)


class Trial:
    """One program, and what its tests say.

    Args:
        report: descriptor that the report is written to.
    """

    def __init__(self, report: int) -> None:
        self._report = report
        self._walls: list[str] = []
        self._child: int | None = None

    def start(self, walls: list[str], network: bool) -> None:
        """Fork.

        Args:
            walls: those that stand already.
            network: leave the network open.
        """
        self._walls, self._network = walls, network
        (calls, give_calls), (answers, give_answers) = os.pipe(), os.pipe()
        parent, self._child = os.getpid(), os.fork()
        if self._child == 0:
            run_program(calls, give_answers, parent, walls, network)
        # They end with this process.
        self._calls = os.fdopen(give_calls, "wb")
        self._answers = os.fdopen(answers, "rb")

    def shut(self) -> None:
        """Keep what is needed, and put up the last wall.

        Raises:
            OSError: there is no seccomp.
        """
        keep_only(self._report, self._calls.fileno(), self._answers.fileno())
        refuse_calls(self._walls, self._network, self._child)
        self._walls = [SECCOMP, *self._walls]

    def judge(self, program: str, tests: str, entry_point: str | None, deadline: float) -> NoReturn:
        """Run the program, then its tests in a namespace of their own.

        Args:
            program: its text.
            tests: their text; "": none.
            entry_point: a name of the program, which the tests know as `candidate`.
            deadline: of `time.monotonic`.
        """
        signal.signal(signal.SIGALRM, lambda *_: self.finish(TIMEOUT))
        signal.setitimer(signal.ITIMER_REAL, max(1e-6, deadline - time.monotonic()))
        # Nothing of a program has run before this word.
        word, *why = self._hear()
        if word != WALLED:
            self.finish(REFUSED, *why)
        self._say({"program": program, "entry_point": entry_point})
        reserve = bytearray(_RESERVE_BYTES)
        try:
            code = compile(tests, _TESTS, "exec", dont_inherit=True)
            self._await_the_program()
            known: dict[str, Any] = {"__builtins__": dict(vars(builtins)), "__name__": "tests"}
            if entry_point is not None:
                known[CANDIDATE] = self._candidate
            exec(code, known)
        except MemoryError:
            del reserve
            self.finish(MEMORY)
        except BaseException as error:
            self.finish(FAILED, _described(error))
        self._calls.close()
        self._end(in_order=True)

    def finish(self, status: str, detail: str = "") -> NoReturn:
        """End the program, report, and end."""
        signal.signal(signal.SIGALRM, signal.SIG_IGN)
        try:
            with suppress(OSError):
                self._stop()
            os.write(self._report, json.dumps([status, detail, self._walls]).encode())
        finally:
            os._exit(0)

    def _await_the_program(self) -> None:
        word, *why = self._hear()
        if word == MEMORY:
            self.finish(MEMORY)
        if word == FAILED and len(why) == 1 and isinstance(why[0], str):
            self.finish(FAILED, one_line(why[0]))
        if word != READY:
            self._do_not_understand()

    def _candidate(self, *arguments: Any, **named: Any) -> Any:
        """The function under test, as the tests see it."""
        self._say([encode(list(arguments)), encode(named)])
        word, *rest = self._hear()
        try:
            if word == VALUE:
                (value,) = map(decode, rest)
            elif word == RAISED:
                name, made_with = rest
                value = _exception(name, [decode(part) for part in made_with])
            else:
                self._do_not_understand()
        except (ValueError, TypeError, RecursionError):
            self._do_not_understand()
        if word == RAISED:
            raise value
        return value

    def _say(self, message: Any) -> None:
        try:
            self._calls.write(json.dumps(message).encode() + b"\n")
            self._calls.flush()
        except BrokenPipeError:
            self._end()

    def _hear(self) -> list[Any]:
        """What the program's process says next; it is nobody's word but the program's."""
        line = self._answers.readline(MAX_ANSWER)
        if not line:
            self._end()
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, list) or not message:
            self._do_not_understand()
        return message

    def _do_not_understand(self) -> NoReturn:
        self.finish(FAILED, "what the program's process said is no answer")

    def _end(self, in_order: bool = False) -> NoReturn:
        """The program's process has ended, or has closed its pipes.

        Args:
            in_order: it was asked to, and may take its time.
        """
        code = self._stop(kill=not in_order)
        if in_order and code == 0:
            self.finish(PASSED)
        self.finish(*how_it_ended(code))

    def _stop(self, kill: bool = True) -> int:
        """End the program's process; its exit code, that of its own end if it had come to it."""
        if self._child is None:
            return 0
        if kill:
            os.kill(self._child, signal.SIGKILL)
        _, status = os.waitpid(self._child, 0)
        self._child = None
        return os.waitstatus_to_exitcode(status)


def _exception(name: str, made_with: list[Any]) -> Exception:
    """An exception of the program's as one of ours.

    Raises:
        TypeError, ValueError: the name is none.
    """
    kind: Any = getattr(builtins, name, None)
    # A StopIteration would end a loop of the tests early.
    never = (StopIteration, StopAsyncIteration)
    if not isinstance(kind, type) or not issubclass(kind, Exception) or issubclass(kind, never):
        kind = type(name, (Exception,), {})
    try:
        return kind(*made_with)
    except TypeError:
        return Exception(f"{name}: {made_with}")


def _described(error: BaseException) -> str:
    """One line about an exception, and where in the tests it came up."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _TESTS:
            where = f" (line {trace.tb_lineno} of the tests)"
        trace = trace.tb_next
    return describe(error) + where
