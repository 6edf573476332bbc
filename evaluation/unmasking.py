"""In which order a sampler reveals the words of a sentence, beside their depth in its tree.

Legend: L places of a row, T tokens of a document. Steps are forward passes, -1 where a place was
given instead of generated.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from data.blocks import IDS, PackingReport
from data.depth import DEPTH, tree_features
from data.encoding import encode_documents
from data.source import Document
from data.tokenization import SpecialIds
from evaluation.statistics import bootstrap_ratio

Array = NDArray[np.float64]
Places = NDArray[np.int64]
# Texts to documents whose words have depths (`data.source`), None for a text without a tree.
Parser = Callable[[Sequence[str]], Sequence[Document | None]]
# Depths of the words of a sentence, or None for what is none.
WordParser = Callable[[Sequence[str]], Sequence[int] | None]

USED, UNPARSED, OTHER_TOKENS = "used", "not parsed", "other tokens"


@dataclass(frozen=True)
class OrderedSample:
    """A sample whose first document has a tree.

    Attributes:
        text: that document.
        status: USED; UNPARSED if the parser found no tree; OTHER_TOKENS if the text's tokens are
            not those that were sampled, so that its depths have no places. The rest is empty then.
        depth: [T] of every token; negative for one without a word (white space of its own).
        step: [T] when it was revealed.
        rank: [T] place of the step among those of its block, 0 first .. 1 last; nan for a token
            that was given, or is the only one of its block.
        block: [T] number of its block.
    """

    text: str
    status: str
    depth: Places
    step: Places
    rank: Array
    block: Places

    @property
    def has_order(self) -> NDArray[np.bool_]:
        """[T] tokens of words that were generated, and not alone in their block."""
        return ~np.isnan(self.rank) & (self.depth >= 0)

    @property
    def tau(self) -> float:
        """Kendall's tau-b of depth and step within blocks; positive: shallow words come first."""
        known = self.has_order
        return kendall_tau_b(self.depth[known], self.step[known], self.block[known])

    def line(self) -> dict[str, Any]:
        """One line of unmasking_order.jsonl; what JSON cannot say is null."""
        ranks = [None if math.isnan(rank) else round(rank, 6) for rank in self.rank.tolist()]
        tau = self.tau
        return {
            "status": self.status,
            "text": self.text,
            "tau": None if math.isnan(tau) else tau,
            "depth": self.depth.tolist(),
            "step": self.step.tolist(),
            "rank": ranks,
            "block": self.block.tolist(),
        }


def block_ranks(step_L: Places, block_size: int) -> Array:
    """[L] rank of every step among the generated places of its block, from 0 (first) to 1 (last).

    (number of earlier ones + half of the simultaneous ones) / (n - 1), n generated places in the
    block: its mean over a block is 1/2. nan for places that were given, and where n = 1.
    """
    rank_L = np.full(len(step_L), math.nan)
    for start in range(0, len(step_L), block_size):
        places = start + np.flatnonzero(step_L[start : start + block_size] >= 0)
        if len(places) > 1:
            step = step_L[places]
            earlier = (step < step[:, None]).sum(1)
            together = (step == step[:, None]).sum(1) - 1
            rank_L[places] = (earlier + together / 2) / (len(places) - 1)
    return rank_L


def kendall_tau_b(first: Places, second: Places, block: Places) -> float:
    """Kendall's tau-b (Kendall 1945) over the pairs within a block.

    sum sign(dx) sign(dy) / sqrt(sum sign(dx)^2 sum sign(dy)^2), summed over pairs of one block: the
    order of the blocks is not the sampler's choice. nan where no pair differs in either.
    """
    upper = np.triu(block[:, None] == block, k=1)
    sign_first = np.sign(first[:, None] - first)[upper]
    sign_second = np.sign(second[:, None] - second)[upper]
    pairs = float((sign_first**2).sum()) * float((sign_second**2).sum())
    if pairs == 0:
        return math.nan
    return float((sign_first * sign_second).sum()) / math.sqrt(pairs)


def ordered_samples(
    rows: Sequence[Sequence[int]],
    steps: Sequence[Places],
    block_size: int,
    tokenizer: PreTrainedTokenizerFast,
    special: SpecialIds,
    parser: Parser,
) -> list[OrderedSample]:
    """Join what was sampled, when, and how deep it hangs; one result per row.

    Args:
        rows: tokens of each sample.
        steps: forward pass of every place; longer than its row where the sample ended early.
        block_size: places that are denoised together.
        tokenizer: of the model.
        special: its special tokens.
        parser: of the first documents of the samples.
    """
    spans = [_first_document(row, special) for row in rows]
    ids = [list(row[start:end]) for row, (start, end) in zip(rows, spans, strict=True)]
    texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
    trees = parser(texts)
    columns = iter(_token_depths([tree for tree in trees if tree], tokenizer, special))
    samples = []
    for text, tokens, found, (start, _), step in zip(texts, ids, trees, spans, steps, strict=True):
        if found is None:
            samples.append(_left_out(text, UNPARSED))
            continue
        again, depth = next(columns)
        if again != tokens:
            samples.append(_left_out(text, OTHER_TOKENS))
            continue
        here = slice(start, start + len(tokens))
        rank, block = block_ranks(step, block_size), np.arange(len(step)) // block_size
        samples.append(OrderedSample(text, USED, depth, step[here], rank[here], block[here]))
    return samples


