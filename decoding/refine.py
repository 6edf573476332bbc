"""Answers of a model that writes blocks and refines them, greedy or best of n.

Rows of different lengths decode together; each round is one block of every row. A prompt whose
length is no multiple of the block size leaves its last tokens in the first block, where they are
given: nothing is padded, and a row's blocks are the same alone and in a batch.

An answer ends at its first end token (what the same block says behind it is dropped), before a stop
string, or at the limit. What an answer cost is counted beside it (`GenerationResult.work`):

    nfe        passes that its blocks needed, of refinement and over candidates, and one over the
               whole blocks of its prompt
    blocks     blocks that were written
    flips      blocks in which another candidate than the greedy one won
    candidates distinct candidates that were ranked, over all rounds

Legend: B rows, S block size, C candidates.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from decoding.best_of import BestOf, Scores
from decoding.block_cache import BlockCache
from decoding.chain import Refinement
from decoding.generate import (
    GenerationRequest,
    GenerationResult,
    GenerationSettings,
    request_key,
)
from decoding.prompts import next_prompts, prompt_of
from decoding.stop_strings import StopStrings
from models.causal import CausalTarget
from models.identity import described
from models.precision import use_fastest_exact_matmul

_KEY = (1 << 63) - 1


@dataclass
class _Row:
    """An answer in the making."""

    id: str
    key: int
    prompt: list[int]
    limit: int
    tokens: list[int] = field(default_factory=list)
    finish: str = ""
    work: dict[str, float] = field(
        default_factory=lambda: dict.fromkeys(("nfe", "blocks", "flips", "candidates"), 0.0)
    )

    def given(self, size: int) -> list[int]:
        """The tokens of the prompt that stand in the next block: the first one's may."""
        return self.prompt[len(self.prompt) // size * size :] if not self.work["blocks"] else []


class RefineGenerator:
    """Answers requests block after block (a `decoding.generate.Generator`).

    Args:
        target: the model; it is moved to `device`.
        settings: how to answer; `temperature` must be 0.
        block_size: S.
        refinement: how a block is refined.
        batch_size: rows that decode together.
        prefill_tokens: tokens of prompts, padding included, that are read in one pass.
        best_of: how a block is chosen among candidates; None takes the refined one.
        scores: ranks candidates, with `best_of`.
        scorer_fingerprint: identity of `scores`.
        device: "cpu", "cuda"; None takes a GPU if there is one.

    Raises:
        ValueError: a temperature, or options of the settings that belong to token-wise decoding.
    """

    def __init__(
        self,
        target: CausalTarget,
        settings: GenerationSettings,
        block_size: int,
        refinement: Refinement,
        batch_size: int = 32,
        prefill_tokens: int = 4096,
        best_of: BestOf | None = None,
        scores: Scores | None = None,
        scorer_fingerprint: str | None = None,
        device: str | None = None,
    ) -> None:
        for name, neutral in (("temperature", 0.0), ("logprobs", False)):
            value = getattr(settings, name)
            if value != neutral:
                raise ValueError(
                    f"{name}={value}: blocks are refined greedily; allowed {neutral} (bon.pick="
                    "gumbel draws among candidates)"
                )
        assert (best_of is None) == (scores is None), "candidates are ranked by something"
        self.target, self.settings, self.block_size = target, settings, block_size
        self.refinement, self.best_of, self.scores = refinement, best_of, scores
        self.scorer_fingerprint = scorer_fingerprint
        self.batch_size, self.prefill_tokens = batch_size, prefill_tokens
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.nn.Module.to(target.model, self.device)
        stop_ids = target.stop_ids if settings.stop_ids is None else settings.stop_ids
        self.stop_ids = frozenset(stop_ids)
        self.stop_strings = StopStrings(settings.stop_strings, target.tokenizer)
        vocab = target.tokenizer.get_vocab().values()
        known = max(len(target.tokenizer), max(vocab) + 1)
        forbidden_V = torch.arange(len(target.embedding_VD), device=self.device) >= known
        forbidden_V[target.mask_token_id] = True
        self._forbidden_V = forbidden_V
        use_fastest_exact_matmul()

    def identity(self) -> dict[str, Any]:
        """What decides the answers beside the settings."""
        return {
            "target": self.target.name,
            "fingerprint": self.target.fingerprint,
            "dtype": self.target.dtype,
            "tokenizer": self.target.text_fingerprint,
            "block_size": self.block_size,
            "refine": described(self.refinement),
            "bon": described(self.best_of),
            "scorer": self.scorer_fingerprint,
        }

    def generate(self, requests: Iterable[GenerationRequest]) -> Iterator[GenerationResult]:
        """One result per request, in the order in which they end."""
        incoming = iter(requests)
        waiting: list[_Row] = []
        rows: list[_Row] = []
        cache = BlockCache(self.target, self.block_size, self.batch_size, self._forbidden_V)
        while True:
            yield from self._fetch(incoming, waiting)
            while waiting and len(rows) < self.batch_size:
                free = self.batch_size - len(rows)
                entering = next_prompts(waiting, free, self.prefill_tokens)
                with torch.no_grad():
                    cache.enter([row.prompt for row in entering])
                rows += entering
            if not rows:
                return
            self._round(rows, cache)
            yield from (self._result(row) for row in rows if row.finish)
            stay = [place for place, row in enumerate(rows) if not row.finish]
            if len(stay) < len(rows):
                cache.keep(stay)
                rows = [rows[place] for place in stay]

    def _fetch(
        self, incoming: Iterator[GenerationRequest], waiting: list[_Row]
    ) -> Iterator[GenerationResult]:
        """Fill `waiting` a few batches ahead, the longest prompts last; yields what is refused."""
        if len(waiting) >= self.batch_size:
            return
        for request in incoming:
            try:
                prompt = prompt_of(self.target, request, self.settings.thinking)
            except ValueError as error:
                yield GenerationResult(request.id, error=str(error))
                continue
            # The last block is read whole.
            room = self.target.max_positions // self.block_size * self.block_size - len(prompt)
            if room < 1:
                yield GenerationResult(
                    request.id, error=f"a prompt of {len(prompt)} tokens leaves no room"
                )
                continue
            limit = min(self.settings.max_new_tokens, room)
            key = request_key(request.id) & _KEY
            row = _Row(request.id, key, prompt, limit)
            row.work["nfe"] += len(prompt) >= self.block_size
            waiting.append(row)
            if len(waiting) >= 4 * self.batch_size:
                break
        waiting.sort(key=lambda row: len(row.prompt))

    @torch.no_grad()
    def _round(self, rows: list[_Row], cache: BlockCache) -> None:
        """Write one block of every row."""
        size = self.block_size
        token_BS = torch.full((len(rows), size), self.target.mask_token_id)
        given_BS = torch.zeros(len(rows), size, dtype=torch.bool)
        for place, row in enumerate(rows):
            given = row.given(size)
            token_BS[place, : len(given)] = torch.tensor(given, dtype=torch.long)
            given_BS[place, : len(given)] = True
        token_BS, given_BS = token_BS.to(self.device), given_BS.to(self.device)
        if self.best_of is None:
            refined = self.refinement.refine(cache, token_BS, given_BS)
            won_BS, choice = refined.token_XS, None
        else:
            assert self.scores is not None
            # A draw depends on the request and the place in its answer, not on the rows beside it.
            key_B = torch.tensor([(row.key + len(row.tokens)) & _KEY for row in rows])
            refined, choice = self.best_of.choose(
                cache, self.refinement, token_BS, given_BS, key_B.to(self.device), self.scores
            )
            won_BS = choice.token_XS
        cache.finish(won_BS)
        passes, looks = refined.passes_X.tolist(), 0 if choice is None else choice.passes
        flips = seen = [0] * len(rows)
        if choice is not None:
            flips, seen = choice.flipped_X.int().tolist(), choice.seen_X.tolist()
        for place, (row, block) in enumerate(zip(rows, won_BS.tolist(), strict=True)):
            new = block[len(row.given(size)) :]
            # Each round over candidates of `select_each` belongs to a pass of the row's own.
            own_looks = min(looks, passes[place]) if self._each() else looks
            row.work["nfe"] += passes[place] + own_looks
            row.work["blocks"] += 1
            row.work["flips"] += flips[place]
            row.work["candidates"] += seen[place]
            self._append(row, new)

    def _each(self) -> bool:
        return self.best_of is not None and self.best_of.score_agg == "select_each"

    def _append(self, row: _Row, new: list[int]) -> None:
        """Take the tokens of a block up to an end token, a stop string or the limit."""
        for token in new:
            row.tokens.append(token)
            if token in self.stop_ids or self.stop_strings.reached(row.tokens):
                row.finish = "stop"
                return
            if len(row.tokens) >= row.limit:
                row.finish = "length"
                return

    def _result(self, row: _Row) -> GenerationResult:
        text, finish = self.stop_strings.finish(row.tokens, row.finish)
        return GenerationResult(
            id=row.id,
            text=text,
            token_ids=row.tokens,
            num_tokens=len(row.tokens),
            finish=finish,
            work=row.work,
        )
