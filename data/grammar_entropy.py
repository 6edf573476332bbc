"""Exact entropy and length of the sentences of a probabilistic grammar, by dynamic programming.

For each symbol and each number n of words two sums over its derivations are carried,

    P_n = sum p        and        E_n = sum p log p,

and they are closed under the two ways of building derivations: alternatives add, and for
constituents side by side

    sum pp' log(pp') = sum p' . sum p log p + sum p . sum p' log p'

(the expectation semiring, Li and Eisner 2009). The cost is quadratic in the length and linear in
the size of the grammar.
"""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import NamedTuple

import numpy as np

from data.errors import DataError
from data.grammar_rules import Rule


class Moments(NamedTuple):
    """Exact properties of the sentences of at most `max_words` words.

    Attributes:
        log_z: log of the probability that the unbounded grammar stays within the bound.
        entropy: H = -sum p log p, nats per sentence.
        expected_words: mean number of words.
    """

    log_z: float
    entropy: float
    expected_words: float


def sentence_moments(
    rules: Sequence[Rule], word_log_probs: Mapping[str, Iterable[float]], start: str, max_words: int
) -> Moments:
    """Moments of the derivations of `start` with at most `max_words` words, renormalised.

    Args:
        rules: normalised productions without empty right sides.
        word_log_probs: for each word class the log-probabilities of its words.
        start: the start symbol.
        max_words: longest sentence.

    Raises:
        DataError: one-child rules form a cycle, or no sentence is short enough.
    """
    mass, mass_log_mass = length_table(rules, word_log_probs, max_words)[start]
    z = float(mass.sum())
    if z == 0.0:
        raise DataError(f"grammar: max_words is {max_words}, but no sentence is that short")
    expected_words = float(mass @ np.arange(max_words + 1)) / z
    # -sum p/Z log(p/Z) = -(sum p log p)/Z + log Z
    return Moments(math.log(z), math.log(z) - float(mass_log_mass.sum()) / z, expected_words)


def length_table(
    rules: Sequence[Rule], word_log_probs: Mapping[str, Iterable[float]], max_words: int
) -> dict[str | tuple[str, ...], np.ndarray]:
    """For each symbol an array [2, max_words + 1] with the rows P_n and E_n, n = 0 .. max_words."""
    # The keys are symbols, and sequences of two or more symbols that end a rule's right side.
    tables: dict[str | tuple[str, ...], np.ndarray] = defaultdict(
        lambda: np.zeros((2, max_words + 1))
    )
    for symbol, log_probs in word_log_probs.items():
        logs = np.array(list(log_probs))
        tables[symbol][:, 1:2] = [[np.exp(logs).sum()], [np.exp(logs) @ logs]]
    sequences = {rule.right[i:] for rule in rules for i in range(len(rule.right) - 1)}
    ordered_rules = _children_before_parents(rules)
    for length in range(1, max_words + 1):
        # A sequence only needs shorter parts, so all sequences come first.
        for sequence in sequences:
            rest = sequence[1:] if len(sequence) > 2 else sequence[1]
            tables[sequence][:, length] = _product(tables[sequence[0]], tables[rest], length)
        for rule in ordered_rules:
            mass, mass_log_mass = tables[_key(rule.right)][:, length]
            weight = math.exp(rule.log_prob)
            tables[rule.left][:, length] += (
                weight * mass,
                weight * (mass_log_mass + rule.log_prob * mass),
            )
    return tables


def _key(right: tuple[str, ...]) -> str | tuple[str, ...]:
    return right if len(right) > 1 else right[0]


def _product(first: np.ndarray, second: np.ndarray, length: int) -> np.ndarray:
    """Entry `length` of the product of two tables: (P, E)(P', E') = (PP', PE' + EP'), convolved."""
    mass, mass_log_mass = first[:, 1:length]
    other_mass, other_mass_log_mass = second[:, length - 1 : 0 : -1]
    return np.array([mass @ other_mass, mass @ other_mass_log_mass + mass_log_mass @ other_mass])


def _children_before_parents(rules: Sequence[Rule]) -> list[Rule]:
    """The rules ordered so that an only child, as long as its parent, is finished before it."""
    only_children: dict[str, set[str]] = {rule.left: set() for rule in rules}
    for rule in rules:
        if len(rule.right) == 1:
            only_children[rule.left].add(rule.right[0])
    try:
        order = list(TopologicalSorter(only_children).static_order())
    except CycleError as error:
        cycle = " -> ".join(error.args[1])
        raise DataError(f"grammar: one-child rules form a cycle: {cycle}") from None
    rank = {symbol: i for i, symbol in enumerate(order)}
    return sorted(rules, key=lambda rule: rank[rule.left])