def by_words(find: WordParser) -> Parser:
    """A parser of texts whose words stand between white space."""

    def trees(texts: Sequence[str]) -> list[Document | None]:
        """One document per text."""
        depths = [find(text.split()) for text in texts]
        return [
            None if found is None else {"text": text, "features": tree_features(found)}
            for text, found in zip(texts, depths, strict=True)
        ]

    return trees


def _first_document(row: Sequence[int], special: SpecialIds) -> tuple[int, int]:
    """Its first and last place; the first token may be the same as EOS, or BOS."""
    start = int(len(row) > 0 and row[0] == special.bos)
    ends = [place for place in range(1, len(row)) if row[place] == special.eos]
    return start, ends[0] if ends else len(row)


def _token_depths(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerFast, special: SpecialIds
) -> list[tuple[list[int], Places]]:
    """Tokens and their depths of every document, as packing would give them."""
    result = []
    for batch in encode_documents(documents, tokenizer, special, PackingReport()):
        cuts = np.cumsum(batch.lengths)[:-1]
        for ids, depth in zip(
            np.split(batch.columns[IDS], cuts), np.split(batch.columns[DEPTH], cuts), strict=True
        ):
            result.append((ids.tolist(), depth.astype(np.int64)))
    return result


def _left_out(text: str, status: str) -> OrderedSample:
    none = np.zeros(0, dtype=np.int64)
    return OrderedSample(text, status, none, none, np.zeros(0), none)


def rank_lines(samples: Sequence[OrderedSample], seed: int = 0) -> list[dict[str, Any]]:
    """Mean reveal rank of the tokens of every depth, with a 95 % bootstrap interval over samples.

    An order that ignores the text, as in first hitting, has the mean 1/2 at every depth over all
    samples. Only those with a tree are seen here, which are the orders that led to a sentence, so
    a small distance from 1/2 can be that choice. nan bounds where a single sample has the depth.
    """
    used = [sample for sample in samples if sample.status == USED]
    depths = sorted({int(depth) for sample in used for depth in sample.depth[sample.has_order]})
    lines = []
    for depth in depths:
        ranks = [sample.rank[sample.has_order & (sample.depth == depth)] for sample in used]
        ranks = [rank for rank in ranks if len(rank)]
        sums, counts = np.array([r.sum() for r in ranks]), np.array([float(len(r)) for r in ranks])
        found = bootstrap_ratio(sums, counts, seed=seed)
        several = len(ranks) > 1
        lines.append(
            {
                "depth": depth,
                "tokens": int(counts.sum()),
                "samples": len(ranks),
                "rank": found.value,
                "rank_low": found.low if several else math.nan,
                "rank_high": found.high if several else math.nan,
            }
        )
    return lines


def tau_metrics(samples: Sequence[OrderedSample], seed: int = 0) -> dict[str, float]:
    """Mean over samples of Kendall's tau-b of depth and step, and what was left out.

    The expectation over all samples is 0 where the order ignores the text, as in first hitting.
    Leaving out samples without a tree keeps the orders that led to a sentence, which can shift it:
    compare samplers with each other, not only with 0.

    Returns:
        samples; samples_used, samples_not_parsed, samples_other_tokens, which add up to it;
        tau_samples, the used ones that have a pair to compare; tau with tau_low and tau_high, a
        95 % bootstrap interval over samples (absent without a sample, nan bounds for one).
    """
    statuses = [sample.status for sample in samples]
    taus = [sample.tau for sample in samples if sample.status == USED]
    taus = [tau for tau in taus if not math.isnan(tau)]
    metrics: dict[str, float] = {"samples": len(samples)}
    for status in (USED, UNPARSED, OTHER_TOKENS):
        metrics[f"samples_{status.replace(' ', '_')}"] = statuses.count(status)
    metrics["tau_samples"] = len(taus)
    if taus:
        found = bootstrap_ratio(taus, np.ones(len(taus)), seed=seed)
        low, high = (found.low, found.high) if len(taus) > 1 else (math.nan, math.nan)
        metrics |= {"tau": found.value, "tau_low": low, "tau_high": high}
    return metrics
