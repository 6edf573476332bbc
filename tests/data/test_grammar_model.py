"""Probabilistic grammars in miniature: everything against full enumeration, and refused tables."""

import itertools
import math
from collections import Counter
from functools import cache

import numpy as np
import pytest

from data.errors import DataError
from data.grammar_entropy import sentence_moments
from data.grammar_model import ProbabilisticGrammar
from data.grammar_rules import read_rules, zipf

MINIATURE_TABLE = """
Root        -> Subject[n] *Verb[n]          3
Root        -> Subject[n] *Say[n] that Root 1
Subject[n]  -> the *Noun[n]                 4
Subject[pl] -> the *Noun[n] and Subject[n]  1
Verb[n]     -> *Sleep[n]                    5
Verb[n]     -> *Sleep[n] well               1
"""
MINIATURE_LEXICON = {
    "Noun[sg]": zipf(["dog", "cat"]),
    "Noun[pl]": zipf(["dogs", "cats"]),
    "Sleep[sg]": zipf(["sleeps", "runs"]),
    "Sleep[pl]": zipf(["sleep", "run"]),
    "Say[sg]": zipf(["says"]),
    "Say[pl]": zipf(["say"]),
}


def miniature(max_words: int, table: str = MINIATURE_TABLE, lexicon=None) -> ProbabilisticGrammar:
    rules = read_rules(table, {"n": ("sg", "pl")})
    return ProbabilisticGrammar(rules, lexicon or MINIATURE_LEXICON, max_words)


def enumerate_strings(grammar: ProbabilisticGrammar, limit: int) -> list[tuple[tuple, float]]:
    """All derivations of at most `limit` words with their unconditional probability."""

    @cache
    def derive(symbol: str, room: int) -> list[tuple[tuple, float]]:
        if room < 1:
            return []
        rules = [rule for rule in grammar.rules if rule.left == symbol]
        if not rules:
            words = grammar.lexicon.get(symbol, {symbol: 1.0})
            return [((word,), prob) for word, prob in words.items()]
        return [
            (words, math.exp(rule.log_prob) * prob)
            for rule in rules
            for words, prob in derive_all(rule.right, room)
        ]

    def derive_all(symbols: tuple, room: int) -> list[tuple[tuple, float]]:
        if not symbols:
            return [((), 1.0)]
        return [
            (left + right, p * q)
            for left, p in derive(symbols[0], room - len(symbols) + 1)
            for right, q in derive_all(symbols[1:], room - len(left))
        ]

    return derive(grammar.start, limit)


def test_miniature_grammar_equals_brute_force():
    grammar = miniature(max_words=12)
    strings = enumerate_strings(grammar, 12)
    assert len({words for words, _ in strings}) == len(strings) > 700
    z = sum(prob for _, prob in strings)
    entropy = -sum(prob / z * math.log(prob / z) for _, prob in strings)
    expected_words = sum(prob / z * len(words) for words, prob in strings)
    assert grammar.moments == pytest.approx((math.log(z), entropy, expected_words), abs=1e-12)
    assert grammar.entropy_per_token() == pytest.approx(entropy / (expected_words + 1), abs=1e-12)
    for words, prob in strings:
        assert grammar.log_probability(words) == pytest.approx(math.log(prob / z), abs=1e-12)


def test_miniature_grammar_derives_nothing_else():
    grammar = miniature(max_words=5)
    language = {words for words, _ in enumerate_strings(grammar, 5)}
    candidates = itertools.chain.from_iterable(
        itertools.product(["the", "dog", "dogs", "and", "sleeps", "sleep", "well"], repeat=n)
        for n in range(1, 6)
    )
    for words in candidates:
        assert grammar.is_grammatical(words) == (words in language)


def test_miniature_samples_follow_their_probabilities():
    grammar = miniature(max_words=4)
    rng = np.random.Generator(np.random.Philox(key=3))
    counts = Counter(grammar.sample(rng).words for _ in range(5000))
    expected = {
        words: 5000 * math.exp(grammar.log_probability(words))
        for words, _ in enumerate_strings(grammar, 4)
    }
    assert set(counts) <= set(expected)
    chi_square = sum((counts[words] - e) ** 2 / e for words, e in expected.items())
    degrees = len(expected) - 1
    assert chi_square < degrees + 4 * math.sqrt(2 * degrees)


def test_ambiguous_rules_are_refused():
    table = """
    Noun -> *Noun of Noun 1
    Noun -> *Thing 1
    """
    with pytest.raises(DataError, match="cannot decide between 'Noun -> \\*Noun of Noun'"):
        miniature(9, table, {"Thing": zipf(["book"])})


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ("Root -> *the dog", "is not 'Left -> Child"),
        ("Root -> the dog 1", "marks 0 heads"),
        ("Root -> *Noun 1", "symbol 'Noun' has neither rules nor words"),
        ("Root -> *Thing 1\nRoot -> *book 1", "'book' is in 'Thing' and 'book'"),
        ("Root -> Thing *Root 1", "no sentence is that short"),
        ("Root -> *dog 1", "no rule uses the word class 'Thing'"),
    ],
)
def test_bad_tables_are_refused(table, message):
    with pytest.raises(DataError, match=message):
        miniature(9, table, {"Thing": zipf(["book"])})


def test_cyclic_rules_have_no_entropy():
    rules = read_rules("Root -> *Thing 1\nRoot -> *Other 1\nOther -> *Root 1", {})
    with pytest.raises(DataError, match=r"one-child rules form a cycle: (Root|Other) ->"):
        sentence_moments(rules, {"Thing": [0.0]}, "Root", max_words=5)


def test_variables_share_the_weight_of_their_line():
    table = """
    Root   -> Subject[n] *sleep 3
    Root   -> *wait             1
    Subject[n] -> *dog          1
    """
    probs = {str(rule): math.exp(rule.log_prob) for rule in read_rules(table, {"n": ("sg", "pl")})}
    assert probs == pytest.approx(
        {
            "Root -> Subject[sg] *sleep": 3 / 8,
            "Root -> Subject[pl] *sleep": 3 / 8,
            "Root -> *wait": 1 / 4,
            "Subject[sg] -> *dog": 1.0,
            "Subject[pl] -> *dog": 1.0,
        }
    )


def test_zipf():
    assert zipf(["a", "b", "c"]) == pytest.approx({"a": 6 / 11, "b": 3 / 11, "c": 2 / 11})
