"""Answers from an OpenAI-compatible server: vLLM, SGLang, `transformers serve`.

The server is a process of its own that the user has started. Nothing it sends is trusted: an answer
counts only if it has all that was asked for, and everything else is a failure with a reason.
"""

import asyncio
import math
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
from decoding.server_health import Health, Stopped
from decoding.server_protocol import (
    NEUTRAL_SAMPLING,
    BodyReader,
    HttpReply,
    ServerError,
    TooLongError,
    check_address,
    encode_body,
    headers_of,
    load_tokenizer,
    whole_number,
)
from decoding.stop_strings import cut_before
from models.identity import tokenizer_fingerprint

TOKEN_IDS = ("server", "retokenise", "none")
# Fields that the settings of a generation decide, and that are noted by their names.
OWNED = (
    "temperature", "top_p", "top_k", "max_tokens", "messages", "prompt", "n", "stream", "seed",
)  # fmt: skip
_LONGEST_PAUSE_S = 30.0
_SEED_BITS = 31


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
    tokens or text go to `/completions`. Stop strings are sent, and looked for in what comes back,
    because not every server heeds them.

    Args:
        settings: how to answer.
        base_url: address up to and including `/v1`.
        model: what the server calls the model.
        concurrency: requests under way at a time.
        timeout_s: longest wait for one answer.
        retries: further attempts at a request that failed in a way that may pass.
        backoff_s: pause before the first of them; doubled each time.
        max_failures: after so many requests in a row without an answer the server counts as dead.
            Refusals of single requests count only before the first answer, and `concurrency` more
            of them are borne: they are quicker than the answers they are asked beside.
        token_ids: "server" asks for the tokens of an answer by `return_token_ids` (vLLM, SGLang)
            and takes no answer without them, and it tells such a server to leave out whatever the
            model's generation_config.json would do to the distribution; "retokenise" makes them
            from the text, with `tokenizer`; "none" does without.
        tokenizer: folder or name on the hub, for "retokenise".
        extra_body: more fields of every request, none of `OWNED`; null removes one that would be
            sent.
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
        timeout_s: float | int = 600.0,
        retries: int = 4,
        backoff_s: float | int = 0.5,
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
        owned = sorted({*OWNED} & {*(extra_body or {})})
        if owned:
            raise ValueError(
                f"extra_body.{owned[0]}: decided by the settings of mode.*; allowed: other fields"
                f" than {', '.join(OWNED)}"
            )
        self.settings, self.model = settings, model
        self.base_url = check_address(base_url)
        self.concurrency, self.timeout_s, self.retries = concurrency, timeout_s, retries
        self.backoff_s, self.max_failures, self.token_ids = backoff_s, max_failures, token_ids
        self.extra_body = dict(extra_body or {})
        self.tokenizer = None
        if token_ids == "retokenise":
            self.tokenizer = load_tokenizer(tokenizer, "tokenizer")
            if self.tokenizer.eos_token_id is None:
                raise ValueError(f"tokenizer={tokenizer}: has no end token, which ends an answer")
        self._headers = headers_of(api_key_variable)

    def identity(self) -> dict[str, Any]:
        """The model by the server's name for it; what its weights are only the server knows."""
        tokenizer = None if self.tokenizer is None else tokenizer_fingerprint(self.tokenizer)
        return {
            "target": self.model,
            "fingerprint": None,
            "token_ids": self.token_ids,
            "tokenizer": tokenizer,
            "extra_body": self.extra_body,
        }

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationResult]:
        """One result per request, in the order in which the server answers.

        Raises:
            ServerError: `max_failures` requests in a row got no answer.
        """
        # A loop of its own that runs only while results are waited for: no thread, so an exception
        # of a signal handler ends all requests at once.
        runner = asyncio.Runner()
        stopped = Stopped(runner.get_loop())
        try:
            yield from self._generate(iter(requests), runner, stopped)
        finally:
            runner.close()

    def _generate(
        self, incoming: Iterator[GenerationRequest], runner: asyncio.Runner, stopped: Stopped
    ) -> Iterator[GenerationResult]:
        loop = runner.get_loop()
        client = httpx2.AsyncClient(
            headers=self._headers,
            timeout=self.timeout_s,
            limits=httpx2.Limits(max_connections=self.concurrency),
        )
        running: set[asyncio.Task[_Outcome]] = set()
        health = Health(self.max_failures, self.concurrency)
        try:
            while True:
                for request in islice(incoming, self.concurrency - len(running)):
                    running.add(loop.create_task(self._answer(client, request)))
                if not running:
                    return
                with stopped.raising():
                    done, running = runner.run(_first(running))
                outcomes = [task.result() for task in done]
                for outcome in outcomes:
                    health.add(outcome.result.error, outcome.refused)
                    yield outcome.result
                if health.problem:
                    raise ServerError(f"{self.base_url}: {health.problem}")
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
            content = encode_body(self.body(request))
            # The client's own limit is per read; this one is for the whole answer.
            async with asyncio.timeout(self.timeout_s):
                reply = await _post(client, f"{self.base_url}/{path}", content)
        except UnicodeEncodeError as error:
            raise _Failure(
                "the prompt is no Unicode text", transient=False, refused=True
            ) from error
        except TimeoutError as error:
            raise _Failure(f"no answer within {self.timeout_s:g} s") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, TooLongError) as error:
            raise _Failure(f"{type(error).__name__}: {error}".strip(": ")) from error
        _check_status(reply)
        try:
            return self._result(request, reply.json())
        except _Garbage as error:
            raise _Failure(f"{error}: {reply.excerpt()}") from error
        except (
            ValueError, LookupError, TypeError, AttributeError, RecursionError, ArithmeticError,
        ) as error:  # fmt: skip
            raise _Failure(f"not an answer of this protocol: {reply.excerpt()}") from error

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
            text = request.prompt
            fields["prompt"] = list(request.prompt_ids or ()) if text is None else text
            fields |= {"logprobs": 1} if settings.logprobs else {}
        if self.token_ids == "server":
            fields |= {"return_token_ids": True, **NEUTRAL_SAMPLING}
        if settings.temperature > 0.0:
            word = request_key(request.id) ^ settings.seed
            fields |= {"top_p": settings.top_p, "seed": word % (1 << _SEED_BITS)}
            fields |= {"top_k": settings.top_k} if settings.top_k else {}
        if settings.stop_ids is not None:
            fields["stop_token_ids"] = list(settings.stop_ids)
        if settings.stop_strings:
            fields["stop"] = list(settings.stop_strings)
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
        kept = cut_before(text, self.settings.stop_strings)
        result = GenerationResult(
            request.id,
            kept,
            num_tokens=_told_length(reply),
            finish=choice["finish_reason"] if kept == text else "stop",
            logprobs=_logprobs(choice, is_chat) if self.settings.logprobs else None,
        )
        return self._with_tokens(result, choice)

    def _with_tokens(self, result: GenerationResult, choice: Mapping[str, Any]) -> GenerationResult:
        if self.token_ids == "none":
            return result
        if self.tokenizer is not None:
            ids = self.tokenizer.encode(result.text, add_special_tokens=False)
            # The end is no part of the text, but it is what the model wrote; with stop strings
            # nobody tells which end it was.
            ended = result.finish == "stop" and not self.settings.stop_strings
            ids += [self.tokenizer.eos_token_id] if ended else []
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
    if not all(type(value) in (int, float) and math.isfinite(value) for value in values):
        raise _Garbage("logprobs that are no numbers")
    return [float(value) for value in values]


def _told_length(reply: Mapping[str, Any]) -> int:
    """Tokens of an answer; 0 where the server does not tell."""
    told = (reply.get("usage") or {}).get("completion_tokens")
    try:
        return 0 if told is None else whole_number(told, "completion_tokens")
    except ValueError as error:
        raise _Garbage(str(error)) from error


async def _post(client: httpx2.AsyncClient, url: str, content: bytes) -> HttpReply:
    async with client.stream("POST", url, content=content) as response:
        reader = BodyReader()
        async for piece in response.aiter_bytes():
            reader.add(piece)
    return reader.reply(response)


def _check_status(reply: HttpReply) -> None:
    if reply.status != 200:
        raise _Failure(
            f"HTTP {reply.status}: {reply.excerpt()}",
            transient=reply.may_pass,
            pause_s=reply.pause_s,
            refused=not reply.may_pass,
        )


async def _first(
    running: set[asyncio.Task[_Outcome]],
) -> tuple[set[asyncio.Task[_Outcome]], set[asyncio.Task[_Outcome]]]:
    return await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)


async def _stop(running: set[asyncio.Task[_Outcome]], client: httpx2.AsyncClient) -> None:
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    await client.aclose()
