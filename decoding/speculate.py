"""Speculative decoding: draft a block, verify it in one pass of the target, keep the right prefix.

With any draft the answers are the target's own (`decoding.verification` says in which sense); the
draft decides how many passes of the target they cost. Of an answer the first token comes from the
prefill, all others from verify cycles. A stop token or the limit cuts the last cycle, so that

    1 + sum(cycles) = len(token_ids);

what it would have committed is kept beside (`last_uncut`). A cycle commits at most drafted + 1
tokens: with blocks of B slots in the published layout, the anchor and B - 1 drafts, at most B.

Legend: B sequences, S prompt tokens, K drafted tokens, Q = K + 1, V vocabulary, E taps.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from decoding.drafts import Draft
from decoding.verification import RequestNoise, Verification
from models.decodable import check_decodable, check_logits
from models.row_cache import RowCache, prefill
from models.taps import Recording, TargetTaps

STOP, LENGTH = "stop", "length"


@dataclass
class SpeculativeResult:
    """An answer, and what it cost.

    Attributes:
        token_ids: the answer, its stop token included.
        cycles: tokens committed by every verify pass, after the cut.
        last_uncut: what the last of them would have committed without the cut; None without one.
        finish: stop or length.
    """

    token_ids: list[int] = field(default_factory=list)
    cycles: list[int] = field(default_factory=list)
    last_uncut: int | None = None
    finish: str | None = None

    def append(self, tokens: Sequence[int], limit: int, stop_ids: frozenset[int]) -> None:
        """Take what was committed, up to a stop token and to the limit."""
        for token in tokens[: limit - len(self.token_ids)]:
            self.token_ids.append(token)
            if token in stop_ids:
                self.finish = STOP
                return
        if len(self.token_ids) == limit:
            self.finish = LENGTH

    def append_cycle(self, tokens: Sequence[int], limit: int, stop_ids: frozenset[int]) -> None:
        """Take what a verify pass committed."""
        before = len(self.token_ids)
        self.append(tokens, limit, stop_ids)
        self.cycles.append(len(self.token_ids) - before)
        self.last_uncut = len(tokens)


class TargetPass:
    """The target on some sequences: prefill, then blocks behind what is committed.

    Args:
        model: a causal model of transformers whose logits are its head's, unchanged.
        recording: where the tapped layers are found after a pass; None if there are none.
        batch: B.

    Raises:
        ValueError: a model that cannot decode so (`models.decodable`).
    """

    def __init__(self, model: Any, recording: Recording | None, batch: int) -> None:
        check_decodable(model.config, model.config.model_type)
        self._model, self._recording = model, recording
        self._head = model.get_output_embeddings()
        self.cache = RowCache(model.config.num_hidden_layers, batch)

    @property
    def taps_BSE(self) -> Tensor | None:
        """The tapped layers at the tokens of the last pass."""
        return None if self._recording is None else self._recording.taps_BSE

    def prefill(self, prompts: Sequence[Sequence[int]]) -> Float[Tensor, "B V"]:
        """Logits behind every prompt."""
        return self._head(prefill(self._model, prompts, self.cache))

    def verify(self, block_BQ: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q V"]:
        """Logits behind every token of a block that stands behind what is committed."""
        queries = block_BQ.shape[1]
        hidden_BQD = self._model.base_model(
            input_ids=block_BQ,
            attention_mask=self.cache.mask(queries, self._model.dtype),
            position_ids=self.cache.positions(queries),
            past_key_values=self.cache,
            use_cache=True,
        ).last_hidden_state
        return self._head(hidden_BQD)


def speculate(
    model: Any,
    draft: Draft,
    prompts: Sequence[Sequence[int]],
    rule: Verification,
    *,
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    seed: int = 0,
    requests: Sequence[int] | None = None,
) -> list[SpeculativeResult]:
    """Answers of the target to some prompts, decoded together; each row goes its own pace.

    Args:
        model: the target.
        draft: proposes tokens; `NoDraft` makes this plain decoding.
        prompts: token ids, at least one of each.
        rule: how drafts are chosen and accepted.
        max_new_tokens: of every answer; the target's longest sequence may leave fewer.
        stop_ids: tokens that end an answer.
        seed: of the random numbers.
        requests: the number of every prompt, the other part of the key; by default its place.

    Raises:
        ValueError: an empty prompt, one that fills the target's context, or a target that cannot
            take back tokens or changes its logits behind the head.
    """
    limits = _limits(model.config, prompts, max_new_tokens)
    results = [SpeculativeResult() for _ in prompts]
    stop, drafted = frozenset(stop_ids), draft.drafted
    requests = range(len(prompts)) if requests is None else requests
    noise = RequestNoise(seed, requests, max(limits) + drafted + 1, model.device)
    with torch.inference_mode(), _recording(model, draft.layer_ids) as recording:
        # 1. Prefill: the first token of every answer, which is the first anchor.
        target, state = TargetPass(model, recording, len(prompts)), draft.begin(prompts)
        place_B = torch.zeros(len(prompts), dtype=torch.long, device=model.device)
        anchor_B = rule.draw(target.prefill(prompts), noise, place_B)
        for result, limit, token in zip(results, limits, anchor_B.tolist(), strict=True):
            result.append([token], limit, stop)
        taps, counts, alive = target.taps_BSE, list(map(len, prompts)), list(range(len(prompts)))
        while True:
            # 2. Rows that are done leave; the draft reads what the others have committed.
            going = [row for row, place in enumerate(alive) if results[place].finish is None]
            if len(going) < len(alive):
                if not going:
                    return results
                for part in (target.cache, state, noise):
                    part.keep(going)
                rows_A = torch.tensor(going, device=model.device)
                anchor_B, place_B = anchor_B[rows_A], place_B[rows_A]
                taps = None if taps is None else taps[rows_A]
                counts, alive = [counts[row] for row in going], [alive[row] for row in going]
            state.extend(taps, counts)
            # 3. Draft a block, 4. have the target look at it, 5. accept a prefix.
            step_Q = torch.arange(1, drafted + 2, device=model.device)
            place_BQ = place_B[:, None] + step_Q
            drafts = rule.draft(state.propose(anchor_B), noise, place_BQ[:, :-1])
            logits_BQV = target.verify(torch.cat([anchor_B[:, None], drafts.tokens_BK], dim=1))
            verdict = rule.verify(drafts, logits_BQV, noise, place_BQ)
            # 6. Commit. This is where the host waits for the device, once per cycle.
            anchor_B = verdict.tokens_BQ.gather(1, verdict.accepted_B[:, None])[:, 0]
            place_B = place_B + verdict.accepted_B + 1
            found = torch.cat([verdict.accepted_B[:, None], verdict.tokens_BQ], dim=1).tolist()
            for place, (accepted, *tokens) in zip(alive, found, strict=True):
                results[place].append_cycle(tokens[: accepted + 1], limits[place], stop)
            counts = [accepted + 1 for accepted, *_ in found]
            taps = target.taps_BSE
            target.cache.commit(counts)


def _limits(config: Any, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> list[int]:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens={max_new_tokens}: allowed an integer >= 1")
    check_logits(config, config.model_type)
    longest = config.max_position_embeddings
    for place, prompt in enumerate(prompts):
        if not 1 <= len(prompt) < longest:
            raise ValueError(
                f"prompt {place} has {len(prompt)} tokens; allowed 1 .. {longest - 1}, which leaves"
                " room for an answer"
            )
    return [min(max_new_tokens, longest - len(prompt)) for prompt in prompts]


@contextmanager
def _recording(model: Any, layer_ids: Sequence[int]) -> Iterator[Recording | None]:
    with TargetTaps(model, layer_ids).recording() if layer_ids else nullcontext() as recording:
        yield recording
