"""Two-stage rollouts by a `Generator`, for instance behind a server: vLLM, SGLang.

Stage one asks for thoughts and ends them at the closing delimiter, an end token or their limit.
What the model did not close is closed here, and stage two asks for suffixes. Tokens and their
log-probabilities are those of the answers: without them nothing could be learned, because the
weights that sampled may be others than those that learn.

Legend: V vocabulary.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool
from torch import Tensor

from decoding.generate import (
    GenerationRequest,
    GenerationResult,
    GenerationSettings,
    Generator,
)
from decoding.rollout import check_opened
from decoding.rollout_record import Rollout, RolloutSettings
from decoding.server import ServerGenerator

log = logging.getLogger(__name__)

ERROR = "error"


@runtime_checkable
class WeightSync(Protocol):
    """Gives the weights of training to a server."""

    def push(self, model: torch.nn.Module) -> None:
        """The server has these weights from now on."""
        ...

    def close(self) -> None:
        """No more will come."""
        ...


class _Piece(NamedTuple):
    """Sampled tokens, why they end, and the token that ended them where the server told it."""

    ids: list[int]
    logprobs: list[float]
    finish: str
    end: int | None


@dataclass
class _Sample:
    """A sample in the making."""

    prefix_id: str
    k: int
    prompt: list[int]
    boundary: list[int]
    given: bool = False
    thought: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = "stop"
    closed: bool = False

    @property
    def id(self) -> str:
        """Of its requests."""
        return f"{self.prefix_id}/{self.k}"

    def rollout(self, suffix: _Piece) -> Rollout:
        """What has become of it."""
        return Rollout(
            self.prefix_id, self.k, self.prompt, self.thought, self.boundary, suffix.ids,
            None if self.given else self.logprobs, suffix.logprobs,
            self.finish, suffix.finish, self.closed,
        )  # fmt: skip


_FAILED = _Piece([], [], ERROR, None)


class GeneratorRollouts:
    """Samples of a generator, with the methods of `decoding.rollout.LocalRollouts`.

    A sample whose request got no answer, or an answer with a forbidden token, is never dropped: it
    comes back with `suffix_finish` "error" and no sampled token, and has to count as one without a
    valid reward. Where more than `max_failed` of a call are so, the call fails.

    A server that keeps the token to itself that ended a thought does not tell whether the model
    closed it, nor with which probability; such a thought counts as closed from outside.

    Args:
        thoughts: answers stage one (`stage_settings`); its answers have tokens, and their
            log-probabilities under the distribution that was sampled from.
        suffixes: answers stage two.
        settings: of the rollouts; the generators have theirs.
        forbidden_V: tokens that no sample may have.
        max_failed: share of the samples of a call that may fail.

    Raises:
        ValueError: `max_failed` outside [0, 1].
    """

    def __init__(
        self,
        thoughts: Generator,
        suffixes: Generator,
        settings: RolloutSettings,
        forbidden_V: Bool[Tensor, " V"] | None = None,
        max_failed: float | int = 0.0,
    ) -> None:
        if not 0.0 <= max_failed <= 1.0:
            raise ValueError(f"max_failed={max_failed}: allowed a number in [0, 1]")
        self.thoughts, self.suffixes, self.settings = thoughts, suffixes, settings
        self.max_failed = max_failed
        self._forbidden: frozenset[int] = frozenset()
        if forbidden_V is not None:
            self._forbidden = frozenset(forbidden_V.nonzero()[:, 0].tolist())

    def sample(self, prompts: Sequence[tuple[str, Sequence[int]]], samples: int) -> list[Rollout]:
        """As `LocalRollouts.sample`."""
        check_opened(prompts, self.settings.open_id)
        made = self._samples(prompts, samples, [self.settings.close_id])
        errors: dict[str, str] = {}
        if self.settings.thought_tokens:
            errors = self._think(made)
        else:
            for sample in made:
                sample.finish = "length"
        return self._finish(made, errors)

    def continuations(
        self, prompts: Sequence[tuple[str, Sequence[int]]], samples: int
    ) -> list[Rollout]:
        """As `LocalRollouts.continuations`."""
        made = self._samples(prompts, samples, [])
        for sample in made:
            sample.given = True
        return self._finish(made, {})

    def continue_thoughts(
        self, prompts: Sequence[tuple[str, Sequence[int]]], thoughts: Sequence[Sequence[int]],
        numbers: Sequence[int] | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """As `LocalRollouts.continue_thoughts`."""
        check_opened(prompts, self.settings.open_id)
        numbers = [0] * len(prompts) if numbers is None else numbers
        boundary = [self.settings.close_id]
        made = [
            _Sample(prefix_id, k, list(prompt), boundary, given=True, thought=list(thought))
            for (prefix_id, prompt), thought, k in zip(prompts, thoughts, numbers, strict=True)
        ]
        return self._finish(made, {})

    def _samples(
        self, prompts: Sequence[tuple[str, Sequence[int]]], samples: int, boundary: list[int]
    ) -> list[_Sample]:
        return [
            _Sample(prefix_id, k, list(prompt), boundary)
            for prefix_id, prompt in prompts
            for k in range(samples)
        ]

    def _think(self, made: Sequence[_Sample]) -> dict[str, str]:
        """Stage one; what went wrong, by the id of the sample."""
        close, limit = self.settings.close_id, self.settings.thought_tokens
        ends = (close, *self.settings.stop_ids)
        requests = {one.id: GenerationRequest(one.id, prompt_ids=one.prompt) for one in made}
        pieces, errors = self._ask(self.thoughts, requests, ends, limit)
        for sample in made:
            piece = pieces.get(sample.id, _FAILED)
            sample.finish, sample.logprobs = piece.finish, piece.logprobs
            sample.closed = piece.end == close
            # The closing delimiter stands in the boundary; an end token is part of the thought.
            sample.thought = piece.ids[:-1] if sample.closed else piece.ids
        return errors

    def _finish(self, made: Sequence[_Sample], errors: dict[str, str]) -> list[Rollout]:
        """Stage two, and the count of what went wrong in both."""
        requests = {
            # An id of its own, so that its draws are other ones than those of the thought.
            sample.id: GenerationRequest(
                f"{sample.id}/suffix",
                prompt_ids=[*sample.prompt, *sample.thought, *sample.boundary],
            )
            for sample in made
            if sample.id not in errors
        }
        ends, limit = self.settings.stop_ids, self.settings.suffix_tokens
        pieces, more = self._ask(self.suffixes, requests, ends, limit)
        errors = {**errors, **more}
        self._count(errors, len(made))
        for sample in made:
            if sample.id in errors and not sample.given:
                sample.thought, sample.logprobs, sample.closed = [], [], False
        return [sample.rollout(pieces.get(sample.id, _FAILED)) for sample in made]

    def _ask(
        self, generator: Generator, requests: Mapping[str, GenerationRequest],
        ends: Sequence[int], limit: int,
    ) -> tuple[dict[str, _Piece], dict[str, str]]:  # fmt: skip
        """Answers and what went wrong, by the id of the sample."""
        assert len({r.id for r in requests.values()}) == len(requests), "ids of their own"
        name_of = {request.id: name for name, request in requests.items()}
        pieces, errors = {}, {}
        for result in generator.generate(requests.values()):
            name = name_of[result.id]
            if result.error is not None:
                errors[name] = result.error
                continue
            piece = _piece(result, ends, limit)
            wrong = self._forbidden.intersection(piece.ids)
            if wrong:
                errors[name] = f"the answer has token {min(wrong)}, which is forbidden"
            else:
                pieces[name] = piece
        lost = requests.keys() - pieces.keys() - errors.keys()
        assert not lost, "a generator answers every request"
        return pieces, errors

    def _count(self, errors: Mapping[str, str], samples: int) -> None:
        if not errors:
            return
        name, reason = next(iter(errors.items()))
        message = f"{len(errors)} of {samples} samples got no answer; sample {name}: {reason}"
        if len(errors) > self.max_failed * samples:
            raise ValueError(f"{message}; allowed a share of max_failed={self.max_failed}")
        log.warning("%s", message)


def _piece(result: GenerationResult, ends: Sequence[int], limit: int) -> _Piece:
    """What was sampled, up to the first token that ends it: not every server stops there."""
    if result.token_ids is None or result.retokenised or result.logprobs is None:
        raise ValueError(
            f"request {result.id!r}: an answer without the tokens that were sampled or without"
            " their log-probabilities; allowed: a server that tells both (vLLM, SGLang)"
        )
    ids, logprobs = result.token_ids[:limit], result.logprobs[:limit]
    for place, token in enumerate(ids):
        if token in ends:
            return _Piece(ids[: place + 1], logprobs[: place + 1], "stop", token)
    finish = "length" if len(ids) == limit else result.finish
    return _Piece(ids, logprobs, finish, None)


def stage_settings(
    settings: RolloutSettings,
) -> tuple[GenerationSettings, GenerationSettings]:
    """How the generators of thoughts and of suffixes answer."""

    def of(limit: int, stop_ids: tuple[int, ...]) -> GenerationSettings:
        """Of one stage."""
        return GenerationSettings(
            max_new_tokens=limit, temperature=settings.temperature, top_p=settings.top_p,
            seed=settings.seed, logprobs=True, stop_ids=stop_ids,
        )  # fmt: skip

    ends = settings.stop_ids
    # A limit of 0 asks for nothing, but has to be one that can be asked for.
    thoughts = of(max(settings.thought_tokens, 1), (settings.close_id, *ends))
    return thoughts, of(settings.suffix_tokens, ends)


class ServerRollouts:
    """What samples in place of the model in training (`algo.sampler`): an OpenAI-compatible server.

    Args:
        base_url, model, concurrency, timeout_s, retries, backoff_s, max_failures, extra_body,
        api_key_variable: as of `decoding.server.ServerGenerator`.
        sync: how the server gets the weights of training; "none" says that it keeps its own, and
            that importance weights alone have to correct for that.
        processed_logprobs: the server's log-probabilities are those of the distribution that it
            samples from (vLLM: --logprobs-mode processed_logprobs). Else they are those of
            temperature 1 and the whole vocabulary, and nothing else can be sampled.
        max_failed: share of the samples of a step that may get no answer.

    Raises:
        ValueError: another `sync`.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        sync: str | WeightSync,
        processed_logprobs: bool = False,
        max_failed: float | int = 0.0,
        concurrency: int = 64,
        timeout_s: float | int = 600.0,
        retries: int = 4,
        backoff_s: float | int = 0.5,
        max_failures: int = 8,
        extra_body: Mapping[str, Any] | None = None,
        api_key_variable: str = "OPENAI_API_KEY",
    ) -> None:
        if isinstance(sync, str) and sync != "none":
            raise ValueError(
                f"algo.sampler.sync={sync}: allowed none, which leaves the server its own weights,"
                " or +algo/sampler/sync=trl_vllm"
            )
        self._generator = partial(
            ServerGenerator, base_url=base_url, model=model, concurrency=concurrency,
            timeout_s=timeout_s, retries=retries, backoff_s=backoff_s, max_failures=max_failures,
            extra_body=extra_body, api_key_variable=api_key_variable,
        )  # fmt: skip
        self.sync = None if isinstance(sync, str) else sync
        self.processed_logprobs, self.max_failed = processed_logprobs, max_failed
        self._warned = False

    def follow(self, model: torch.nn.Module) -> None:
        """Give the server the weights of now; one process of a run does that."""
        if self.sync is not None:
            self.sync.push(model)
        elif not self._warned:
            self._warned = True
            log.warning(
                "algo.sampler.sync=none: the server keeps its weights while these are trained;"
                " samples are off-policy, corrected by importance weights"
            )

    def rollouts(
        self, settings: RolloutSettings, forbidden_V: Bool[Tensor, " V"] | None = None
    ) -> GeneratorRollouts:
        """What samples so.

        Raises:
            ValueError: a distribution whose log-probabilities the server does not tell.
        """
        cut = settings.temperature != 1.0 or settings.top_p < 1.0
        if cut and not self.processed_logprobs:
            raise ValueError(
                f"temperature={settings.temperature}, top_p={settings.top_p}: the server tells"
                " log-probabilities of temperature 1 and top_p 1; allowed: these, or"
                " algo.sampler.processed_logprobs=true with a server that is started so"
            )
        thoughts, suffixes = map(self._generator, stage_settings(settings))
        return GeneratorRollouts(thoughts, suffixes, settings, forbidden_V, self.max_failed)

    def close(self) -> None:
        """The run is over."""
        if self.sync is not None:
            self.sync.close()
