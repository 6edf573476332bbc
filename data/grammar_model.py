"""Probabilistic grammars with dependency heads, whose string probabilities and entropy are exact.

A derivation's probability is the product of its rules' and its words' probabilities (Booth and
Thompson 1973). Sentences longer than `max_words` are rejected, so with Z = P(length <= max_words)

    log p(words) = sum over rules r of log p(r) + sum over words w of log p(w | its class) - log Z.

Because the grammar is unambiguous (see `data.grammar_parser`) this is the probability of the
string, and the entropy of derivations is the entropy of strings. Values are in nats.
"""

import itertools
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.depth import depths_from_heads
from data.errors import DataError
from data.grammar_entropy import Moments, sentence_moments
from data.grammar_parser import ShiftReduceParser
from data.grammar_rules import Rule

Lexicon = Mapping[str, Mapping[str, float]]
_DRAWS_AT_ONCE = 64


@dataclass(frozen=True, slots=True)
class Sentence:
    """A sentence with its gold dependency tree and its probability.

    Attributes:
        words: the word forms.
        heads: governor of each word, Universal Dependencies convention: from 1, and 0 for the root.
        depths: arcs between each word and the root; the root has depth 0.
        log_prob: log-probability in nats, given that a sentence has at most `max_words` words.
    """

    words: tuple[str, ...]
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    log_prob: float


class _Choices(NamedTuple):
    """Alternatives of one symbol: cumulative probabilities, log-probabilities and results.

    A result is a word, or the children of a rule with the index of the head among them.
    """

    cumulative: list[float]
    log_probs: list[float]
    results: list[str | tuple[tuple[str, ...], int]]


