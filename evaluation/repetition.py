"""How much texts repeat themselves: the share of their n-grams that occurred before.

    rate(text) = sum over distinct n-grams of (count - 1) / number of n-grams = 1 - distinct / all

Legend: a text is a sequence of tokens, ids or words.
"""

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from evaluation.degeneration import repeated_share
from evaluation.statistics import mean_and_standard_error


@dataclass(frozen=True)
class RepetitionRate:
    """Mean rate of texts that have an n-gram, its standard error, and how many texts these are.

    `rate` is None where there is no such text, `standard_error` nan where there is one. `too_short`
    counts texts without an n-gram, which have no rate.
    """

    rate: float | None
    standard_error: float | None
    texts: int
    too_short: int


def repetition_rate(texts: Iterable[Sequence[Hashable]], n: int = 4) -> RepetitionRate:
    """The mean over texts, each of which counts the same whatever its length.

    n-grams are looked for in their own text: what two texts have in common is no repetition.
    """
    rates, too_short = [], 0
    for text in texts:
        if len(text) < n:
            too_short += 1
        else:
            rates.append(repeated_share(text, n))
    if not rates:
        return RepetitionRate(None, None, 0, too_short)
    rate, error = mean_and_standard_error(rates)
    return RepetitionRate(rate, error, len(rates), too_short)
