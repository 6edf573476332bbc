"""The grammar language: exact probabilities, absence of ambiguity, gold trees, determinism."""

import doctest
import hashlib
import itertools
import math
from collections import Counter, defaultdict
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

import data.grammar
from data.depth import depths_from_heads
from data.errors import DataError
from data.grammar import Grammar, inflect
from data.grammar_model import ProbabilisticGrammar


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(num_train=300, num_valid=50, num_test=50)


@pytest.fixture(scope="module")
def sentences(grammar):
    rng = np.random.Generator(np.random.Philox(key=7))
    return [grammar.sample(rng) for _ in range(4000)]


def count_derivations(grammar: ProbabilisticGrammar, words: tuple[str, ...]) -> tuple[int, float]:
    """Number of derivations of a string and their total probability, by a chart of all spans."""
    by_left = defaultdict(list)
    for rule in grammar.rules:
        by_left[rule.left].append(rule)

    @cache
    def inside(symbol: str, i: int, j: int) -> tuple[int, float]:
        if symbol not in by_left:
            prob = grammar.lexicon.get(symbol, {symbol: 1.0}).get(words[i], 0.0)
            return (1, prob) if j == i + 1 and prob else (0, 0.0)
        count, total = 0, 0.0
        for rule in by_left[symbol]:
            number, prob = sequence(rule.right, i, j)
            count, total = count + number, total + prob * math.exp(rule.log_prob)
        return count, total

    @cache
    def sequence(symbols: tuple[str, ...], i: int, j: int) -> tuple[int, float]:
        if len(symbols) == 1:
            return inside(symbols[0], i, j)
        count, total = 0, 0.0
        for k in range(i + 1, j - len(symbols) + 2):
            number, prob = inside(symbols[0], i, k)
            if number:
                more, rest = sequence(symbols[1:], k, j)
                count, total = count + number * more, total + prob * rest
        return count, total

    return inside(grammar.start, 0, len(words))


def test_module_examples():
    assert doctest.testmod(data.grammar).attempted >= 4
    assert doctest.testmod(data.grammar).failed == 0


def test_entropy_and_length_agree_with_samples(grammar, sentences):
    surprisals = np.array([-sentence.log_prob for sentence in sentences])
    lengths = np.array([len(sentence.words) for sentence in sentences])
    for values, exact in [
        (surprisals, grammar.moments.entropy),
        (lengths, grammar.moments.expected_words),
    ]:
        assert abs(values.mean() - exact) < 3 * values.std() / math.sqrt(len(values))
    assert lengths.max() <= grammar.max_words


def test_longer_bound_has_less_rejected_mass():
    masses = [Grammar(max_words=n).moments.log_z for n in (10, 20, 40, 80)]
    assert masses == sorted(masses) and masses[-1] > -1e-3
    # The unbounded grammar is a proper distribution: nothing is lost to endless sentences.
    assert Grammar(max_words=300).moments.log_z == pytest.approx(0.0, abs=1e-9)


def test_chart_parser_finds_one_derivation_with_the_same_probability(grammar, sentences):
    for sentence in sentences[:150]:
        count, prob = count_derivations(grammar, sentence.words)
        assert count == 1
        log_prob = math.log(prob) - grammar.moments.log_z
        assert sentence.log_prob == pytest.approx(log_prob, abs=1e-9)


def test_both_parsers_agree_on_corrupted_sentences(grammar, sentences):
    rng = np.random.Generator(np.random.Philox(key=5))
    vocabulary = grammar.vocabulary()
    verdicts = Counter()
    for sentence in sentences[:250]:
        words = list(sentence.words)
        place = rng.integers(len(words))
        if rng.random() < 0.5:
            words[place] = vocabulary[rng.integers(len(vocabulary))]
        else:
            del words[place]
        count, _ = count_derivations(grammar, tuple(words)) if words else (0, 0.0)
        assert count == grammar.is_grammatical(words)
        verdicts[count] += 1
    assert min(verdicts[0], verdicts[1]) >= 10


def test_parse_recovers_sampled_trees(grammar, sentences):
    for sentence in sentences:
        parsed = grammar.parse(sentence.words)
        assert (parsed.words, parsed.heads, parsed.depths) == (
            sentence.words,
            sentence.heads,
            sentence.depths,
        )
        assert parsed.log_prob == pytest.approx(sentence.log_prob, abs=1e-9)


def test_trees_are_projective_with_one_root(sentences):
    for sentence in sentences[:500]:
        assert sentence.heads.count(0) == 1
        assert sentence.depths == depths_from_heads(sentence.heads)
        arcs = [sorted(arc) for arc in enumerate(sentence.heads, start=1) if arc[1]]
        crossing = [a for a in arcs for b in arcs if a[0] < b[0] < a[1] < b[1]]
        assert not crossing


