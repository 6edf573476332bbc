"""What it means to let a target answer: requests, results, and the settings of one run.

`decoding.local` answers with a model in this process, `decoding.server` with an OpenAI-compatible
server. Both are a `Generator`.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoding.categorical import draw, keyed_uniform64

# Sets these draws apart from others with the same seed.
_STREAM = 0x67656E


@dataclass(frozen=True)
class GenerationRequest:
    """One prompt: a conversation, the tokens themselves, or a text to go on with.

    Attributes:
        id: comes back with the result; of sampled answers it decides the random numbers.
        messages: turns with `role` and `content`, which the chat template turns into tokens.
        prompt_ids: the tokens of the prompt, used as they are.
        prompt: a text, which the tokenizer turns into tokens as it does by itself.

    Raises:
        ValueError: none of them is given, or several are.
    """

    id: str
    messages: Sequence[Mapping[str, str]] | None = None
    prompt_ids: Sequence[int] | None = None
    prompt: str | None = None

    def __post_init__(self) -> None:
        given = (self.messages, self.prompt_ids, self.prompt)
        if sum(one is not None for one in given) != 1:
            raise ValueError(f"request {self.id!r}: give either messages or prompt_ids or prompt")


@dataclass(frozen=True)
class GenerationResult:
    """One answer, or why there is none.

    Attributes:
        id: of the request.
        text: without special tokens, up to the first stop string.
        token_ids: as the model wrote them, the token that ended the answer included; None where a
            server did not tell.
        logprobs: of every token, in nats, under the model's own distribution (temperature 1,
            nothing cut off); None if not asked for.
        num_tokens: length of the answer; 0 where a server did not tell.
        finish: "stop" at a stop token or stop string, "length" at the limit.
        error: what went wrong; then the rest is empty.
        retokenised: `token_ids` were made from the text, and may differ from those the model wrote.
        work: what the answer cost and how it came about, by name (forward passes, ...); None where
            nobody counted.
    """

    id: str
    text: str = ""
    token_ids: list[int] | None = None
    logprobs: list[float] | None = None
    num_tokens: int = 0
    finish: str = ""
    error: str | None = None
    retokenised: bool = False
    work: dict[str, float] | None = None


@dataclass(frozen=True)
class GenerationSettings:
    """How to answer.

    Attributes:
        max_new_tokens: limit of an answer, its last token included.
        temperature: 0 is greedy.
        top_p: draw from the most probable tokens up to this mass.
        top_k: draw from this many tokens at most; 0 is no limit.
        seed: of sampled answers.
        thinking: `enable_thinking` of the chat template.
        logprobs: whether results carry them.
        stop_ids: tokens that end an answer; None takes the model's.
        stop_strings: texts that end an answer as soon as it has one of them; the text is what
            comes before the first.

    Raises:
        ValueError: a value outside its range.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    thinking: bool = False
    logprobs: bool = False
    stop_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checks = {
            "max_new_tokens": (self.max_new_tokens >= 1, "an integer >= 1"),
            "temperature": (self.temperature >= 0.0, "a number in [0, inf)"),
            "top_p": (0.0 < self.top_p <= 1.0, "a number in (0, 1]"),
            "top_k": (self.top_k >= 0, "an integer >= 0"),
            "stop_strings": (all(self.stop_strings), "texts of at least one character"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)}: allowed {allowed}")


@runtime_checkable
class Generator(Protocol):
    """Answers requests."""

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the settings: the model, by name and fingerprint."""
        ...

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationResult]:
        """One result for every request, in any order.

        A request that cannot be answered gives a result with `error`; what concerns all requests
        is raised.
        """
        ...


def request_key(request_id: str) -> int:
    """A signed number of 64 bits for a request, by its id alone."""
    digest = hashlib.blake2b(request_id.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big", signed=True)


def choose(
    logits_BV: Float[Tensor, "B V"], key_B: Int[Tensor, " B"], settings: GenerationSettings
) -> Int[Tensor, " B"]:
    """The next token of every row: the most probable one, or one drawn.

    Args:
        logits_BV: in fp32.
        key_B: a number per row that is never used twice, so that a draw depends on the request
            and the place in its answer but not on the rows beside it.
        settings: temperature, top_k, top_p and seed.
    """
    if settings.temperature == 0.0:
        return logits_BV.argmax(-1)
    if 0 < settings.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(settings.top_k, dim=-1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    uniform_B = keyed_uniform64((settings.seed, _STREAM), key_B, 1)[:, 0]
    return draw(logits_BV, uniform_B, temperature=settings.temperature, nucleus_p=settings.top_p)
