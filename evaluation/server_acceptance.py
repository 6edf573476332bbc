"""Acceptance of a draft that a server runs: SGLang tells it per request, vLLM in counters.

Read from the servers' documentation and tried against servers of the tests that answer in these
formats; never tried against a real SGLang or vLLM.

    SGLang  POST /generate {input_ids, sampling_params} -> {text, output_ids, meta_info:
            {completion_tokens, spec_verify_ct, spec_accept_length, finish_reason: {type}}}.
            `spec_accept_length` is completion_tokens / spec_verify_ct, with the prefill's token.
            GET /get_server_info -> {speculative_draft_model_path}.
    vLLM    POST /v1/chat/completions -> {choices: [{message: {content}, finish_reason}], usage:
            {completion_tokens}}, and GET /metrics (Prometheus) with the counters
            vllm:spec_decode_num_drafts_total, vllm:spec_decode_num_accepted_tokens_total and
            vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"}; with d drafts
            accepted_per_pos / d is cumulative already (`evaluation.server_counters`).

vLLM's counters are the server's: nobody else may use it during a measurement, there are no rows per
request and no intervals.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

from data.errors import DataError
from decoding.server_protocol import NEUTRAL_SAMPLING, load_tokenizer, whole_number
from evaluation.answering import Question, Reply
from evaluation.server_client import RefusedError, ServerClient, known_finish
from evaluation.server_counters import Counters, parse_counters
from models.identity import tokenizer_fingerprint


@runtime_checkable
class RemoteAnswerer(Protocol):
    """An answerer that is a server."""

    def identity(self) -> dict[str, Any]:
        """`draft`, its name, None where nobody tells; `tokenizer`, the fingerprint of the one that
        the conversations are encoded with, None where the server does it."""
        ...

    def check_alive(self) -> None:
        """Raise ServerError once the server counts as dead."""
        ...

    def close(self) -> None:
        """Let go of the connections."""
        ...


class _Server:
    """What answerers that are servers share.

    Args:
        client: of the server.
        drafted: K.
        draft: the draft's name, None where nobody gave one.
    """

    def __init__(self, client: ServerClient, drafted: int, draft: str | None) -> None:
        self._client, self.drafted, self._draft = client, drafted, draft

    def check_alive(self) -> None:
        """Raise ServerError once too many questions in a row got no answer."""
        self._client.check_alive()

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """Greedy answers."""
        return self._client.every(self._ask, questions)

    def _ask(self, question: Question) -> Reply:
        raise NotImplementedError


class SglangServer(_Server):
    """A server started with `--speculative-algorithm DFLASH`, as an answerer.

    Args:
        base_url: such as http://127.0.0.1:30000.
        tokenizer: folder or hub name of the target's, with its chat template.
        drafted: K: `--speculative-num-draft-tokens` less one, because SGLang counts the anchor.
        max_new_tokens, thinking: of every answer.
        draft: the draft's name; None asks the server.
        concurrency: requests at a time.
        timeout_s: of one request.
        max_failures, api_key_variable: see `evaluation.server_client.ServerClient`.
    """

    def __init__(
        self,
        base_url: str,
        tokenizer: str,
        drafted: int,
        max_new_tokens: int,
        thinking: bool = False,
        draft: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 600.0,
        max_failures: int = 8,
        api_key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        client = ServerClient(base_url, concurrency, timeout_s, max_failures, api_key_variable)
        super().__init__(client, drafted, draft)
        self._tokenizer = load_tokenizer(tokenizer, "mode.server.tokenizer")
        self._thinking = thinking
        self._sampling = {
            "temperature": 0.0,
            "max_new_tokens": max_new_tokens,
            **NEUTRAL_SAMPLING,
        }

    def identity(self) -> dict[str, Any]:
        """The draft as it was named, or as the server was started with it."""
        draft = self._draft or self._told_draft()
        return {"draft": draft, "tokenizer": tokenizer_fingerprint(self._tokenizer)}

    def _ask(self, question: Question) -> Reply:
        body = {"input_ids": self._encode(question), "sampling_params": self._sampling}
        found = self._client.post("/generate", body)
        meta = found["meta_info"]
        if "spec_verify_ct" not in meta:
            raise RefusedError("no spec_verify_ct in meta_info: the server runs without a draft")
        # An aborted request has no reason, or one of another type.
        ended = meta["finish_reason"]
        finish = known_finish(ended.get("type") if isinstance(ended, dict) else ended)
        return Reply(
            text=_text(found["text"]),
            token_ids=found.get("output_ids"),
            tokens=whole_number(meta["completion_tokens"], "completion_tokens"),
            cycles=whole_number(meta["spec_verify_ct"], "spec_verify_ct"),
            finish=finish,
        )

    def _told_draft(self) -> str | None:
        try:
            found = self._client.get("/get_server_info").json()
        except (ValueError, RecursionError):
            return None
        name = found.get("speculative_draft_model_path") if isinstance(found, dict) else None
        return name if isinstance(name, str) else None

    def _encode(self, question: Question) -> list[int]:
        try:
            ids = self._tokenizer.apply_chat_template(
                [dict(message) for message in question.messages],
                add_generation_prompt=True,
                enable_thinking=self._thinking,
                return_dict=False,
            )
        # Templates refuse by an exception of their own language.
        except Exception as error:
            raise RefusedError(f"the chat template refuses ({error})") from error
        return list(ids)


class VllmServer(_Server):
    """A server started with `--speculative-config '{"method": "dflash", ...}'`, as an answerer.

    Args:
        base_url: such as http://127.0.0.1:8000.
        model: the name it serves the target by.
        drafted: K, its `num_speculative_tokens`.
        max_new_tokens, thinking: of every answer.
        draft: the draft's name, which the server does not tell.
        concurrency: requests at a time.
        timeout_s: of one request.
        max_failures, api_key_variable: see `evaluation.server_client.ServerClient`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        drafted: int,
        max_new_tokens: int,
        thinking: bool = False,
        draft: str | None = None,
        concurrency: int = 8,
        timeout_s: float = 600.0,
        max_failures: int = 8,
        api_key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        client = ServerClient(base_url, concurrency, timeout_s, max_failures, api_key_variable)
        super().__init__(client, drafted, draft)
        self._body = {
            "model": model,
            "temperature": 0.0,
            "max_tokens": max_new_tokens,
            "chat_template_kwargs": {"enable_thinking": thinking},
            **NEUTRAL_SAMPLING,
        }

    def identity(self) -> dict[str, Any]:
        """The draft as it was named; the server encodes."""
        return {"draft": self._draft, "tokenizer": None}

    def _ask(self, question: Question) -> Reply:
        # Its cycles are in the counters only.
        messages = [dict(message) for message in question.messages]
        found = self._client.post("/v1/chat/completions", {**self._body, "messages": messages})
        choice = found["choices"][0]
        finish = known_finish(choice["finish_reason"])
        content = choice["message"]["content"]
        return Reply(
            text="" if content is None else _text(content),
            tokens=whole_number(found["usage"]["completion_tokens"], "completion_tokens"),
            finish=finish,
        )

    def counters(self) -> Counters:
        """Of all engines of the server together.

        Raises:
            DataError: no answer, or no such counters, as without a draft.
        """
        page = self._client.get("/metrics").body.decode("utf-8", "replace")
        try:
            return parse_counters(page, self._client.base_url)
        except (ValueError, OverflowError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._client.base_url}/metrics: no counters ({error})") from error


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text of type {type(value).__name__}")
    return value
