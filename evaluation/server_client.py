"""Requests of a measurement to one server: several at a time, tried again, ended if it is dead."""

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx2

from data.errors import DataError
from decoding.server_health import Health
from decoding.server_protocol import (
    BodyReader,
    HttpReply,
    ServerError,
    TooLongError,
    check_address,
    encode_body,
    headers_of,
)
from evaluation.acceptance import LENGTH, STOP
from evaluation.answering import Question, Reply

ATTEMPTS = 3
_PAUSE_S, _LONGEST_PAUSE_S = 0.2, 30.0


class RefusedError(ValueError):
    """Why a question has no answer, and would have none if it were asked again."""


class ServerClient:
    """A client of one server.

    Args:
        base_url: its address, without a user or a password.
        concurrency: requests at a time.
        timeout_s: of one request.
        max_failures: after so many questions in a row without an answer the server counts as dead.
        api_key_variable: environment variable that holds the key, if the server wants one.

    Raises:
        DataError: a number outside its range.
    """

    def __init__(
        self,
        base_url: str,
        concurrency: int,
        timeout_s: float,
        max_failures: int,
        api_key_variable: str,
    ) -> None:
        if min(concurrency, max_failures) < 1 or not timeout_s > 0:
            raise DataError(
                "mode.server: concurrency and max_failures must be at least 1, timeout_s above 0"
            )
        self.base_url, self.concurrency = check_address(base_url), concurrency
        self._http = httpx2.Client(timeout=timeout_s, headers=headers_of(api_key_variable))
        self._lock = threading.Lock()
        self._health = Health(max_failures, concurrency)

    def close(self) -> None:
        """Let go of the connections."""
        self._http.close()

    def every(self, ask: Callable[[Question], Reply], questions: Sequence[Question]) -> list[Reply]:
        """One reply per question; what goes wrong with one is its reply's error."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda question: self._safely(ask, question), questions))

    def check_alive(self) -> None:
        """Raise ServerError if too many questions in a row got no answer."""
        if self._health.problem is not None:
            raise ServerError(f"{self.base_url}: {self._health.problem}")

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """The answer of a request as JSON.

        Raises:
            RefusedError: the server understood, and refuses; or the request cannot be sent.
            ValueError: no answer, one of another status than 200, or no object.
        """
        try:
            content = encode_body(body)
        except UnicodeEncodeError as error:
            raise RefusedError("the prompt is no Unicode text") from error
        found = self._exchange("POST", path, content).json()
        if not isinstance(found, dict):
            raise ValueError("the reply is no JSON object")
        return found

    def get(self, path: str) -> HttpReply:
        """A page.

        Raises:
            DataError: the server does not answer.
        """
        try:
            return self._exchange("GET", path, None)
        except (httpx2.HTTPError, httpx2.InvalidURL, ValueError) as error:
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"mode.server.base_url={self.base_url}{path}: {reason}") from error

    def _exchange(self, method: str, path: str, content: bytes | None) -> HttpReply:
        reader = BodyReader()
        try:
            with self._http.stream(method, f"{self.base_url}{path}", content=content) as response:
                for piece in response.iter_bytes():
                    reader.add(piece)
        except TooLongError as error:
            raise ValueError(str(error)) from error
        reply = reader.reply(response)
        if reply.status != 200:
            kind = _BusyError if reply.may_pass else RefusedError
            raise kind(f"HTTP {reply.status}: {reply.excerpt()}", reply.pause_s)
        return reply

    def _safely(self, ask: Callable[[Question], Reply], question: Question) -> Reply:
        problem = self._health.problem
        if problem is not None:
            return Reply(error=f"{self.base_url}: not asked, because {problem}")
        reason, refused = "", False
        for attempt in range(ATTEMPTS):
            try:
                reply = ask(question)
            except RefusedError as error:
                reason, refused = _reason(error), True
                break
            except (
                httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError, TypeError,
                AttributeError, ArithmeticError, RecursionError,
            ) as error:  # fmt: skip
                reason = _reason(error)
                if attempt + 1 < ATTEMPTS:
                    time.sleep(_pause_s(error, attempt))
            else:
                self._note(None)
                return reply
        self._note(reason, refused)
        return Reply(error=f"{self.base_url}: {reason}")

    def _note(self, error: str | None, refused: bool = False) -> None:
        with self._lock:
            self._health.add(error, refused)


class _BusyError(ValueError):
    """A status that may pass; the second argument is the pause that the server asks for."""


def _pause_s(error: Exception, attempt: int) -> float:
    asked = error.args[1] if isinstance(error, _BusyError) else 0.0
    return min(max(_PAUSE_S * 2**attempt, asked), _LONGEST_PAUSE_S)


def _reason(error: Exception) -> str:
    text = str(error.args[0]) if isinstance(error, _BusyError | RefusedError) else str(error)
    return f"{type(error).__name__}: {' '.join(text.split())}"[:300]


def known_finish(reason: object) -> str:
    """How an answer ended.

    Raises:
        ValueError: not as answers do: aborted, with a call of a tool, or nothing is said of it.
    """
    if reason in (STOP, LENGTH):
        return str(reason)
    raise ValueError(f"finish_reason={reason!r}: no answer, which ends with {STOP} or {LENGTH}")
