"""Text that only repeats itself: the loops that greedy decoding falls into and never leaves.

Two rules, on token ids or on words alike; text that breaks either is degenerate.

1. Loop: the text ends with one period written over and over: at least `repeats` times in a row,
   over at least `span` tokens. What precedes the loop does not matter, and the very last token
   need not fit, because it may be the end token.
2. Repeated n-grams: of the n-grams of the whole text at least `repeated_share` occurred before,
   1 - distinct / all (seq-rep-n of Welleck et al., arXiv:1908.04319). This finds loops that count
   ("Step 17: ..."), which no exact period describes.

The defaults let through what answers rightly repeat: a line of a table, a number with many zeros,
a formula carried from step to step.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.errors import DataError


class Loop(NamedTuple):
    """The end of a text that repeats.

    Attributes:
        period: tokens that are written over and over, the smallest such number.
        span: tokens of the whole repetition; the last copy may be a part.
    """

    period: int
    span: int


@dataclass(frozen=True)
class LoopRule:
    """When a text counts as degenerate.

    Attributes:
        repeats: least copies of the period at the end.
        span: least tokens that they cover.
        ngram: n of the repeated n-grams, in tokens.
        repeated_share: least share of n-grams that occurred before, in (0, 1].
        least_ngrams: n-grams below which the share says nothing.
    """

    repeats: int = 4
    span: int = 32
    ngram: int = 5
    repeated_share: float = 0.5
    least_ngrams: int = 64

    def __post_init__(self) -> None:
        for name, least in (("repeats", 2), ("span", 2), ("ngram", 1), ("least_ngrams", 1)):
            if getattr(self, name) < least:
                raise DataError(f"{name}={getattr(self, name)}: allowed: an integer >= {least}")
        if not 0 < self.repeated_share <= 1:
            raise DataError(f"repeated_share={self.repeated_share}: allowed: (0, 1]")


DEFAULT = LoopRule()


def is_degenerate(tokens: Sequence[Hashable], rule: LoopRule = DEFAULT) -> bool:
    """Whether a text of tokens (ids, or words) only repeats itself, by the two rules above."""
    if find_loop(tokens, rule) is not None:
        return True
    enough = len(tokens) - rule.ngram + 1 >= rule.least_ngrams
    return enough and repeated_share(tokens, rule.ngram) >= rule.repeated_share


def find_loop(tokens: Sequence[Hashable], rule: LoopRule = DEFAULT) -> Loop | None:
    """The loop that the text ends with, if it does; its last token may be another one."""
    for ending in (tokens, tokens[:-1]):
        loop = _loop_at_the_end(ending, rule)
        if loop is not None:
            return loop
    return None


def repeated_share(tokens: Sequence[Hashable], n: int) -> float:
    """1 - distinct / all n-grams; 0 where the text has none."""
    count = len(tokens) - n + 1
    if count < 1:
        return 0.0
    return 1.0 - len({tuple(tokens[at : at + n]) for at in range(count)}) / count


def _loop_at_the_end(tokens: Sequence[Hashable], rule: LoopRule) -> Loop | None:
    """The smallest period p whose repetition is long enough.

    Read backwards, a text ends with period p over p + z(p) tokens, where z(p) is how far its copy
    moved by p agrees with it.
    """
    agreement = _agreement_with_start(tokens[::-1])
    for period in range(1, len(tokens) // rule.repeats + 1):
        span = period + agreement[period]
        if span >= max(rule.span, rule.repeats * period):
            return Loop(period, span)
    return None


def _agreement_with_start(tokens: Sequence[Hashable]) -> list[int]:
    """z(i): the length of the common start of tokens[i:] and tokens, in linear time (the Z
    function of Gusfield 1997, 1.4)."""
    length = len(tokens)
    z = [length] + [0] * (length - 1) if length else []
    left = right = 0  # the known stretch tokens[left:right] == tokens[:right - left] that ends last
    for place in range(1, length):
        match = min(right - place, z[place - left]) if place < right else 0
        while place + match < length and tokens[match] == tokens[place + match]:
            match += 1
        z[place] = match
        if place + match > right:
            left, right = place, place + match
    return z
