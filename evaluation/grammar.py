"""How many samples are sentences of a language whose grammar is known."""

from collections.abc import Collection, Sequence

from data.errors import DataError
from data.grammar_model import ProbabilisticGrammar
from evaluation.statistics import mean_and_standard_error, wilson_interval


def grammatical_rate(
    texts: Sequence[str],
    grammar: ProbabilisticGrammar,
    training_texts: Collection[str] | None = None,
) -> dict[str, float]:
    """Share of sampled texts that the grammar derives, and how probable and how novel those are.

    Args:
        texts: one sample each, words separated by spaces, without special tokens.
        grammar: the language the samples should come from.
        training_texts: sentences a model was trained on; a grammatical sample is novel if it is
            none of them.

    Returns:
        `num_samples`, `num_grammatical` and `num_distinct` (different grammatical texts);
        `grammatical_rate` with its 95 % Wilson interval `grammatical_rate_low` and `_high`.
        Where any sample is grammatical, also `grammatical_log_prob`, the mean true log-probability
        of those in nats per sentence, and `grammatical_log_prob_se`. For samples from the language
        itself its expectation is `expected_log_prob` = -H; a greater value says that a model
        prefers common and short sentences.
        With `training_texts`, also `num_novel` and `novel_rate` with `novel_rate_low` and `_high`,
        among the grammatical samples.

    Raises:
        DataError: there are no samples.
    """
    if not texts:
        raise DataError("the grammatical rate needs at least 1 sample, got 0")
    parsed = [grammar.parse(text.split()) for text in texts]
    sentences = [sentence for sentence in parsed if sentence is not None]
    found = [" ".join(sentence.words) for sentence in sentences]
    metrics = {
        "num_samples": len(texts),
        "num_grammatical": len(found),
        "num_distinct": len(set(found)),
        **_rate("grammatical", len(found), len(texts)),
        "expected_log_prob": -grammar.moments.entropy,
    }
    if not found:
        return metrics
    log_prob = mean_and_standard_error([sentence.log_prob for sentence in sentences])
    metrics["grammatical_log_prob"], metrics["grammatical_log_prob_se"] = log_prob
    if training_texts is not None:
        known = {" ".join(text.split()) for text in training_texts}
        num_novel = sum(text not in known for text in found)
        metrics |= {"num_novel": num_novel, **_rate("novel", num_novel, len(found))}
    return metrics


def _rate(name: str, successes: int, trials: int) -> dict[str, float]:
    low, high = wilson_interval(successes, trials)
    return {f"{name}_rate": successes / trials, f"{name}_rate_low": low, f"{name}_rate_high": high}
