"""What the clients of servers have in common: addresses, keys, replies, and numbers in replies."""

import json
import math
import os
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx2

# Answers take kilobytes; what is longer is not one.
MOST_BYTES = 64 * 2**20
# Statuses below 500 that may pass: the server is too busy, or is just starting.
_TRANSIENT = (408, 409, 425, 429)
# vLLM and SGLang take what a request leaves open from the model's generation_config.json, which may
# cut or reshape the distribution: a penalty changes even greedy answers. -1 is "no limit" in both.
NEUTRAL_SAMPLING = {
    "top_p": 1.0,
    "top_k": -1,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
}


class ServerError(ValueError):
    """The server as a whole does not answer; one line with its address and the last reason."""


@dataclass(frozen=True)
class HttpReply:
    """What came back for a request, whole.

    Attributes:
        status: of HTTP.
        body: the bytes, unpacked.
        pause_s: how long the server asks to wait.
    """

    status: int
    body: bytes
    pause_s: float = 0.0

    @property
    def may_pass(self) -> bool:
        """Whether another attempt may succeed: the server had a bad moment."""
        return self.status >= 500 or self.status in _TRANSIENT

    def json(self) -> Any:
        """The body as JSON; ValueError or RecursionError where it is none."""
        return json.loads(self.body)

    def excerpt(self, length: int = 200) -> str:
        """The beginning of the body in one line."""
        text = self.body[: 4 * length].decode("utf-8", "replace")
        return " ".join(text.split())[:length] or "an empty reply"


class TooLongError(Exception):
    """A reply longer than any answer."""

    def __init__(self) -> None:
        super().__init__(f"a reply of more than {MOST_BYTES} bytes")


class BodyReader:
    """Collects the pieces of a body as they come.

    Raises:
        TooLongError: by `add`, above `MOST_BYTES`.
    """

    def __init__(self) -> None:
        self._body = bytearray()

    def add(self, piece: bytes) -> None:
        """The next piece."""
        self._body += piece
        if len(self._body) > MOST_BYTES:
            raise TooLongError

    def reply(self, response: httpx2.Response) -> HttpReply:
        """All of it."""
        pause = response.headers.get("retry-after", "")
        is_number = pause.isascii() and pause.isdigit()
        return HttpReply(
            response.status_code, bytes(self._body), float(pause[:9]) if is_number else 0.0
        )


def encode_body(fields: dict[str, Any]) -> bytes:
    """A request as UTF-8.

    Raises:
        UnicodeEncodeError: half a surrogate pair, which UTF-8 has not.
    """
    return json.dumps(fields, ensure_ascii=False).encode()


def check_address(base_url: str) -> str:
    """The address without its last stroke.

    Raises:
        ValueError: a user or a password in it, which would get into logs and conditions.
    """
    if "@" in urlsplit(base_url).netloc:
        raise ValueError(
            "base_url: has a user or a password in it; allowed: an address without, and a key in"
            " the environment variable that api_key_variable names"
        )
    return base_url.rstrip("/")


def headers_of(api_key_variable: str) -> dict[str, str]:
    """Of every request, with the key that an environment variable holds, if it holds one."""
    key = os.environ.get(api_key_variable)
    bearer = {"Authorization": f"Bearer {key}"} if key else {}
    return {"Content-Type": "application/json"} | bearer


def whole_number(value: Any, name: str) -> int:
    """A count out of a reply.

    Raises:
        ValueError: not an integer, or below 0.
    """
    if isinstance(value, float) and math.isfinite(value) and value == int(value):
        value = int(value)
    if type(value) is not int or value < 0:
        raise ValueError(f"{name}={value!r}, which is no count")
    return value


def load_tokenizer(source: str | None, key: str) -> Any:
    """The tokenizer of a folder or a name on the hub; code in it is never run.

    Raises:
        ValueError: it cannot be loaded; `key` is the option that names it.
    """
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"{key}={source}: cannot be loaded ({reason})") from error
