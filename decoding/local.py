"""Answers from a model in this process: many at once, each leaving as soon as it is done.

Rows of different lengths decode together, each at its own position (`models.row_cache`). When
one ends, the next prompt takes its place, so the batch stays full until the prompts run out, and
after that it shrinks.

Legend: B rows being decoded, P prompts that enter, S tokens of the longest of them, V vocabulary.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from decoding.generate import (
    GenerationRequest,
    GenerationResult,
    GenerationSettings,
    choose,
    request_key,
)
from decoding.prompts import next_prompts, prompt_of
from decoding.stop_strings import StopStrings
from models.causal import CausalTarget
from models.decodable import check_decodable, check_logits
from models.precision import use_fastest_exact_matmul
from models.row_cache import RowCache, prefill

# Prompts are sorted by length within this many batches, so that those that enter together fit.
_WINDOW = 4
_WORD = 1 << 64


@dataclass
class _Row:
    """An answer in the making."""

    id: str
    key: int
    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)

    def next_key(self) -> int:
        """The number that the draw of the next token depends on."""
        word = (self.key + len(self.tokens)) % _WORD
        return word - _WORD if word >= _WORD // 2 else word


class LocalGenerator:
    """A target that answers in batches.

    Greedy answers are those of `generate(do_sample=False)` of `transformers`. Sampled answers
    depend on the seed and the id of the request, not on the rows beside it (up to ties within the
    rounding of the logits, which depends on the shape of a batch).

    Args:
        target: the model; it is moved to `device`.
        settings: how to answer.
        batch_size: rows that decode together.
        prefill_tokens: tokens of prompts, padding included, that enter in one forward pass.
        device: "cpu", "cuda"; None takes a GPU if there is one.

    Raises:
        ValueError: a model that cannot decode rows of unlike lengths, or that changes its logits
            behind the head (`models.decodable`).
    """

    def __init__(
        self,
        target: CausalTarget,
        settings: GenerationSettings,
        batch_size: int = 32,
        prefill_tokens: int = 2048,
        device: str | None = None,
    ) -> None:
        check_decodable(target.model.config, target.name)
        check_logits(target.model.config, target.name)
        self.target, self.settings = target, settings
        self.batch_size, self.prefill_tokens = batch_size, prefill_tokens
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.nn.Module.to(target.model, self.device)
        self.model = target.decoding_model
        self.head = self.model.get_output_embeddings()
        stop_ids = target.stop_ids if settings.stop_ids is None else settings.stop_ids
        self.stop_ids = frozenset(stop_ids)
        self.stop_strings = StopStrings(settings.stop_strings, target.tokenizer)
        use_fastest_exact_matmul()

    def identity(self) -> dict[str, Any]:
        """The target's name, and what of weights, numbers and texts decides its answers."""
        return {
            "target": self.target.name,
            "fingerprint": self.target.fingerprint,
            "dtype": self.target.dtype,
            "tokenizer": self.target.text_fingerprint,
        }

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationResult]:
        """One result per request, in the order in which they end.

        Requests are read as they are needed, a few batches ahead.
        """
        incoming = iter(requests)
        waiting: list[_Row] = []
        rows: list[_Row] = []
        cache = RowCache(self.model.config.num_hidden_layers, self.batch_size)
        while True:
            yield from self._fetch(incoming, waiting)
            if waiting and len(rows) < self.batch_size:
                entering = next_prompts(waiting, self.batch_size - len(rows), self.prefill_tokens)
                logits_BV = self._prefill(entering, cache)
                rows += entering
                advanced = range(len(rows) - len(entering), len(rows))
            elif rows:
                logits_BV = self._step(rows, cache)
                advanced = range(len(rows))
            else:
                return
            self._append([rows[place] for place in advanced], logits_BV)
            # From the end, because a row that leaves is replaced by the last one.
            for place in reversed(advanced):
                finish = self._finish(rows[place])
                if finish:
                    yield self._result(rows[place], finish)
                    cache.drop(place)
                    rows[place] = rows[-1]
                    rows.pop()

    def _fetch(
        self, incoming: Iterator[GenerationRequest], waiting: list[_Row]
    ) -> Iterator[GenerationResult]:
        """Refill the waiting prompts, longest last; yields those that cannot be answered."""
        if len(waiting) >= self.batch_size:
            return
        for request in islice(incoming, _WINDOW * self.batch_size - len(waiting)):
            try:
                waiting.append(self._row(request))
            except ValueError as error:
                yield GenerationResult(request.id, error=str(error))
        waiting.sort(key=lambda row: len(row.prompt))

    def _row(self, request: GenerationRequest) -> _Row:
        prompt = prompt_of(self.target, request, self.settings.thinking)
        room = self.target.max_positions - len(prompt)
        limit = min(self.settings.max_new_tokens, room)
        return _Row(request.id, request_key(request.id), prompt, limit)

    @torch.no_grad()
    def _prefill(self, entering: list[_Row], cache: RowCache) -> Tensor:
        """Read prompts, whose keys and values enter the cache; the logits after each of them."""
        last_PD = prefill(self.model, [row.prompt for row in entering], cache)
        return self.head(last_PD).float()

    @torch.no_grad()
    def _step(self, rows: list[_Row], cache: RowCache) -> Tensor:
        """Read the last token of every row; the logits of the next."""
        token_B1 = torch.tensor([[row.tokens[-1]] for row in rows], device=self.device)
        logits_B1V = self.model(
            input_ids=token_B1,
            position_ids=cache.positions(1),
            attention_mask=cache.mask(1, self.model.dtype),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        cache.commit([1] * len(rows))
        return logits_B1V[:, -1].float()

    def _append(self, rows: list[_Row], logits_BV: Tensor) -> None:
        key_B = torch.tensor([row.next_key() for row in rows], device=logits_BV.device)
        token_B = choose(logits_BV, key_B, self.settings)
        for row, token in zip(rows, token_B.tolist(), strict=True):
            row.tokens.append(token)
        if self.settings.logprobs:
            chosen_B = logits_BV.log_softmax(-1).gather(-1, token_B[:, None])[:, 0]
            for row, value in zip(rows, chosen_B.tolist(), strict=True):
                row.logprobs.append(value)

    def _finish(self, row: _Row) -> str:
        if row.tokens[-1] in self.stop_ids or self.stop_strings.reached(row.tokens):
            return "stop"
        return "length" if len(row.tokens) >= row.limit else ""

    def _result(self, row: _Row, finish: str) -> GenerationResult:
        text, finish = self.stop_strings.finish(row.tokens, finish)
        return GenerationResult(
            id=row.id,
            text=text,
            token_ids=row.tokens,
            logprobs=row.logprobs if self.settings.logprobs else None,
            num_tokens=len(row.tokens),
            finish=finish,
            # One pass per token, that over the prompt included.
            work={"nfe": float(len(row.tokens))},
        )
