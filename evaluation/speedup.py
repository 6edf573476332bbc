"""Wall-clock speed of speculative decoding against plain decoding of the same target, one prompt at
a time, in one run.

The two take turns, and who begins changes from prompt to prompt, so that neither has the quieter
machine. Both are timed from the prompt to the last token, prefill included.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.errors import DataError
from decoding.drafts import Draft, NoDraft
from decoding.speculate import SpeculativeResult, speculate
from decoding.verification import Verification
from evaluation.statistics import bootstrap_interval
from models.causal import CausalTarget


@dataclass(frozen=True)
class Timing:
    """One prompt answered both ways.

    Attributes:
        plain_s, speculative_s: seconds.
        plain_tokens, tokens: of the answers.
        cycles: verify passes.
        same: the answers are equal, token for token. Rejection sampling does not promise it, and
            in single precision two tokens that are nearly as probable may change places.
    """

    plain_s: float
    speculative_s: float
    plain_tokens: int
    tokens: int
    cycles: int
    same: bool


@dataclass(frozen=True)
class Speedup:
    """Tokens per second of speculative decoding over those of plain decoding.

    Attributes:
        value, low, high: with a 95 % bootstrap interval over prompts, None for one prompt.
        prompts: how many were timed.
        plain_tokens_per_s, tokens_per_s: of both.
        different: prompts whose answers are not equal.
    """

    value: float
    low: float | None
    high: float | None
    prompts: int
    plain_tokens_per_s: float
    tokens_per_s: float
    different: int


def time_prompts(
    target: CausalTarget,
    draft: Draft,
    rule: Verification,
    prompts: Sequence[Sequence[int]],
    keys: Sequence[int],
    max_new_tokens: int,
    seed: int = 0,
) -> Iterator[Timing]:
    """Answer every prompt in both ways; an answer of one cycle before the first warms both up."""

    def decode(which: Draft, place: int, limit: int) -> SpeculativeResult:
        return speculate(
            target.decoding_model, which, [prompts[place]], rule, max_new_tokens=limit,
            stop_ids=target.stop_ids, seed=seed, requests=[keys[place]],
        )[0]  # fmt: skip

    plain_draft = NoDraft()
    for which in (plain_draft, draft) if prompts else ():
        decode(which, 0, min(max_new_tokens, 4))
    for place in range(len(prompts)):
        order = (plain_draft, draft) if place % 2 == 0 else (draft, plain_draft)
        found = {
            which is draft: _timed(lambda which=which, place=place: decode(  # type: ignore[misc]
                which, place, max_new_tokens
            ))
            for which in order
        }  # fmt: skip
        (plain_s, plain), (speculative_s, result) = found[False], found[True]
        yield Timing(
            plain_s, speculative_s, len(plain.token_ids), len(result.token_ids),
            len(result.cycles), plain.token_ids == result.token_ids,
        )  # fmt: skip


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def measure_speedup(timings: Sequence[Timing], seed: int = 0) -> Speedup:
    """Pooled over prompts: (tokens / s) / (plain tokens / plain s).

    The interval resamples prompts, all four columns of a prompt together.

    Raises:
        DataError: nothing was timed.
    """
    if not timings:
        raise DataError("a speed-up needs at least 1 timed prompt, got 0")
    plain_s, speculative_s = (
        sum(getattr(timing, name) for timing in timings) for name in ("plain_s", "speculative_s")
    )
    plain = sum(timing.plain_tokens for timing in timings) / plain_s
    speculative = sum(timing.tokens for timing in timings) / speculative_s
    low = high = None
    if len(timings) > 1:
        columns = [(t.tokens, t.speculative_s, t.plain_tokens, t.plain_s) for t in timings]
        low, high = bootstrap_interval(columns, _ratio_of_rates, seed=seed)
    return Speedup(
        speculative / plain, low, high, len(timings), plain, speculative,
        sum(not timing.same for timing in timings),
    )  # fmt: skip


def _ratio_of_rates(sums_R4: NDArray[np.float64]) -> NDArray[np.float64]:
    tokens, seconds, plain_tokens, plain_seconds = sums_R4.T
    return (tokens / seconds) / (plain_tokens / plain_seconds)
