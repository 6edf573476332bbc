"""The grammatical rate: counts, interval, log-probability, novelty."""

import pytest

from data.errors import DataError
from data.grammar import Grammar
from evaluation.grammar import grammatical_rate
from evaluation.statistics import wilson_interval


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar(num_train=400, num_valid=400)


def test_counts_by_hand(grammar):
    good, better, bad = "the dogs sleep", "this man sleeps", "the dogs sleeps"
    metrics = grammatical_rate([good, good, better, bad, ""], grammar, training_texts={better, bad})
    assert (metrics["num_samples"], metrics["num_grammatical"]) == (5, 3)
    assert (metrics["num_distinct"], metrics["num_novel"]) == (2, 2)
    assert metrics["grammatical_rate"] == pytest.approx(3 / 5)
    interval = metrics["grammatical_rate_low"], metrics["grammatical_rate_high"]
    assert interval == wilson_interval(3, 5)
    assert metrics["novel_rate"] == pytest.approx(2 / 3)
    assert (metrics["novel_rate_low"], metrics["novel_rate_high"]) == wilson_interval(2, 3)
    log_probs = [grammar.log_probability(text.split()) for text in (good, good, better)]
    assert metrics["grammatical_log_prob"] == pytest.approx(sum(log_probs) / 3)


def test_the_language_itself_scores_full_marks(grammar):
    texts = [document["text"] for document in grammar.documents("validation")]
    training_texts = [document["text"] for document in grammar.documents("train")]
    metrics = grammatical_rate(texts, grammar, training_texts)
    assert metrics["grammatical_rate"] == 1.0
    gap = metrics["grammatical_log_prob"] - metrics["expected_log_prob"]
    assert abs(gap) < 3 * metrics["grammatical_log_prob_se"]
    assert metrics["novel_rate"] > 0.9
    assert grammatical_rate(training_texts, grammar, training_texts)["novel_rate"] == 0.0


def test_word_order_decides(grammar):
    reversed_texts = [
        " ".join(reversed(document["text"].split())) for document in grammar.documents("validation")
    ]
    metrics = grammatical_rate(reversed_texts, grammar)
    assert metrics["grammatical_rate"] == 0.0
    assert "grammatical_log_prob" not in metrics and "novel_rate" not in metrics


def test_no_samples_are_refused(grammar):
    with pytest.raises(DataError, match="at least 1 sample, got 0"):
        grammatical_rate([], grammar)
