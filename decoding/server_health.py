"""Whether a server is alive, and whether this process has been told to stop meanwhile."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Health:
    """Whether a server is alive, by how its requests end.

    A server that refuses a single request is alive, if it ever answers. Before the first answer
    refusals count, but some more of them are borne: they are quicker than the answers they are
    asked beside.

    Args:
        max_failures: requests in a row without an answer that make a server dead.
        concurrency: refusals borne besides, before the first answer.

    Attributes:
        problem: why it counts as dead; None while it does not.
    """

    def __init__(self, max_failures: int, concurrency: int) -> None:
        self._max_failures, self._max_silent = max_failures, max_failures + concurrency
        self._answered = self._failed = self._refused = 0
        self.problem: str | None = None

    def add(self, error: str | None, refused: bool = False) -> None:
        """The next request has ended: with an answer, or with an error, maybe a refusal."""
        if error is None:
            self._answered += 1
            self._failed, self._refused, self.problem = 0, 0, None
            return
        if refused:
            self._refused += not self._answered
        else:
            self._failed += 1
        silent = self._failed + self._refused
        if self._failed >= self._max_failures or silent >= self._max_silent:
            self.problem = (
                f"{silent} requests in a row got no answer, after {self._answered} that did; the"
                f" last: {error}"
            )


class Stopped:
    """What a signal handler raises inside of a callback, where the loop would only log it."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._raised: BaseException | None = None
        loop.set_exception_handler(self._note)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Around a run of the loop."""
        try:
            yield
        except RuntimeError:
            # The loop was stopped below, before what it was to wait for had come.
            if self._raised is None:
                raise
        if self._raised is not None:
            raise self._raised

    def _note(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if error is None or isinstance(error, Exception):
            loop.default_exception_handler(context)
            return
        self._raised = error
        # The callback it fell into is lost, and with it what would have ended the wait.
        loop.stop()
