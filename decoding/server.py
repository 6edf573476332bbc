"""Answers from an OpenAI-compatible server: vLLM, SGLang, `transformers serve`.

The server is a process of its own that the user has started. Nothing it sends is trusted: an answer
counts only if it has all that was asked for, and everything else is a failure with a reason.
"""

import asyncio
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import httpx2

from decoding.generate import (
    GenerationRequest,
    GenerationResult,
    GenerationSettings,
    request_key,
)

TOKEN_IDS = ("server", "retokenise", "none")
# The server may have had a bad moment: too busy, restarting, too slow.
_TRANSIENT = (408, 409, 425, 429)
_LONGEST_PAUSE_S = 30.0
_SEED_BITS = 31


class ServerError(ValueError):
    """The server as a whole does not answer; one line with its address and the last reason."""


class _Failure(Exception):
    """Why one attempt at a request failed.

    Args:
        reason: one line.
        transient: whether another attempt may succeed.
        pause_s: how long the server asked to wait.
        refused: the server understood, and refuses this request.
    """

    def __init__(
        self, reason: str, transient: bool = True, pause_s: float = 0.0, refused: bool = False
    ) -> None:
        super().__init__(reason)
        self.transient, self.pause_s, self.refused = transient, pause_s, refused


@dataclass(frozen=True)
class _Outcome:
    result: GenerationResult
    refused: bool = False


