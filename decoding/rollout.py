"""Thoughts and what follows them, in two stages with a boundary that is inserted from outside.

    prefix <think> | thought, at most T tokens | </think> | suffix, at most S tokens
                     sampled                     inserted   sampled

A thought that does not end by itself is ended, so every sample has a suffix to judge. All samples
of a prefix share what was read of it: it is read once, and so are its keys and values in every pass
(`models.shared_prefix`; where attention is not our own, each sample has a copy of them). Rows go on
at their own pace, each leaves when it is done, and the next prefix takes their places.

Legend: B rows being decoded, Q tokens a pass reads of each, V vocabulary, D hidden size.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from decoding.categorical import invert, keyed_uniform64, nucleus
from decoding.generate import request_key
from decoding.rollout_record import Rollout, RolloutSettings
from models.grouped_attention import NAME as GROUPED
from models.row_cache import RowCache, prefill
from models.shared_prefix import PrefixCache

# Sets these draws apart from others with the same seed.
_STREAM = 0x726F6C6C
_WORD = 1 << 64
_THOUGHT, _SUFFIX = "thought", "suffix"


@dataclass
class _Row:
    """A sample in the making; `pending` are the tokens that the next pass reads."""

    prefix_id: str
    k: int
    prompt: list[int]
    boundary: list[int]
    stage: str = _THOUGHT
    given: bool = False
    pending: list[int] = field(default_factory=list)
    thought: list[int] = field(default_factory=list)
    suffix: list[int] = field(default_factory=list)
    logprobs: dict[str, list[float]] = field(default_factory=lambda: {_THOUGHT: [], _SUFFIX: []})
    closed: bool = False
    finish: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.key = request_key(f"{self.prefix_id}/{self.k}")

    @property
    def known(self) -> list[int]:
        """What is known before anything is drawn."""
        return [*self.prompt, *self.thought, *self.boundary] if self.given else self.prompt

    def next_key(self) -> int:
        """The number that the next draw depends on: whose it is, and how many came before."""
        drawn = len(self.logprobs[_THOUGHT]) + len(self.logprobs[_SUFFIX])
        word = (self.key + drawn) % _WORD
        return word - _WORD if word >= _WORD // 2 else word

    def rollout(self) -> Rollout:
        """What has become of it."""
        return Rollout(
            self.prefix_id, self.k, self.prompt, self.thought, self.boundary, self.suffix,
            None if self.given else self.logprobs[_THOUGHT], self.logprobs[_SUFFIX],
            self.finish[_THOUGHT], self.finish[_SUFFIX], self.closed,
        )  # fmt: skip


class LocalRollouts:
    """Samples from a model in this process.

    Args:
        model: as decoding wants it (`CausalTarget.decoding_model`).
        settings: how to sample.
        forbidden_V: tokens that are never drawn, whatever their logits.
        max_positions: longest sequence of the model, prompt and sample together.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        settings: RolloutSettings,
        forbidden_V: Bool[Tensor, " V"] | None = None,
        max_positions: int | None = None,
    ) -> None:
        self.model, self.settings, self.forbidden_V = model, settings, forbidden_V
        self.head = model.get_output_embeddings()
        self.max_positions = max_positions or model.config.max_position_embeddings

    def sample(self, prompts: Sequence[tuple[str, Sequence[int]]], samples: int) -> list[Rollout]:
        """`samples` rollouts of every prompt, in the order of the prompts, then of the samples.

        Args:
            prompts: id and tokens of every prefix, its opening delimiter included.
            samples: of each.

        Raises:
            ValueError: limits that leave no room for a prompt, or a prompt that is empty, too
                long, or does not end with the opening delimiter.
        """
        boundary, limit = [self.settings.close_id], self.settings.thought_tokens
        for prefix_id, prompt in prompts:
            thought = f"{self.settings.section}.thought_tokens={limit}"
            self._check(prefix_id, prompt, limit + 1, thought)
        check_opened(prompts, self.settings.open_id)
        return self._run(
            [
                [_Row(prefix_id, k, list(prompt), boundary) for k in range(samples)]
                for prefix_id, prompt in prompts
            ]
        )

    def continuations(
        self, prompts: Sequence[tuple[str, Sequence[int]]], samples: int
    ) -> list[Rollout]:
        """The same without thoughts: suffixes right behind the prompts, which are of any kind."""
        for prefix_id, prompt in prompts:
            self._check(prefix_id, prompt)
        return self._run(
            [
                [self._plain(prefix_id, k, prompt, [], []) for k in range(samples)]
                for prefix_id, prompt in prompts
            ]
        )

    def continue_thoughts(
        self, prompts: Sequence[tuple[str, Sequence[int]]], thoughts: Sequence[Sequence[int]],
        numbers: Sequence[int] | None = None,
    ) -> list[Rollout]:  # fmt: skip
        """One suffix behind every prompt with a thought that is given and closed.

        Args:
            prompts: as of `sample`.
            thoughts: tokens without delimiters, one for every prompt.
            numbers: of the samples, which their draws depend on; all 0 where they are not given.
        """
        boundary, groups = [self.settings.close_id], []
        numbers = [0] * len(prompts) if numbers is None else numbers
        for (prefix_id, prompt), thought, k in zip(prompts, thoughts, numbers, strict=True):
            self._check(prefix_id, prompt, len(thought) + 1, f"a thought of {len(thought)} tokens")
            groups.append([self._plain(prefix_id, k, prompt, thought, boundary)])
        check_opened(prompts, self.settings.open_id)
        return self._run(groups)

    def _plain(
        self, prefix_id: str, k: int, prompt: Sequence[int], thought: Sequence[int],
        boundary: list[int],
    ) -> _Row:  # fmt: skip
        """A row that begins with its suffix."""
        row = _Row(prefix_id, k, list(prompt), boundary, _SUFFIX, given=True)
        row.thought, row.finish[_THOUGHT] = list(thought), "stop"
        return row

    def _check(
        self, prefix_id: str, prompt: Sequence[int], between: int = 0, thought: str = ""
    ) -> None:
        """See that a prompt, a thought with its boundary (`between` tokens) and a suffix fit."""
        suffix = f"{self.settings.section}.suffix_tokens={self.settings.suffix_tokens}"
        beside = f"{thought} and {suffix}" if thought else suffix
        longest = self.max_positions - between - self.settings.suffix_tokens
        if longest < 1:
            most = self.max_positions - 1 - bool(thought)
            raise ValueError(
                f"{beside}: leave no room for a prefix in the {self.max_positions} tokens of the"
                f" model; allowed: {'together ' if thought else ''}at most {most}"
            )
        if not 1 <= len(prompt) <= longest:
            raise ValueError(
                f"prefix {prefix_id!r}: {len(prompt)} tokens, and the model has room for {longest}"
                f" beside {beside}; allowed: 1 .. {longest}, or fewer tokens of these"
            )

    @torch.no_grad()
    def _run(self, groups: Sequence[Sequence[_Row]]) -> list[Rollout]:
        waiting = list(groups)
        size = max(map(len, groups), default=1)
        capacity = max(size, self.settings.rows)
        # Only attention of our own can read a prefix once for all of its samples.
        sharing = size > 1 and self.model.config._attn_implementation == GROUPED
        kind = PrefixCache if sharing else RowCache
        cache = kind(self.model.config.num_hidden_layers, capacity)
        rows: list[_Row] = []
        while waiting or rows:
            free = (capacity - len(rows)) // size
            if waiting and free:
                entering, waiting = waiting[:free], waiting[free:]
                self._enter(entering, rows, cache)
            else:
                self._advance(rows, self._step(rows, cache))
            # From the end, because a row that leaves is replaced by the last one.
            for place in reversed(range(len(rows))):
                if _SUFFIX in rows[place].finish:
                    cache.drop(place)
                    rows[place] = rows[-1]
                    rows.pop()
        return [row.rollout() for group in groups for row in group]

    def _enter(self, entering: Sequence[Sequence[_Row]], rows: list[_Row], cache: RowCache) -> None:
        """Read the prompts of groups, which all of their rows begin from."""
        copies = len(entering[0])
        last_PD = prefill(self.model, [group[0].known for group in entering], cache, copies)
        fresh = [row for group in entering for row in group]
        rows += fresh
        logits_BV = self.head(last_PD).repeat_interleave(copies, dim=0)
        if self.settings.thought_tokens == 0 and not fresh[0].given:
            for row in fresh:
                self._close(row, "length")
            return
        self._advance(fresh, logits_BV)

    def _step(self, rows: Sequence[_Row], cache: RowCache) -> Float[Tensor, "B V"]:
        """Read what is pending of every row; the logits behind it."""
        counts = [len(row.pending) for row in rows]
        queries, device = max(counts), self.model.device
        ids_BQ = torch.tensor(
            [row.pending + [0] * (queries - len(row.pending)) for row in rows], device=device
        )
        hidden_BQD = self.model.base_model(
            input_ids=ids_BQ,
            position_ids=cache.positions(queries),
            attention_mask=cache.mask(queries, self.model.dtype),
            past_key_values=cache,
            use_cache=True,
            **cache.attention_options(),
        ).last_hidden_state
        cache.commit(counts)
        last_B = torch.tensor(counts, device=device) - 1
        return self.head(hidden_BQD[torch.arange(len(rows), device=device), last_B])

    def _advance(self, rows: Sequence[_Row], logits_BV: Float[Tensor, "B V"]) -> None:
        """Draw the next token of every row, and see what follows from it."""
        key_B = torch.tensor([row.next_key() for row in rows], device=logits_BV.device)
        p_BV = sampling_distribution(
            logits_BV, self.settings.temperature, self.settings.top_p, self.forbidden_V
        )
        uniform_B = keyed_uniform64((self.settings.seed, _STREAM), key_B, 1)[:, 0]
        token_B = invert(p_BV, uniform_B)
        logp_B = p_BV.gather(-1, token_B[:, None])[:, 0].log()
        for row, token, logp in zip(rows, token_B.tolist(), logp_B.tolist(), strict=True):
            row.logprobs[row.stage].append(logp)
            self._follow(row, token)

    def _follow(self, row: _Row, token: int) -> None:
        settings = self.settings
        if row.stage == _SUFFIX:
            row.suffix.append(token)
            row.pending = [token]
            if token in settings.stop_ids:
                row.finish[_SUFFIX] = "stop"
            elif len(row.suffix) >= settings.suffix_tokens:
                row.finish[_SUFFIX] = "length"
            return
        row.closed = token == settings.close_id
        row.pending = [token]
        if row.closed:
            self._close(row, "stop")
            return
        row.thought.append(token)
        if token in settings.stop_ids:
            self._close(row, "stop")
        elif len(row.thought) >= settings.thought_tokens:
            self._close(row, "length")

    def _close(self, row: _Row, finish: str) -> None:
        """End the thought; what the model did not write itself is inserted."""
        row.finish[_THOUGHT], row.stage = finish, _SUFFIX
        if not row.closed:
            row.pending = [*row.pending, *row.boundary]


def check_opened(prompts: Sequence[tuple[str, Sequence[int]]], open_id: int) -> None:
    """Raises ValueError where a prompt, by its id, does not end with the opening delimiter."""
    for prefix_id, prompt in prompts:
        if list(prompt[-1:]) != [open_id]:
            raise ValueError(
                f"prefix {prefix_id!r}: ends with token {[*prompt[-1:]]}; allowed: the opening"
                f" delimiter, {open_id}"
            )


def sampling_distribution(
    logits_BV: Float[Tensor, "B V"],
    temperature: float,
    top_p: float,
    forbidden_V: Bool[Tensor, " V"] | None = None,
) -> Float[Tensor, "B V"]:
    """What is drawn from: softmax(logits / temperature) without forbidden tokens, cut to its
    nucleus, in fp32, summing to one."""
    logits_BV = logits_BV.float()
    if forbidden_V is not None:
        logits_BV = logits_BV.masked_fill(forbidden_V, -torch.inf)
    p_BV = (logits_BV / temperature).softmax(-1)
    if top_p == 1.0:
        return p_BV
    kept_BV = nucleus(p_BV, top_p)
    return kept_BV / kept_BV.sum(-1, keepdim=True)
