"""A process that runs one program and then its tests, and reports what came of them.

The tests do not trust the program. They are compiled on their own, so that no open string of the
program swallows them; they see the builtins and modules of before; and of the function under test
they get plain values only, because an object of the program's own could equal everything. A
program that looks for the caller's frames or memory is not stopped by this, only by the walls.
"""

import builtins
import sys
import types
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

from rewards.jail.channel import (
    CANDIDATE,
    FAILED,
    MEMORY,
    PASSED,
    REFUSED,
    Channel,
    close_others,
    describe,
    read_job,
)
from rewards.jail.walls import put_up

_PROGRAM, _TESTS = "<program>", "<tests>"
# Given back when memory is short, so that this can be reported.
_RESERVE_BYTES = 2**22


def main() -> None:
    """Read the job, put up the walls, run, report."""
    job = read_job(0)
    channel = Channel(report=1, token=0)
    close_others()
    try:
        walls = put_up(**job["walls"], folder=True)
    except Exception as error:
        channel.send(REFUSED, describe(error))
    status, detail = run(job["program"], job["tests"], job["entry_point"])
    channel.send(status, detail, walls)


def run(program: str, tests: str, entry_point: str | None) -> tuple[str, str]:
    """Run a program, then its tests in a namespace of their own.

    Args:
        program: its text.
        tests: their text; "": none.
        entry_point: a name of the program, which the tests know as `candidate`.

    Returns:
        How it ended, and a line about it.
    """
    modules, names = dict(sys.modules), dict(vars(builtins))
    plain, reserve = plain_values(), bytearray(_RESERVE_BYTES)
    try:
        space = _module("program")
        exec(compile(program, _PROGRAM, "exec", dont_inherit=True), space)
        threading = sys.modules.get("threading")
        sys.modules.clear()
        sys.modules.update(modules)
        known: dict[str, Any] = {"__builtins__": names, "__name__": "tests"}
        if entry_point is not None:
            if entry_point not in space:
                return FAILED, f"the program has no {entry_point}"
            known[CANDIDATE] = plain(space[entry_point])
        exec(compile(tests, _TESTS, "exec", dont_inherit=True), known)
        if threading is not None:
            _join_threads(threading)
    except MemoryError:
        del reserve
        return MEMORY, "more memory than allowed"
    except BaseException as error:
        return FAILED, _described(error)
    return PASSED, ""


def _join_threads(threading: Any) -> None:
    """Wait for those that a program waits for before it ends."""
    for thread in threading.enumerate():
        if thread is not threading.main_thread() and not thread.daemon:
            thread.join()


def _module(name: str) -> dict[str, Any]:
    """The namespace of a module that can be found by its name, as dataclasses do."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return vars(module)


def plain_values() -> Callable[[Callable], Callable]:
    """A wrapper of functions that lets plain values pass, and refuses others by TypeError.

    Everything it uses is looked up here and now, before the program can put anything in its place.
    """
    scalars = frozenset((bool, int, float, complex, str, bytes, range, type(None)))
    sequences = frozenset((list, tuple, set, frozenset))
    mappings = frozenset((dict, Counter, OrderedDict, defaultdict))
    kind_of, items, make, error = type, dict.items, dict, TypeError

    def plain(value: Any) -> Any:
        """A copy made of Python's own types."""
        kind = kind_of(value)
        if kind in scalars:
            return value
        if kind in sequences:
            return kind([plain(part) for part in value])
        if kind in mappings:
            return make([(plain(key), plain(part)) for key, part in items(value)])
        raise error("the function returned an object that is no plain value")

    def wrap(function: Callable) -> Callable:
        """The function, of which only plain values come."""

        def call(*arguments: Any, **named: Any) -> Any:
            """Call it."""
            return plain(function(*arguments, **named))

        return call

    return wrap


def _described(error: BaseException) -> str:
    """One line about an exception, and where in the tests it came up."""
    trace, where = error.__traceback__, ""
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == _TESTS:
            where = f" (line {trace.tb_lineno} of the tests)"
        trace = trace.tb_next
    return describe(error) + where
