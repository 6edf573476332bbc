"""A process that runs one program and then answers calls of its function.

Nothing of the tests is in here: not their text, not what they expect, not the way to report. Calls
come in on one pipe, and what is written to the other is only ever taken for what the function
returned or raised (`rewards.jail.trial`).
"""

import json
import os
import sys
import types
from collections.abc import Callable, Sequence
from typing import Any, BinaryIO

from rewards.jail.channel import FAILED, MEMORY, REFUSED, describe, keep_only
from rewards.jail.values import decode, encode
from rewards.jail.walls import refuse_calls

# What the process says: its walls are up; the program has run to its end; what a call has come to.
WALLED, READY, VALUE, RAISED = "walled", "ready", "value", "raised"
# Given back when memory is short, so that this can be said.
_RESERVE_BYTES = 2**22


def main(calls: int, answers: int, parent: int, walls: list[str], network: bool) -> None:
    """What the fork does: put up the last wall, run, answer; it never returns.

    Args:
        calls: descriptor of the pipe that the program and the calls come from, a line each.
        answers: descriptor of the pipe for what the process says, a line each.
        parent: the process that forked.
        walls: those that stand already.
        network: leave the network open.
    """
    code = 1
    try:
        keep_only(calls, answers)
        say = _speaker(answers)
        try:
            refuse_calls(walls, network)
        except Exception as error:
            say(REFUSED, describe(error))
            return
        # Whoever has lost its parent before it was bound to it ends by itself.
        if os.getppid() == parent:
            say(WALLED)
            with open(calls, "rb") as lines:
                _serve(lines, say)
            code = 0
    finally:
        os._exit(code)


def _speaker(answers: int) -> Callable[..., None]:
    # A program may put others in their places.
    dumps, write = json.dumps, os.write

    def say(*message: Any) -> None:
        """Write a line of JSON."""
        rest = memoryview(dumps(message).encode() + b"\n")
        while rest:
            rest = rest[write(answers, rest) :]

    return say


def _serve(lines: BinaryIO, say: Callable[..., None]) -> None:
    """Run the program, answer the calls until there are no more, and end as Python ends."""
    reserve = bytearray(_RESERVE_BYTES)
    try:
        function = _run(**json.loads(lines.readline()))
    except MemoryError:
        del reserve
        say(MEMORY)
        return
    except BaseException as error:
        say(FAILED, describe(error))
        return
    say(READY)
    for line in lines:
        try:
            message = [VALUE, _call(function, json.loads(line))]
        except MemoryError:
            del reserve
            message = [RAISED, "MemoryError", []]
        except BaseException as error:
            message = [RAISED, type(error).__name__, _arguments(error)]
        say(*message)
    _join_threads()


def _run(program: str, entry_point: str | None) -> Callable | None:
    """Run a program; its function, if one is wanted.

    Raises:
        LookupError: there is none.
    """
    module = types.ModuleType("program")
    # Found by its name, as dataclasses do.
    sys.modules["program"] = module
    space = vars(module)
    exec(compile(program, "<program>", "exec", dont_inherit=True), space)
    if entry_point is None:
        return None
    if entry_point not in space:
        raise LookupError(f"the program has no {entry_point}")
    return space[entry_point]


def _call(function: Callable | None, call: Sequence[Any]) -> Any:
    assert function is not None
    arguments, named = map(decode, call)
    return encode(function(*arguments, **named))


def _arguments(error: BaseException) -> list[Any]:
    """What an exception was made with; its text if that is not plain."""
    try:
        return [encode(argument) for argument in error.args]
    except Exception:
        return [describe(error)]


def _join_threads() -> None:
    """Wait for those that a program waits for before it ends."""
    threading = sys.modules.get("threading")
    if threading is not None:
        for thread in threading.enumerate():
            if thread is not threading.main_thread() and not thread.daemon:
                thread.join()