class ProbabilisticGrammar:
    """Sentences of at most `max_words` words from weighted rules and a lexicon.

    Args:
        rules: normalised productions; the first one's left side is the start symbol. A symbol is a
            nonterminal (some rule's left side), a word class (a key of the lexicon), or, when it
            does not begin with a capital, a word standing for itself.
        lexicon: probability of each word within its class; a word form belongs to one class only.
        max_words: longest sentence.

    Attributes:
        moments: log Z, entropy and mean length of the bounded language.

    Raises:
        DataError: undefined symbol, word in two classes, class that no rule uses, rules that may
            be ambiguous, or no sentence short enough.
    """

    def __init__(self, rules: Sequence[Rule], lexicon: Lexicon, max_words: int) -> None:
        if max_words < 1:
            raise DataError(f"grammar: max_words is {max_words}, must be at least 1")
        self.rules = list(rules)
        self.lexicon = lexicon
        self.max_words = max_words
        self.start = self.rules[0].left
        self._class_of, self._word_log_probs = self._index_words()
        self._choices = self._tabulate_choices()
        self._parser = ShiftReduceParser(self.rules, self.start)
        self.moments: Moments = sentence_moments(
            self.rules,
            {symbol: self._choices[symbol].log_probs for symbol in self._class_of.values()},
            self.start,
            max_words,
        )

    def _index_words(self) -> tuple[dict[str, str], dict[str, float]]:
        """Class and log-probability of each word form; literal words are their own class."""
        class_of: dict[str, str] = {}
        log_probs: dict[str, float] = {}
        nonterminals = {rule.left for rule in self.rules}
        symbols = {symbol for rule in self.rules for symbol in rule.right} - nonterminals
        for symbol in sorted(symbols):
            if symbol not in self.lexicon and symbol[0].isupper():
                raise DataError(f"grammar: symbol {symbol!r} has neither rules nor words")
            for word, prob in self.lexicon.get(symbol, {symbol: 1.0}).items():
                if word in class_of:
                    raise DataError(f"grammar: {word!r} is in {class_of[word]!r} and {symbol!r}")
                class_of[word], log_probs[word] = symbol, math.log(prob)
        if unused := sorted(set(self.lexicon) - symbols):
            raise DataError(f"grammar: no rule uses the word class {unused[0]!r}")
        return class_of, log_probs

    def _tabulate_choices(self) -> dict[str, _Choices]:
        choices: dict[str, _Choices] = defaultdict(lambda: _Choices([], [], []))
        for rule in self.rules:
            choices[rule.left].log_probs.append(rule.log_prob)
            choices[rule.left].results.append((rule.right, rule.head))
        for word, symbol in self._class_of.items():
            choices[symbol].log_probs.append(self._word_log_probs[word])
            choices[symbol].results.append(word)
        for options in choices.values():
            options.cumulative.extend(itertools.accumulate(map(math.exp, options.log_probs)))
            # The sum may round to just below 1, and no draw may fall into the gap.
            options.cumulative[-1] = math.inf
        return dict(choices)

    def vocabulary(self) -> list[str]:
        """All word forms, sorted."""
        return sorted(self._class_of)

    def entropy_per_token(self) -> float:
        """True entropy in nats per token, the end-of-sentence token counted: H / E[words + 1]."""
        return self.moments.entropy / (self.moments.expected_words + 1.0)

    def parse(self, words: Sequence[str]) -> Sentence | None:
        """The one derivation of `words`, or None if they are no sentence of at most `max_words`."""
        if not 0 < len(words) <= self.max_words or any(w not in self._class_of for w in words):
            return None
        parse = self._parser.parse([self._class_of[word] for word in words])
        if parse is None:
            return None
        log_prob = sum(self.rules[index].log_prob for index in parse.rules)
        log_prob += sum(self._word_log_probs[word] for word in words) - self.moments.log_z
        heads = tuple(parse.heads)
        return Sentence(tuple(words), heads, depths_from_heads(heads), log_prob)

    def is_grammatical(self, words: Sequence[str]) -> bool:
        """Whether the grammar derives `words` within its length bound."""
        return self.parse(words) is not None

    def log_probability(self, words: Sequence[str]) -> float:
        """Exact log-probability of the sentence in nats; -inf if it is not grammatical."""
        sentence = self.parse(words)
        return -math.inf if sentence is None else sentence.log_prob

    def sample(self, rng: np.random.Generator) -> Sentence:
        """Draw a sentence; ones longer than `max_words` are thrown away and drawn anew."""
        while (sentence := self._expand(_uniforms(rng))) is None:
            pass
        return sentence

    def _expand(self, uniforms: Iterator[float]) -> Sentence | None:
        """Expand the start symbol left to right; None as soon as the sentence must be too long.

        Each constituent belongs to the slot of its head word: a head child inherits its parent's
        slot, any other child opens a slot governed by it, and so every slot receives one word.
        """
        governors = [-1]
        position_of_slot = {-1: 0}
        words: list[str] = []
        slots: list[int] = []
        log_prob = -self.moments.log_z
        stack = [(self.start, 0)]
        while stack:
            symbol, slot = stack.pop()
            choices = self._choices[symbol]
            picked = bisect_right(choices.cumulative, next(uniforms))
            log_prob += choices.log_probs[picked]
            result = choices.results[picked]
            if isinstance(result, str):
                words.append(result)
                slots.append(slot)
                position_of_slot[slot] = len(words)
                continue
            children, head = result
            if len(words) + len(stack) + len(children) > self.max_words:
                return None
            for index in range(len(children) - 1, -1, -1):
                if index == head:
                    stack.append((children[index], slot))
                else:
                    stack.append((children[index], len(governors)))
                    governors.append(slot)
        heads = tuple(position_of_slot[governors[slot]] for slot in slots)
        return Sentence(tuple(words), heads, depths_from_heads(heads), log_prob)


def _uniforms(rng: np.random.Generator) -> Iterator[float]:
    """Endless uniform draws, taken from `rng` in blocks because single calls are slow."""
    while True:
        yield from rng.random(_DRAWS_AT_ONCE).tolist()
