"""How probable a causal model finds texts that are given to it.

Legend: R rows of one forward pass, S tokens of the longest, N places that are scored, P of them
in one piece, D hidden size, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor

from models.causal import CausalTarget
from models.decodable import check_decodable, check_logits

# A prompt and its continuation, as tokens.
Pair = tuple[Sequence[int], Sequence[int]]
# Rows of logits that are alive at a time: 512 of 152 000 entries take 300 MB in fp32.
_LOGIT_ROWS = 512


@runtime_checkable
class Scores(Protocol):
    """Says how probable texts are."""

    def loglikelihood(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """log p(continuation | prompt) of every pair, in nats and in order, and whether greedy
        decoding behind the prompt would write that continuation."""
        ...


@dataclass(frozen=True)
class CausalScores:
    """The likelihoods of a causal model.

    Attributes:
        target: the model, on its device.
        batch_size: rows of a forward pass.
    """

    target: CausalTarget
    batch_size: int = 32

    def loglikelihood(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """See `continuation_likelihoods`."""
        return continuation_likelihoods(self.target, pairs, self.batch_size)


def prefix_id(tokenizer: Any) -> int:
    """The token that stands before a text that has nothing before it: BOS, or else EOS.

    Raises:
        ValueError: the tokenizer has neither.
    """
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    if begin is None and end is None:
        raise ValueError(
            "the tokenizer has neither BOS nor EOS; give a prompt of one token or more"
        )
    return end if begin is None else begin


@torch.no_grad()
def continuation_likelihoods(
    target: CausalTarget, pairs: Sequence[Pair], batch_size: int = 32
) -> list[tuple[float, bool]]:
    """log p(continuation | prompt) = sum_i log p(c_i | prompt, c_<i), in nats.

    An empty prompt is `prefix_id`. Of a pair that is too long the model reads the end, with every
    token of the continuation predicted. Pairs that read the same, as the choices of one token
    behind a question do, share a row.

    Args:
        target: the model; logits are read in fp32 or better, at the scored places alone.
        pairs: prompts and continuations as tokens.
        batch_size: rows of a forward pass; those of like length run together.

    Returns:
        For every pair its log-likelihood, and whether every token is the most probable one.

    Raises:
        ValueError: a model that changes its logits behind the head or whose rows depend on each
            other; a continuation without tokens or longer than the model's positions; unknown ids.
    """
    check_decodable(target.model.config, target.name)
    check_logits(target.model.config, target.name)
    rows: dict[tuple[int, ...], list[int]] = {}
    for place, (prompt, continuation) in enumerate(pairs):
        rows.setdefault(_read_tokens(target, prompt, continuation), []).append(place)
    ordered = sorted(rows.items(), key=lambda row: len(row[0]), reverse=True)
    answers: dict[int, tuple[float, bool]] = {}
    for first in range(0, len(ordered), batch_size):
        batch = ordered[first : first + batch_size]
        places = [place for _, of_row in batch for place in of_row]
        row_of = [row for row, (_, of_row) in enumerate(batch) for _ in of_row]
        wanted = [list(pairs[place][1]) for place in places]
        found = _batch_likelihoods(target, [tokens for tokens, _ in batch], row_of, wanted)
        answers.update(zip(places, found, strict=True))
    return [answers[place] for place in range(len(pairs))]


def _read_tokens(
    target: CausalTarget, prompt: Sequence[int], continuation: Sequence[int]
) -> tuple[int, ...]:
    """What the model reads: all but the last token, cut on the left to its positions."""
    longest, vocabulary = target.max_positions, len(target.embedding_VD)
    if not 1 <= len(continuation) <= longest:
        raise ValueError(f"a continuation of {len(continuation)} tokens; allowed 1 .. {longest}")
    tokens = (*(prompt or [prefix_id(target.tokenizer)]), *continuation)[-(longest + 1) :]
    if not 0 <= min(tokens) <= max(tokens) < vocabulary:
        raise ValueError(f"token ids outside 0 .. {vocabulary - 1}")
    return tokens[:-1]


def _batch_likelihoods(
    target: CausalTarget,
    rows: Sequence[Sequence[int]],
    row_of: Sequence[int],
    wanted: Sequence[Sequence[int]],
) -> list[tuple[float, bool]]:
    """One forward pass over rows; `wanted` continuations end where row number `row_of` does.

    Padding stands on the right, where no token of a row looks.
    """
    device = target.model.device
    ids_RS = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    for row, tokens in enumerate(rows):
        ids_RS[row, : len(tokens)] = torch.tensor(tokens)
    hidden_RSD = target.model.base_model(
        input_ids=ids_RS.to(device), use_cache=False
    ).last_hidden_state
    counts = [len(tokens) for tokens in wanted]
    row_N = torch.tensor(row_of).repeat_interleave(torch.tensor(counts))
    ends = [len(rows[row]) for row in row_of]
    place_N = torch.cat(
        [torch.arange(end - count, end) for end, count in zip(ends, counts, strict=True)]
    )
    token_N = torch.tensor([token for tokens in wanted for token in tokens], device=device)
    hidden_ND = hidden_RSD[row_N.to(device), place_N.to(device)]
    logprob_N, best_N = token_likelihoods(hidden_ND, target.model.get_output_embeddings(), token_N)
    sums = [float(part.sum()) for part in logprob_N.cpu().split(counts)]
    greedy = [bool(part.all()) for part in best_N.cpu().split(counts)]
    return list(zip(sums, greedy, strict=True))


def token_likelihoods(
    hidden_ND: Float[Tensor, "N D"],
    head: Callable[[Tensor], Tensor],
    token_N: Int[Tensor, " N"],
) -> tuple[Float64[Tensor, " N"], Bool[Tensor, " N"]]:
    """log softmax(head(h))_token in nats, and whether no other token is more probable.

    Of tokens that are equally probable the first is the best, as in greedy decoding. Softmax in
    fp32 or better, over no more than some hundred rows of logits at a time.
    """
    logprobs, best = [], []
    parts = zip(hidden_ND.split(_LOGIT_ROWS), token_N.split(_LOGIT_ROWS), strict=True)
    for hidden_PD, token_P in parts:
        logits_PV = head(hidden_PD)
        logits_PV = logits_PV.to(torch.promote_types(logits_PV.dtype, torch.float32))
        logprobs.append(-F.cross_entropy(logits_PV, token_P, reduction="none").double())
        best.append(logits_PV.argmax(-1) == token_P)
    return torch.cat(logprobs), torch.cat(best)
