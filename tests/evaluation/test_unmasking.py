"""Order of unmasking against depth: planted orders, hand computations, what is left out."""

import math

import numpy as np
import pytest

from data.grammar import Grammar
from evaluation.unmasking import (
    OTHER_TOKENS,
    UNPARSED,
    USED,
    block_ranks,
    by_words,
    kendall_tau_b,
    ordered_samples,
    rank_lines,
    tau_metrics,
)
from tests.small import small_model, word_tokenizer

PAD, BOS, EOS, MASK = range(4)
LENGTH = 32


def test_ranks_by_hand():
    """A block of [given, 5, 3, 3] and one of [-1, 7, 9, 8]; single places have no rank."""
    ranks = block_ranks(np.array([-1, 5, 3, 3, -1, 7, 9, 8]), 4)
    np.testing.assert_allclose(ranks, [np.nan, 1.0, 0.25, 0.25, np.nan, 0.0, 1.0, 0.5])
    assert np.isnan(block_ranks(np.array([-1, 4, -1, -1]), 2)).all()


def test_tau_by_hand():
    one = np.zeros(4, dtype=int)
    assert kendall_tau_b(np.arange(4), np.arange(4), one) == 1.0
    assert kendall_tau_b(np.arange(4), -np.arange(4), one) == -1.0
    # Pairs of depth 0 1 1 2 and step 0 2 1 1: 4 concordant, 0 discordant, a tie in each.
    tau = kendall_tau_b(np.array([0, 1, 1, 2]), np.array([0, 2, 1, 1]), one)
    assert tau == pytest.approx((3 - 1) / math.sqrt(5 * 5))
    assert math.isnan(kendall_tau_b(np.ones(4), np.arange(4), one)), "one depth has no order"


def test_tau_of_one_block_equals_scipy():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    for _ in range(20):
        depth, step = rng.integers(0, 4, 15), rng.integers(0, 9, 15)
        expected = stats.kendalltau(depth, step).statistic
        assert kendall_tau_b(depth, step, np.zeros(15)) == pytest.approx(expected)


def test_pairs_of_different_blocks_do_not_count():
    """Depths that fall from block to block, within which they rise with the step."""
    depth, step, block = np.array([2, 3, 0, 1]), np.arange(4), np.array([0, 0, 1, 1])
    assert kendall_tau_b(depth, step, block) == 1.0
    assert kendall_tau_b(depth, step, np.zeros(4)) < 1.0


@pytest.fixture(scope="module")
def grammar():
    return Grammar(num_train=10, num_valid=300, num_test=10)


@pytest.fixture(scope="module")
def tokenizer(grammar):
    return word_tokenizer(grammar.vocabulary())


def parser(grammar):
    def depths(words):
        sentence = grammar.parse(words)
        return None if sentence is None else sentence.depths

    return by_words(depths)


def rows_of(texts, tokenizer):
    rows = []
    for text in texts:
        ids = [BOS, *tokenizer.encode(text, add_special_tokens=False), EOS]
        rows.append(ids + [PAD] * (LENGTH - len(ids)))
    return rows


def order(texts, steps, grammar, tokenizer, block_size=LENGTH):
    rows, special = rows_of(texts, tokenizer), small_model().special
    return ordered_samples(rows, steps, block_size, tokenizer, special, parser(grammar))


def planted(documents, key):
    """Steps of every row: words in the order of `key(depth)`, the given first token -1."""
    steps = []
    for document in documents:
        depths = document["features"]["depth"]
        step = np.arange(LENGTH) + 100
        step[0] = -1
        step[1 : len(depths) + 1] = [key(depth) for depth in depths]
        steps.append(step)
    return steps


@pytest.mark.parametrize(("key", "sign"), [(lambda d: d, 1), (lambda d: 50 - d, -1)])
def test_a_planted_order_by_depth_has_its_sign(grammar, tokenizer, key, sign):
    documents = list(grammar.documents("validation"))
    texts = [document["text"] for document in documents]
    samples = order(texts, planted(documents, key), grammar, tokenizer)
    metrics = tau_metrics(samples)
    assert metrics["samples_used"] == metrics["tau_samples"] == 300
    assert metrics["tau"] == metrics["tau_low"] == metrics["tau_high"] == sign
    ranks = [line["rank"] for line in rank_lines(samples)]
    assert sign * (ranks[1] - ranks[0]) > 0 and sign * (ranks[2] - ranks[1]) > 0


def test_a_random_order_has_no_correlation_and_ranks_of_one_half(grammar, tokenizer):
    texts = [document["text"] for document in grammar.documents("validation")]
    rng = np.random.default_rng(0)
    steps = [np.append(-1, rng.permutation(LENGTH - 1)) for _ in texts]
    samples = order(texts, steps, grammar, tokenizer)
    metrics = tau_metrics(samples)
    spread = np.std([sample.tau for sample in samples]) / math.sqrt(len(samples))
    assert abs(metrics["tau"]) < 4 * spread < 0.1
    assert metrics["tau_low"] < metrics["tau"] < metrics["tau_high"]
    for line in rank_lines(samples)[:4]:
        error = (line["rank_high"] - line["rank_low"]) / (2 * 1.96)
        assert line["rank"] == pytest.approx(0.5, abs=4 * error)


def test_depths_stand_where_the_words_were_sampled(grammar, tokenizer):
    steps = [np.append(-1, np.arange(LENGTH - 1))]
    [sample] = order(["the teacher thinks that the cats sleep"], steps, grammar, tokenizer)
    assert sample.depth.tolist() == [2, 1, 0, 2, 3, 2, 1]
    assert sample.step.tolist() == list(range(7)) and sample.block.tolist() == [0] * 7
    line = sample.line()
    assert line["status"] == USED and line["rank"][1] == pytest.approx(1 / 30, abs=1e-6)


def test_what_is_left_out_is_counted(grammar, tokenizer):
    """No sentence; a sentence with padding inside, whose text has other tokens; a lone word."""
    texts = ["the dogs sleeps", "the dogs sleep", "the dogs sleep"]
    rows = rows_of(texts, tokenizer)
    rows[1].insert(2, PAD)
    steps = [np.append(-1, np.arange(LENGTH - 1))] * 3
    special = small_model().special
    samples = ordered_samples(rows, steps, 2, tokenizer, special, parser(grammar))
    assert [sample.status for sample in samples] == [UNPARSED, OTHER_TOKENS, USED]
    metrics = tau_metrics(samples)
    assert (metrics["samples"], metrics["samples_used"]) == (3, 1)
    assert metrics["samples_not_parsed"] == metrics["samples_other_tokens"] == 1
    # Blocks [BOS the] [dogs sleep]: the first word is alone, the others are one pair.
    assert samples[2].has_order.tolist() == [False, True, True]
    assert metrics["tau"] == -1.0 and math.isnan(metrics["tau_low"])
    assert samples[0].line()["tau"] is None
    assert "tau" not in tau_metrics(samples[:2]) and tau_metrics([])["samples"] == 0
