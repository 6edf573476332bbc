"""Acceptance of a draft that a server runs: SGLang tells it per request, vLLM in counters.

Read from the servers' documentation and tried against servers of the tests that answer in these
formats; never tried against a real SGLang or vLLM.

    SGLang  POST /generate {input_ids, sampling_params} -> {text, output_ids, meta_info:
            {completion_tokens, spec_verify_ct, spec_accept_length, finish_reason: {type}}}.
            `spec_accept_length` is completion_tokens / spec_verify_ct, with the prefill's token.
    vLLM    POST /v1/chat/completions -> {choices: [{message: {content}, finish_reason}], usage:
            {completion_tokens}}, and GET /metrics (Prometheus) with the counters
            vllm:spec_decode_num_drafts_total, vllm:spec_decode_num_accepted_tokens_total and
            vllm:spec_decode_num_accepted_tokens_per_pos_total{position="0"}; with d drafts
            tau = 1 + accepted / d, and accepted_per_pos / d is cumulative already.

vLLM's counters are the server's: nobody else may use it during a measurement, there are no rows per
request and no intervals.
"""

import re
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import httpx

from data.errors import DataError
from evaluation.acceptance import LENGTH, STOP, Acceptance, SlotAcceptance
from evaluation.answering import Question, Reply
from evaluation.statistics import wilson_interval

ATTEMPTS = 3
_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_POSITION = re.compile(r'position="(\d+)"')
_PREFIX = "vllm:spec_decode_num_"


class _Client:
    """Requests to one server, several at a time, each tried a few times."""

    def __init__(self, base_url: str, concurrency: int, timeout_s: float) -> None:
        if concurrency < 1 or not timeout_s > 0:
            raise DataError("mode.server: concurrency must be at least 1 and timeout_s above 0")
        self.base_url, self.concurrency = base_url.rstrip("/"), concurrency
        self._http = httpx.Client(timeout=timeout_s)

    def every(self, ask: Callable[[Question], Reply], questions: Sequence[Question]) -> list[Reply]:
        """One reply per question; what goes wrong with one is its reply's error."""
        with ThreadPoolExecutor(self.concurrency) as pool:
            return list(pool.map(lambda question: self._safely(ask, question), questions))

    def _safely(self, ask: Callable[[Question], Reply], question: Question) -> Reply:
        for attempt in range(ATTEMPTS):
            try:
                return ask(question)
            except (httpx.HTTPError, ValueError, KeyError, TypeError, IndexError) as error:
                reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
                if attempt + 1 < ATTEMPTS:
                    time.sleep(0.2 * 2**attempt)
        return Reply(error=f"{self.base_url}: {reason[:300]}")

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The answer of a request as JSON; an HTTP error is raised."""
        response = self._http.post(f"{self.base_url}{path}", json=body)
        response.raise_for_status()
        return response.json()

    def get(self, path: str) -> str:
        """The text of a page.

        Raises:
            DataError: the server does not answer.
        """
        try:
            response = self._http.get(f"{self.base_url}{path}")
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise DataError(f"mode.server.base_url={self.base_url}{path}: {error}") from error
        return response.text


class SglangServer:
    """A server started with `--speculative-algorithm DFLASH`, as an answerer.

    Args:
        base_url: such as http://127.0.0.1:30000.
        tokenizer: folder or hub name of the target's, with its chat template.
        drafted: K: `--speculative-num-draft-tokens` less one, because SGLang counts the anchor.
        max_new_tokens, thinking: of every answer.
        concurrency: requests at a time.
        timeout_s: of one request.
    """

    def __init__(
        self,
        base_url: str,
        tokenizer: str,
        drafted: int,
        max_new_tokens: int,
        thinking: bool = False,
        concurrency: int = 8,
        timeout_s: float = 600.0,
    ) -> None:
        self._client = _Client(base_url, concurrency, timeout_s)
        self._tokenizer = _load_tokenizer(tokenizer)
        self.drafted, self._thinking = drafted, thinking
        self._sampling = {"temperature": 0.0, "max_new_tokens": max_new_tokens}

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """Greedy answers."""
        return self._client.every(self._ask, questions)

    def _ask(self, question: Question) -> Reply:
        ids = self._tokenizer.apply_chat_template(
            [dict(message) for message in question.messages],
            add_generation_prompt=True,
            enable_thinking=self._thinking,
            return_dict=False,
        )
        body = {"input_ids": list(ids), "sampling_params": self._sampling}
        found = self._client.post("/generate", body)
        meta = found["meta_info"]
        if "spec_verify_ct" not in meta:
            raise ValueError("no spec_verify_ct in meta_info: the server runs without a draft")
        return Reply(
            text=found["text"],
            token_ids=found.get("output_ids"),
            tokens=int(meta["completion_tokens"]),
            cycles=int(meta["spec_verify_ct"]),
            finish=_finish(meta["finish_reason"]["type"]),
        )


@dataclass(frozen=True)
class Counters:
    """Drafts (verify cycles), accepted drafted tokens, and these by position from 0."""

    drafts: int
    accepted: int
    by_position: tuple[int, ...]

    def since(self, before: "Counters") -> "Counters":
        """What was added."""
        earlier = (*before.by_position, *[0] * len(self.by_position))
        added = (now - then for now, then in zip(self.by_position, earlier, strict=False))
        return Counters(self.drafts - before.drafts, self.accepted - before.accepted, tuple(added))


@runtime_checkable
class CountingServer(Protocol):
    """A server that counts over all requests instead of telling each one."""

    def counters(self) -> Counters:
        """What it has counted so far."""
        ...


class VllmServer:
    """A server started with `--speculative-config '{"method": "dflash", ...}'`, as an answerer.

    Args:
        base_url: such as http://127.0.0.1:8000.
        model: the name it serves the target by.
        drafted: K, its `num_speculative_tokens`.
        max_new_tokens, thinking: of every answer.
        concurrency: requests at a time.
        timeout_s: of one request.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        drafted: int,
        max_new_tokens: int,
        thinking: bool = False,
        concurrency: int = 8,
        timeout_s: float = 600.0,
    ) -> None:
        self._client = _Client(base_url, concurrency, timeout_s)
        self.drafted = drafted
        self._body = {
            "model": model,
            "temperature": 0.0,
            "max_tokens": max_new_tokens,
            "chat_template_kwargs": {"enable_thinking": thinking},
        }

    def answer(self, questions: Sequence[Question]) -> list[Reply]:
        """Greedy answers; their cycles are in the counters only."""
        return self._client.every(self._ask, questions)

    def _ask(self, question: Question) -> Reply:
        messages = [dict(message) for message in question.messages]
        found = self._client.post("/v1/chat/completions", {**self._body, "messages": messages})
        choice = found["choices"][0]
        return Reply(
            text=choice["message"]["content"] or "",
            tokens=int(found["usage"]["completion_tokens"]),
            finish=_finish(choice["finish_reason"]),
        )

    def counters(self) -> Counters:
        """Of all engines of the server together.

        Raises:
            DataError: no answer, or no such counters, as without a draft.
        """
        return parse_counters(self._client.get("/metrics"), self._client.base_url)