class ServerGenerator:
    """A client of one server.

    Conversations go to `/chat/completions`, where the server applies the chat template; prompts of
    tokens go to `/completions`.

    Args:
        settings: how to answer.
        base_url: address up to and including `/v1`.
        model: what the server calls the model.
        concurrency: requests under way at a time.
        timeout_s: longest wait for one answer.
        retries: further attempts at a request that failed in a way that may pass.
        backoff_s: pause before the first of them; doubled each time.
        max_failures: after so many requests in a row without an answer the server counts as dead.
        token_ids: "server" asks for the tokens of an answer by `return_token_ids` (vLLM, SGLang)
            and takes no answer without them; "retokenise" makes them from the text, with
            `tokenizer`; "none" does without.
        tokenizer: folder or name on the hub, for "retokenise".
        extra_body: more fields of every request; null removes one that would be sent.
        api_key_variable: environment variable that holds the key, if the server wants one.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(
        self,
        settings: GenerationSettings,
        base_url: str,
        model: str,
        concurrency: int = 32,
        timeout_s: float = 600.0,
        retries: int = 4,
        backoff_s: float = 0.5,
        max_failures: int = 8,
        token_ids: str = "server",
        tokenizer: str | None = None,
        extra_body: Mapping[str, Any] | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        if token_ids not in TOKEN_IDS:
            raise ValueError(f"token_ids={token_ids}: allowed {', '.join(TOKEN_IDS)}")
        if token_ids == "retokenise" and not tokenizer:
            raise ValueError("token_ids=retokenise: needs tokenizer=FOLDER, that of the target")
        if min(concurrency, timeout_s, max_failures) <= 0 or min(retries, backoff_s) < 0:
            raise ValueError(
                f"concurrency={concurrency}, timeout_s={timeout_s}, max_failures={max_failures},"
                f" retries={retries}, backoff_s={backoff_s}: allowed positive ones, and"
                " retries and backoff_s of 0"
            )
        self.settings, self.model = settings, model
        self.base_url = base_url.rstrip("/")
        self.concurrency, self.timeout_s, self.retries = concurrency, timeout_s, retries
        self.backoff_s, self.max_failures, self.token_ids = backoff_s, max_failures, token_ids
        self.extra_body = dict(extra_body or {})
        self.tokenizer = _load_tokenizer(tokenizer) if token_ids == "retokenise" else None
        key = os.environ.get(api_key_variable)
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}

    def identity(self) -> dict[str, Any]:
        """The model by the server's name for it; what its weights are only the server knows."""
        return {"target": self.model, "fingerprint": None, "token_ids": self.token_ids}

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationResult]:
        """One result per request, in the order in which the server answers.

        Raises:
            ServerError: `max_failures` requests in a row got no answer.
        """
        # A loop of its own that runs only while results are waited for: no thread, so an exception
        # of a signal handler ends all requests at once.
        runner = asyncio.Runner()
        try:
            yield from self._generate(iter(requests), runner)
        finally:
            runner.close()

    def _generate(
        self, incoming: Iterator[GenerationRequest], runner: asyncio.Runner
    ) -> Iterator[GenerationResult]:
        loop = runner.get_loop()
        client = httpx2.AsyncClient(
            headers=self._headers,
            timeout=self.timeout_s,
            limits=httpx2.Limits(max_connections=self.concurrency),
        )
        running: set[asyncio.Task[_Outcome]] = set()
        answered = failed_in_a_row = 0
        try:
            while True:
                for request in islice(incoming, self.concurrency - len(running)):
                    running.add(loop.create_task(self._answer(client, request)))
                if not running:
                    return
                done, running = runner.run(_first(running))
                for outcome in (task.result() for task in done):
                    yield outcome.result
                    if outcome.result.error is None:
                        answered, failed_in_a_row = answered + 1, 0
                    # A server that refuses a single request is alive, if it has ever answered.
                    elif not (outcome.refused and answered):
                        failed_in_a_row += 1
                    if failed_in_a_row >= self.max_failures:
                        raise ServerError(
                            f"{self.base_url}: {failed_in_a_row} requests in a row got no answer,"
                            f" after {answered} that did; the last: {outcome.result.error}"
                        )
        finally:
            runner.run(_stop(running, client))

    async def _answer(self, client: httpx2.AsyncClient, request: GenerationRequest) -> _Outcome:
        """Ask until there is an answer, the attempts are used up, or trying again is pointless."""
        for attempt in range(self.retries + 1):
            try:
                return _Outcome(await self._attempt(client, request))
            except _Failure as failure:
                if attempt == self.retries or not failure.transient:
                    reason = f"{failure} ({attempt + 1} attempts)" if attempt else str(failure)
                    return _Outcome(GenerationResult(request.id, error=reason), failure.refused)
                pause_s = max(self.backoff_s * 2**attempt, failure.pause_s)
            await asyncio.sleep(min(pause_s, _LONGEST_PAUSE_S))
        raise AssertionError("the last attempt returns")

    async def _attempt(
        self, client: httpx2.AsyncClient, request: GenerationRequest
    ) -> GenerationResult:
        path = "chat/completions" if request.messages is not None else "completions"
        try:
            # The client's own limit is per read; this one is for the whole answer.
            async with asyncio.timeout(self.timeout_s):
                response = await client.post(f"{self.base_url}/{path}", json=self.body(request))
        except TimeoutError as error:
            raise _Failure(f"no answer within {self.timeout_s:g} s") from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise _Failure(f"{type(error).__name__}: {error}".strip(": ")) from error
        _check_status(response)
        try:
            return self._result(request, response.json())
        except _Garbage as error:
            raise _Failure(f"{error}: {_excerpt(response)}") from error
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise _Failure(f"not an answer of this protocol: {_excerpt(response)}") from error

    def body(self, request: GenerationRequest) -> dict[str, Any]:
        """The fields of a request; those that not every server knows are sent only where needed."""
        settings = self.settings
        fields: dict[str, Any] = {
            "model": self.model,
            "max_tokens": settings.max_new_tokens,
            "temperature": settings.temperature,
            "stream": False,
        }
        if request.messages is not None:
            fields["messages"] = [dict(message) for message in request.messages]
            fields["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
            fields |= {"logprobs": True} if settings.logprobs else {}
        else:
            fields["prompt"] = list(request.prompt_ids or ())
            fields |= {"logprobs": 1} if settings.logprobs else {}
        if settings.temperature > 0.0:
            word = request_key(request.id) ^ settings.seed
            fields |= {"top_p": settings.top_p, "seed": word % (1 << _SEED_BITS)}
            fields |= {"top_k": settings.top_k} if settings.top_k else {}
        if settings.stop_ids is not None:
            fields["stop_token_ids"] = list(settings.stop_ids)
        if self.token_ids == "server":
            fields["return_token_ids"] = True
        fields |= self.extra_body
        return {name: value for name, value in fields.items() if value is not None}

    def _result(self, request: GenerationRequest, reply: Any) -> GenerationResult:
        """The answer in a reply.

        Raises:
            _Garbage: something in particular is missing.
            KeyError, IndexError, TypeError, AttributeError: it is something else altogether.
        """
        choice = reply["choices"][0]
        is_chat = request.messages is not None
        text = choice["message"]["content"] if is_chat else choice["text"]
        if not isinstance(text, str):
            raise _Garbage("no text")
        if is_chat and any(choice["message"].get(k) for k in ("reasoning_content", "reasoning")):
            raise _Garbage("thoughts apart from the text (start the server without such a parser)")
        if choice["finish_reason"] not in ("stop", "length"):
            raise _Garbage(f"finish_reason={choice['finish_reason']!r}")
        result = GenerationResult(
            request.id,
            text,
            num_tokens=int((reply.get("usage") or {}).get("completion_tokens") or 0),
            finish=choice["finish_reason"],
            logprobs=_logprobs(choice, is_chat) if self.settings.logprobs else None,
        )
        return self._with_tokens(result, choice)

    def _with_tokens(self, result: GenerationResult, choice: Mapping[str, Any]) -> GenerationResult:
        if self.token_ids == "none":
            return result
        if self.tokenizer is not None:
            ids = self.tokenizer.encode(result.text, add_special_tokens=False)
            # The end is no part of the text, but it is what the model wrote.
            ids += [self.tokenizer.eos_token_id] if result.finish == "stop" else []
            return replace(result, token_ids=ids, num_tokens=len(ids), retokenised=True)
        ids = choice.get("token_ids")
        if not isinstance(ids, list) or not all(type(token) is int and token >= 0 for token in ids):
            raise _Garbage("no token ids (allowed: token_ids=retokenise, or none)")
        if result.logprobs is not None and len(result.logprobs) != len(ids):
            raise _Garbage(f"{len(result.logprobs)} logprobs of {len(ids)} tokens")
        return replace(result, token_ids=ids, num_tokens=len(ids))


class _Garbage(Exception):
    """What an answer lacks."""


def _logprobs(choice: Mapping[str, Any], is_chat: bool) -> list[float]:
    found = choice.get("logprobs") or {}
    values = (
        [token["logprob"] for token in found.get("content") or ()]
        if is_chat
        else found.get("token_logprobs")
    )
    if not values:
        raise _Garbage("no logprobs, which this server may not give at all")
    return [float(value) for value in values]


def _check_status(response: httpx2.Response) -> None:
    status = response.status_code
    if status == 200:
        return
    transient = status >= 500 or status in _TRANSIENT
    pause = response.headers.get("retry-after", "")
    raise _Failure(
        f"HTTP {status}: {_excerpt(response)}",
        transient=transient,
        pause_s=float(pause) if pause.isdigit() else 0.0,
        refused=not transient,
    )


def _excerpt(response: httpx2.Response, length: int = 200) -> str:
    return " ".join(response.text[: 4 * length].split())[:length] or "an empty reply"


def _load_tokenizer(source: str | None) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"tokenizer={source}: cannot be loaded ({reason})") from error


async def _first(
    running: set[asyncio.Task[_Outcome]],
) -> tuple[set[asyncio.Task[_Outcome]], set[asyncio.Task[_Outcome]]]:
    return await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)


async def _stop(running: set[asyncio.Task[_Outcome]], client: httpx2.AsyncClient) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.aclose()
