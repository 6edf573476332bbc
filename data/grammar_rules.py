"""Reading a probabilistic grammar from a table that people can read.

One line per rule, `Left -> Child *HeadChild weight`. The star marks the child whose head word heads
the whole constituent; the head words of the other children depend on it.
"""

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from data.errors import DataError


class Rule(NamedTuple):
    """A production `left -> right`; `right[head]` is the child whose head word heads the whole."""

    left: str
    right: tuple[str, ...]
    head: int
    log_prob: float

    def __str__(self) -> str:
        """The rule as the grammar table writes it, without its weight."""
        marked = [f"*{s}" if i == self.head else s for i, s in enumerate(self.right)]
        return f"{self.left} -> {' '.join(marked)}"


def zipf(words: Sequence[str]) -> dict[str, float]:
    """Probabilities proportional to 1 / rank, in the order given."""
    total = sum(1.0 / rank for rank in range(1, len(words) + 1))
    return {word: 1.0 / (rank * total) for rank, word in enumerate(words, start=1)}


def read_rules(table: str, variables: Mapping[str, Sequence[str]]) -> list[Rule]:
    """Rules from lines `Left -> Child *HeadChild weight`, with feature variables filled in.

    A variable in brackets stands for each of its values, the same one throughout a line. Where it
    only occurs on the right, the line's weight is divided evenly among the values. Weights are
    normalised over the rules with the same left side.

    Raises:
        DataError: a line that cannot be read, which it names.
    """
    weighted: list[tuple[Rule, float]] = []
    for line in filter(None, (line.strip() for line in table.splitlines())):
        rule, weight = _read_line(line)
        weighted.extend(_fill_variables(rule, weight, variables))
    totals: dict[str, float] = defaultdict(float)
    for rule, weight in weighted:
        totals[rule.left] += weight
    return [rule._replace(log_prob=math.log(w / totals[rule.left])) for rule, w in weighted]


def _read_line(line: str) -> tuple[Rule, float]:
    match = re.fullmatch(r"(\S+) +-> +(.+?) +(\d+(?:\.\d+)?)", line)
    if match is None or float(match[3]) == 0:
        raise DataError(f"grammar: line {line!r} is not 'Left -> Child *HeadChild weight'")
    children = match[2].split()
    starred = [i for i, child in enumerate(children) if child.startswith("*")]
    if len(starred) != 1:
        raise DataError(f"grammar: line {line!r} marks {len(starred)} heads with '*', must be 1")
    right = tuple(child.removeprefix("*") for child in children)
    return Rule(match[1], right, starred[0], 0.0), float(match[3])


def _fill_variables(
    rule: Rule, weight: float, variables: Mapping[str, Sequence[str]]
) -> Iterator[tuple[Rule, float]]:
    def features(symbol: str) -> set[str]:
        return set(re.findall(r"\w+", symbol.partition("[")[2])) & set(variables)

    left = features(rule.left)
    names = sorted(left.union(*map(features, rule.right)))
    shares = math.prod(len(variables[name]) for name in names if name not in left)
    for values in itertools.product(*(variables[name] for name in names)):
        binding = dict(zip(names, values, strict=True))
        right = tuple(_fill(symbol, binding) for symbol in rule.right)
        yield Rule(_fill(rule.left, binding), right, rule.head, 0.0), weight / shares


def _fill(symbol: str, binding: Mapping[str, str]) -> str:
    base, bracket, features = symbol.partition("[")
    return base + bracket + re.sub(r"\w+", lambda match: binding.get(match[0], match[0]), features)