def parse_counters(text: str, place: str) -> Counters:
    """vLLM's counters out of a page in Prometheus' text format; engines are added up.

    Raises:
        DataError: they are not there.
    """
    totals: dict[str, float] = {}
    positions: dict[int, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None or not sample["name"].startswith(_PREFIX):
            continue
        name, value = sample["name"].removeprefix(_PREFIX), float(sample["value"])
        totals[name] = totals.get(name, 0.0) + value
        position = _POSITION.search(sample["labels"] or "")
        if name == "accepted_tokens_per_pos_total" and position is not None:
            positions[int(position[1])] = positions.get(int(position[1]), 0.0) + value
    if not {"drafts_total", "accepted_tokens_total"} <= totals.keys():
        raise DataError(f"{place}/metrics: no {_PREFIX}drafts_total: the server runs no draft")
    by_position = tuple(int(positions.get(k, 0.0)) for k in range(max(positions, default=-1) + 1))
    return Counters(int(totals["drafts_total"]), int(totals["accepted_tokens_total"]), by_position)


def acceptance_of_counters(
    counted: Counters, replies: Sequence[Reply], prompts: int, drafted: int
) -> Acceptance:
    """What counters say; without rows per request there are no intervals and no macro mean.

    Raises:
        DataError: nothing was drafted, or more was accepted than drafted.
    """
    if counted.drafts < 1 or not 0 <= counted.accepted <= counted.drafts * drafted:
        raise DataError(
            f"{counted.accepted} accepted in {counted.drafts} drafts of {drafted}: the counters do"
            " not belong to this measurement (mode.server.drafted, or other users of the server)"
        )
    looping = sum(reply.degenerate for reply in replies)
    low, high = wilson_interval(looping, len(replies))
    tokens = sum(reply.tokens for reply in replies)
    tau = 1 + counted.accepted / counted.drafts
    return Acceptance(
        prompts=prompts, answers=len(replies), without_cycles=0, tokens=tokens,
        cycles=counted.drafts, ceiling=drafted + 1, tau=tau, tau_low=None, tau_high=None,
        tau_macro=None, tau_served=tokens / counted.drafts, tau_uncut=tau,
        slots=_slots(counted), histogram=None,
        capped=sum(reply.finish == LENGTH for reply in replies),
        degenerate=looping, degenerate_low=low, degenerate_high=high, tau_without_degenerate=None,
    )  # fmt: skip


def _slots(counted: Counters) -> list[SlotAcceptance]:
    reached = (counted.drafts, *counted.by_position)
    return [
        SlotAcceptance(
            slot, before, accepted, accepted / before if before else None, accepted / counted.drafts
        )
        for slot, (before, accepted) in enumerate(
            zip(reached, counted.by_position, strict=False), start=1
        )
    ]


def _finish(reason: str) -> str:
    return LENGTH if reason == LENGTH else STOP


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"mode.server.tokenizer={source}: cannot be loaded ({reason})") from error
