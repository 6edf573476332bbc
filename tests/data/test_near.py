"""Prompts seen before: shingles and similarity by hand, the index against brute force."""

import builtins
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.near import EXACT, NEAR, Match, NearRule, PromptIndex
from data.shingles import jaccard, runs, shingles, words_and_signs, words_of

pytest.importorskip("datasketch", reason="needs the package datasketch")

WORDS = [f"w{number}" for number in range(60)]


def test_words_by_hand():
    assert words_of("Let $x^2+3$ be_it: don't!") == ["let", "x", "2", "3", "be", "it", "don", "t"]
    signs = ["x", "^", "2", "+", "3", "be", "_", "it", ",", "é"]
    assert words_and_signs("x^2 + 3 be_it, É") == signs
    assert words_and_signs("3+4") != words_and_signs("3-4")


def test_scripts_without_spaces_are_split_into_characters():
    assert words_of("数学 の問題 abc") == ["数", "学", "の", "問", "題", "abc"]


def test_runs_and_shingles_by_hand():
    assert list(runs(["a", "b", "c"], 2)) == ["a b", "b c"]
    assert list(runs(["a"], 2)) == []
    assert shingles("a b c a b", 2) == {"a b", "b c", "c a"}
    assert shingles("a b", 5) == {"a b"}
    assert shingles(" ", 5) == frozenset()


def test_jaccard_by_hand():
    assert jaccard(frozenset("abc"), frozenset("bcd")) == 0.5
    assert jaccard(frozenset(), frozenset()) == 0.0


def test_bands_are_the_longest_that_keep_the_recall():
    rule = NearRule(threshold=0.8, permutations=128, recall=0.99)
    bands, size = rule.bands()
    assert bands * size <= 128
    assert 1 - (1 - 0.8**size) ** bands >= 0.99
    assert 1 - (1 - 0.8 ** (size + 1)) ** (128 // (size + 1)) < 0.99
    # Reference: permutations that are too few for it.
    with pytest.raises(DataError, match=r"permutations=2: .* recall=0\.999; allowed: more"):
        NearRule(threshold=0.5, permutations=2, recall=0.999).bands()


@pytest.mark.parametrize(
    "options", [{"threshold": 0.0}, {"threshold": 1.1}, {"recall": 1.0}, {"shingle": 0}]
)
def test_impossible_rules(options):
    with pytest.raises(DataError, match=rf"{next(iter(options))}=.*allowed"):
        NearRule(**options)


def add(index, key, name):
    index.add(index.sketch(key), name)


def find(index, key):
    return index.find(index.sketch(key))


def test_exact_first_then_the_most_similar():
    index = PromptIndex(NearRule(threshold=0.5, shingle=1))
    add(index, "a b c d e f g h", "first")
    add(index, "a b c d e f g x", "second")
    add(index, "a b c d e f g h", "again")
    assert len(index) == 2
    assert find(index, "a b c d e f g h") == Match(EXACT, "first", 1.0)
    assert find(index, "a b c d e f g h x") == Match(NEAR, "first", pytest.approx(8 / 9))
    assert find(index, "a b c d e f y x") == Match(NEAR, "second", pytest.approx(7 / 9))
    assert find(index, "p q r") is None


def test_without_a_rule_only_the_same_counts():
    index = PromptIndex(None)
    add(index, "a b c", "first")
    assert find(index, "a b c").reason == EXACT and find(index, "a b d") is None


def test_empty_prompts_equal_one_another_alone():
    index = PromptIndex(NearRule())
    add(index, "", "none")
    assert find(index, "") == Match(EXACT, "none", 1.0) and find(index, "a") is None


def variants(seed):
    """Texts, and copies of them with some words exchanged: pairs of every similarity."""
    draw = random.Random(seed)
    texts = [draw.choices(WORDS, k=draw.randint(8, 40)) for _ in range(40)]
    changed = []
    for text in texts:
        copy = list(text)
        for _ in range(draw.randint(0, 3)):
            copy[draw.randrange(len(copy))] = draw.choice(WORDS)
        changed.append(copy)
    return [" ".join(text) for text in texts], [" ".join(text) for text in changed]


def test_against_brute_force():
    """All pairs at or above the threshold are found, and nothing below it."""
    rule = NearRule(threshold=0.6, shingle=3, recall=0.9999)
    found = missed = 0
    for seed in range(5):
        texts, changed = variants(seed)
        index = PromptIndex(rule)
        for number, text in enumerate(texts):
            add(index, text, str(number))
        for text in changed:
            best = max(jaccard(shingles(text, 3), shingles(other, 3)) for other in texts)
            match = find(index, text)
            assert (match is None) == (best < 0.6)
            found += match is not None
            missed += match is None
            if match is not None:
                assert match.similarity == pytest.approx(best)
    assert found > 50 and missed > 30


@given(st.lists(st.text("abc ", max_size=12), max_size=8), st.text("abc ", max_size=12))
def test_whatever_is_found_is_as_similar_as_it_says(keys, key):
    rule = NearRule(threshold=0.5, permutations=32, shingle=1, recall=0.9)
    index = PromptIndex(rule)
    for number, text in enumerate(keys):
        add(index, text, str(number))
    match = find(index, key)
    if key in keys:
        assert match == Match(EXACT, str(keys.index(key)), 1.0)
    elif match is not None:
        other = keys[int(match.name)]
        assert match.similarity == jaccard(shingles(key, 1), shingles(other, 1)) >= 0.5


def test_without_the_library(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest, **options):
        if name == "datasketch":
            raise ImportError(name)
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", refuse)
    PromptIndex(None)
    with pytest.raises(DataError, match=r"mode\.near: needs the library `datasketch`; allowed"):
        PromptIndex(NearRule())
