"""A shift-reduce (SLR(1)) parser: parses in linear time and proves that a grammar is unambiguous.

The automaton is the classical one (DeRemer 1971): its states are sets of rules with a dot in them,
and in every state one symbol of lookahead decides between shifting a word and reducing a rule. A
grammar whose table has no conflict has at most one derivation per string, so building the table is
a proof. The converse does not hold: some unambiguous grammars need more lookahead and are refused.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from data.errors import DataError
from data.grammar_rules import Rule

END = "<end>"
ACCEPT = "<accept>"


class Parse(NamedTuple):
    """The rules of a derivation in the order they were reduced, and each word's governor.

    `heads` follows Universal Dependencies: positions count from 1, and the root's governor is 0.
    """

    rules: list[int]
    heads: list[int]


def first_sets(rules: Sequence[Rule]) -> dict[str, set[str]]:
    """Terminals that can begin each nonterminal; no rule is empty, so only first children count."""
    first: dict[str, set[str]] = {rule.left: set() for rule in rules}
    grown = True
    while grown:
        grown = False
        for rule in rules:
            begins = first.get(rule.right[0], {rule.right[0]})
            grown |= not begins <= first[rule.left]
            first[rule.left] |= begins
    return first


def follow_sets(rules: Sequence[Rule], start: str) -> dict[str, set[str]]:
    """Terminals (or the end) that can come right after each nonterminal in a sentence."""
    first = first_sets(rules)
    follow: dict[str, set[str]] = {rule.left: set() for rule in rules}
    follow[start].add(END)
    grown = True
    while grown:
        grown = False
        for rule in rules:
            followers = [first.get(symbol, {symbol}) for symbol in rule.right[1:]]
            for symbol, after in zip(rule.right, [*followers, follow[rule.left]], strict=True):
                if symbol in follow and not after <= follow[symbol]:
                    follow[symbol] |= after
                    grown = True
    return follow


class ShiftReduceParser:
    """SLR(1) table for rules without empty right sides; raises `DataError` on a conflict."""

    def __init__(self, rules: Sequence[Rule], start: str) -> None:
        self.rules = [*rules, Rule(ACCEPT, (start,), 0, 0.0)]
        self._by_left: Mapping[str, list[int]] = defaultdict(list)
        for index, rule in enumerate(self.rules):
            self._by_left[rule.left].append(index)
        self._predicted = {left: self._left_corners(left) for left in list(self._by_left)}
        self._follow = follow_sets(self.rules, ACCEPT)
        # actions[state][terminal] is a state to shift to, or ~rule to reduce.
        self._actions: list[dict[str, int]] = []
        self._gotos: list[dict[str, int]] = []
        self._build()

    def _left_corners(self, symbol: str) -> frozenset[int]:
        """All rules that a parser waiting for `symbol` may be about to begin."""
        found: set[int] = set()
        waiting = [symbol]
        while waiting:
            for index in self._by_left.get(waiting.pop(), ()):
                if index not in found:
                    found.add(index)
                    waiting.append(self.rules[index].right[0])
        return frozenset(found)

    def _transitions(self, kernel: frozenset[tuple[int, int]]) -> dict[str, set[tuple[int, int]]]:
        """Group a state's dotted rules by the symbol after the dot, and move the dot over it."""
        moves: dict[str, set[tuple[int, int]]] = defaultdict(set)
        for index, dot in kernel:
            right = self.rules[index].right
            if dot < len(right):
                moves[right[dot]].add((index, dot + 1))
        for symbol in list(moves):
            for index in self._predicted.get(symbol, ()):
                moves[self.rules[index].right[0]].add((index, 1))
        return moves

    def _build(self) -> None:
        """Enumerate the states breadth first and fill their rows."""
        initial = frozenset({(len(self.rules) - 1, 0)})
        states = {initial: 0}
        queue = [initial]
        for kernel in queue:
            row: dict[str, int] = {}
            moves = {s: frozenset(items) for s, items in self._transitions(kernel).items()}
            for symbol, target in moves.items():
                if target not in states:
                    states[target] = len(states)
                    queue.append(target)
                row[symbol] = states[target]
            self._gotos.append({s: t for s, t in row.items() if s in self._by_left})
            self._actions.append({s: t for s, t in row.items() if s not in self._by_left})
            self._add_reductions(kernel, self._actions[-1])

    def _add_reductions(self, kernel: frozenset[tuple[int, int]], row: dict[str, int]) -> None:
        """Reduce each finished rule on every terminal that may follow its left side."""
        finished = [i for i, dot in sorted(kernel) if dot == len(self.rules[i].right)]
        for index in finished:
            rule = self.rules[index]
            for terminal in sorted(self._follow[rule.left]):
                if terminal in row:
                    other = row[terminal]
                    rival = f"'{self.rules[~other]}'" if other < 0 else "reading on"
                    raise DataError(
                        f"grammar: cannot decide between '{rule}' and {rival} before {terminal!r}; "
                        "the rules must form an SLR(1) grammar, which excludes ambiguity"
                    )
                row[terminal] = ~index

    def parse(self, terminals: Sequence[str]) -> Parse | None:
        """The derivation of a string of terminals, or None where there is none.

        The stack carries, per constituent, the position of its head word; a reduction hangs the
        head words of the other children on the head child's.
        """
        states, head_words = [0], []
        reduced: list[int] = []
        heads = [0] * len(terminals)
        position = 0
        while True:
            lookahead = terminals[position] if position < len(terminals) else END
            action = self._actions[states[-1]].get(lookahead)
            if action is None:
                return None
            if action >= 0:
                position += 1
                states.append(action)
                head_words.append(position)
                continue
            rule = self.rules[~action]
            if rule.left == ACCEPT:
                return Parse(reduced, heads)
            size = len(rule.right)
            children = head_words[-size:]
            governor = children[rule.head]
            for child in children:
                if child != governor:
                    heads[child - 1] = governor
            del states[-size:], head_words[-size:]
            states.append(self._gotos[states[-1]][rule.left])
            head_words.append(governor)
            reduced.append(~action)
