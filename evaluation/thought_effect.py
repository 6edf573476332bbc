"""Whether a thought helps: the likelihood of the text behind it, with it, without it, and with
another document's thought in its place.

    suffix_nll_X = - sum log p(suffix | prefix, X) / sum of tokens,  X nothing, its thought, another

Likelihoods are in nats per token of the suffixes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from evaluation.statistics import ratio_with_standard_error
from objectives.token_kinds import DELIMITER, TEXT

Pair = tuple[Sequence[int], Sequence[int]]
Likelihoods = Callable[[Sequence[Pair]], Sequence[tuple[float, bool]]]


@dataclass(frozen=True)
class Document:
    """Tokens of a document, and what each of them is (`objectives.token_kinds`)."""

    ids: list[int]
    kinds: list[int]

    def text(self) -> list[int]:
        """The tokens without thoughts and delimiters."""
        return [token for token, kind in zip(self.ids, self.kinds, strict=True) if kind == TEXT]


@dataclass(frozen=True)
class Passage:
    """The first thought of a document, delimiters included, and the text on both sides."""

    prefix: list[int]
    thought: list[int]
    suffix: list[int]


def first_passage(document: Document, reach: int) -> Passage | None:
    """None where there is no thought, or no text on one of its sides.

    Args:
        document: its tokens.
        reach: most tokens of the suffix, which ends at the next thought.
    """
    kinds = document.kinds
    start = kinds.index(DELIMITER) if DELIMITER in kinds else len(kinds)
    stop = next((at for at in range(start, len(kinds)) if kinds[at] == TEXT), len(kinds))
    end = next((at for at in range(stop, len(kinds)) if kinds[at] != TEXT), len(kinds))
    ids = document.ids
    passage = Passage(ids[:start], ids[start:stop], ids[stop : min(end, stop + reach)])
    return passage if passage.prefix and passage.thought and passage.suffix else None


def thought_effect(
    documents: Iterable[Document], likelihoods: Likelihoods, reach: int = 64
) -> dict[str, float]:
    """`suffix_nll_raw`, `_thought`, `_corrupted`, and what the thought gains on both.

    The corrupted thought is that of the next document that has one, in a circle.
    `thought_gain_raw` = raw - thought and `thought_gain_corrupted` = corrupted - thought, each with
    its standard error `_se` over documents, paired. `thought_documents` counts them; with fewer
    than two there is nothing to exchange, and nothing else is returned.
    """
    found = (first_passage(document, reach) for document in documents)
    passages = [passage for passage in found if passage is not None]
    if len(passages) < 2:
        return {"thought_documents": len(passages)}
    others = [*passages[1:], passages[0]]
    pairs: list[Pair] = []
    for one, other in zip(passages, others, strict=True):
        for thought in ([], one.thought, other.thought):
            pairs.append(([*one.prefix, *thought], one.suffix))
    nats = [-nats for nats, _ in likelihoods(pairs)]
    raw, own, corrupted = nats[0::3], nats[1::3], nats[2::3]
    tokens = [float(len(one.suffix)) for one in passages]
    metrics: dict[str, float] = {"thought_documents": len(passages)}
    for name, values in (("raw", raw), ("thought", own), ("corrupted", corrupted)):
        metrics[f"suffix_nll_{name}"] = ratio_with_standard_error(values, tokens).value
    for name, values in (("raw", raw), ("corrupted", corrupted)):
        gains = [there - here for there, here in zip(values, own, strict=True)]
        gain, error = ratio_with_standard_error(gains, tokens)
        metrics |= {f"thought_gain_{name}": gain, f"thought_gain_{name}_se": error}
    return metrics