@pytest.mark.parametrize(
    ("good", "bad"),
    [
        ("the dog sleeps", "the dog sleep"),
        ("the dogs near the garden sleep", "the dogs near the garden sleeps"),
        ("the man who sees the cats sleeps", "the man who sees the cats sleep"),
        ("the men who see the cat sleep", "the men who sees the cat sleep"),
        ("the dog and the cat sleep", "the dog and the cat sleeps"),
        ("the cat that the dog that John sees hunts sleeps", "the cat that the dog hunts sleep"),
        ("these books surprise Mary", "these book surprise Mary"),
        ("a child does not sleep", "a child does not sleeps"),
        ("John thinks that the cats sleep", "John thinks that the cats sleeps"),
        ("the dog sleeps , and the cat sleeps", "the dog sleeps and the cat sleeps"),
    ],
)
def test_agreement(grammar, good, bad):
    assert grammar.is_grammatical(good.split())
    assert grammar.log_probability(bad.split()) == -math.inf


def test_dependencies_by_hand(grammar):
    sentence = grammar.parse(["the", "dog", "that", "Mary", "sees", "sleeps", "in", "a", "garden"])
    #                  the dog that Mary sees sleeps in a garden
    assert sentence.heads == (2, 6, 5, 5, 2, 0, 9, 9, 6)
    assert sentence.depths == (2, 1, 3, 3, 2, 0, 2, 2, 1)


def test_not_sentences(grammar):
    assert not grammar.is_grammatical([])
    assert not grammar.is_grammatical(["the", "unicorn", "sleeps"])
    assert not grammar.is_grammatical(["the", "dog"])
    long_sentence = "the " + "big " * 26 + "dog sleeps"
    assert grammar.is_grammatical((long_sentence + " well").split())
    assert not grammar.is_grammatical(("today " + long_sentence + " well").split())


def test_documents_are_determined_by_seed_and_split(grammar):
    again = Grammar(num_train=300, num_valid=50, num_test=50)
    rows = {split: list(grammar.documents(split)) for split in grammar.splits}
    assert [len(rows[split]) for split in ("train", "validation", "test")] == [300, 50, 50]
    assert rows == {split: list(again.documents(split)) for split in again.splits}
    other_seed = Grammar(seed=2, num_train=300)
    beginnings = [rows["train"], rows["validation"], rows["test"], other_seed.documents("train")]
    beginnings.append(grammar.stream(1))
    texts = {tuple(row["text"] for row in itertools.islice(b, 20)) for b in beginnings}
    assert len(texts) == 5
    assert list(Grammar(num_train=10).documents("train")) == rows["train"][:10]


def test_documents_of_a_seed_do_not_change(grammar):
    text = "\n".join(document["text"] for document in grammar.documents("train"))
    digest = hashlib.sha256(text.encode()).hexdigest()
    assert digest.startswith("b4e31339b99c3602"), "a change of the language must raise VERSION"


def test_config_builds_the_source():
    config = OmegaConf.load(Path(__file__).parents[2] / "configs" / "data" / "grammar.yaml")
    source = instantiate(config.source)
    assert source.fingerprint() == Grammar().fingerprint()
    assert source.name == config.name and config.score_padding and not config.wrap


def test_document_features_match_its_words(grammar):
    document = next(grammar.documents("test"))
    assert set(document) == {"text", "features", "heads", "log_prob"}
    sentence = grammar.parse(document["text"].split())
    assert document["heads"] == list(sentence.heads)
    assert document["features"] == {
        "depth": list(sentence.depths),
        "height": [max(sentence.depths)] * len(sentence.words),
    }
    assert document["log_prob"] == pytest.approx(sentence.log_prob)


def test_stream_has_no_end_and_repeats_by_seed(grammar):
    first, second = (list(itertools.islice(grammar.stream(5), 500)) for _ in range(2))
    assert first == second and len(first) == 500


def test_fingerprint_covers_the_parameters(grammar):
    same = Grammar(num_train=300, num_valid=50, num_test=50)
    others = [Grammar(), Grammar(seed=2), Grammar(max_words=20), Grammar(num_test=1)]
    assert same.fingerprint() == grammar.fingerprint()
    assert len({g.fingerprint() for g in [grammar, *others]}) == 5


def test_vocabulary(grammar, sentences):
    vocabulary = grammar.vocabulary()
    assert vocabulary == sorted(set(vocabulary))
    assert {word for sentence in sentences for word in sentence.words} == set(vocabulary)
    after_a = {
        second
        for sentence in sentences
        for first, second in itertools.pairwise(sentence.words)
        if first == "a"
    }
    assert after_a and not any(word[0] in "aeiou" for word in after_a)


def test_the_yardstick_is_of_the_promised_size(grammar):
    assert 9 <= grammar.moments.expected_words <= 12
    assert 2 <= grammar.entropy_per_token() <= 3


@pytest.mark.parametrize(
    ("lemma", "inflected"),
    [("dog", "dogs"), ("fox", "foxes"), ("city", "cities"), ("play", "plays"), ("hush", "hushes")],
)
def test_inflect(lemma, inflected):
    assert inflect(lemma) == inflected


def test_bad_parameters_are_refused(grammar):
    with pytest.raises(DataError, match="seed is -1"):
        Grammar(seed=-1)
    with pytest.raises(DataError, match="max_words is 0"):
        Grammar(max_words=0)
    with pytest.raises(DataError, match="max_words is 1"):
        Grammar(max_words=1)
    with pytest.raises(DataError, match="no split 'valid'"):
        grammar.documents("valid")
