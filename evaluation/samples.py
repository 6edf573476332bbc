"""What samples look like: diversity, repetition, likelihood under another model, grammar.

Generative perplexity alone rewards dull text, so it is never reported without entropy and
repetition beside it.
"""

import importlib.util
import math
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from data.errors import DataError
from evaluation.statistics import mean_and_standard_error, ratio_with_standard_error

# An n-gram length at which repetition within a text is rarely by chance (arXiv 1908.04319).
_REPEATED = 4
_MAUVE_MODEL = "gpt2-large"


def unigram_entropy(row: Sequence[int]) -> float:
    """Entropy in nats of the token frequencies of one sample."""
    counts = np.array(list(Counter(row).values()), dtype=np.float64)
    p = counts / counts.sum()
    return float(-(p * np.log(p)).sum())


def ngrams(row: Sequence[int], n: int) -> list[tuple[int, ...]]:
    """All runs of n consecutive tokens."""
    return list(zip(*(row[start:] for start in range(n)), strict=False))


def distinct_n(rows: Sequence[Sequence[int]], n: int) -> float:
    """Different n-grams over all n-grams of all samples (arXiv 1510.03055); nan without any."""
    found = [gram for row in rows for gram in ngrams(row, n)]
    return len(set(found)) / len(found) if found else math.nan


def self_repetition(row: Sequence[int], n: int = _REPEATED) -> float:
    """Share of the n-grams of one sample that it has had before; nan if it is shorter than n."""
    found = ngrams(row, n)
    return 1.0 - len(set(found)) / len(found) if found else math.nan


def sample_metrics(rows: Sequence[Sequence[int]], special: Collection[int]) -> dict[str, float]:
    """Length, entropy, distinct-n and repetition of samples given as token ids.

    Args:
        rows: tokens of each sample.
        special: ids that are not text; they are left out.

    Returns:
        num_samples; mean_length in tokens of text; entropy (nats, mean over samples) and
        entropy_se; distinct_1, distinct_2, distinct_3 over all samples; self_repetition (4-grams,
        mean over the samples that have any).

    Raises:
        DataError: there are no samples.
    """
    texts = [[token for token in row if token not in special] for row in rows]
    entropy = mean_and_standard_error([unigram_entropy(row) if row else 0.0 for row in texts])
    repetitions = [share for share in map(self_repetition, texts) if not math.isnan(share)]
    return {
        "num_samples": len(texts),
        "mean_length": sum(map(len, texts)) / len(texts),
        "entropy": entropy.value,
        "entropy_se": entropy.standard_error,
        **{f"distinct_{n}": distinct_n(texts, n) for n in (1, 2, 3)},
        "self_repetition": float(np.mean(repetitions)) if repetitions else math.nan,
    }


class Window(NamedTuple):
    """Tokens to feed to the scoring model, of which the last `scored` count."""

    text: int
    ids: list[int]
    scored: int


def windows(ids: Sequence[int], text: int, width: int, stride: int) -> Iterator[Window]:
    """Cut a text so that every token but the first is scored exactly once.

    Beyond the first window, each token sees at least `width - stride` tokens before it.
    """
    done = 1
    for start in range(0, max(len(ids) - 1, 0), stride):
        end = min(start + width, len(ids))
        if end > done:
            yield Window(text, list(ids[start:end]), end - done)
            done = end


def generative_perplexity(
    texts: Sequence[str],
    name_or_path: str,
    *,
    batch_size: int = 4,
    width: int = 1024,
    device: str | torch.device = "cpu",
) -> dict[str, float]:
    """Perplexity of samples under another causal language model, with that model's own tokens.

    exp(sum of -log p / number of tokens) over all texts. The first token of a text has nothing
    before it and is not scored; neither are end-of-text and padding tokens. Longer texts are scored
    in windows that overlap by half. Means over the texts' tokens carry the error of the texts.

    Args:
        texts: the samples.
        name_or_path: a causal model and its tokenizer, on disk or on the Hugging Face hub.
        batch_size: windows per pass.
        width: longest window, in tokens; the model's own limit if that is shorter.
        device: where to score.

    Returns:
        gen_ppl; gen_nll (nats per token) and gen_nll_se; gen_tokens.

    Raises:
        DataError: the model cannot be loaded, or no text has a token to score.
    """
    model, tokenizer = _load_scorer(name_or_path, device)
    # Models without a table of positions name no limit.
    width = min(width, getattr(model.config, "max_position_embeddings", None) or width)
    encoded = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    cut = (
        window
        for number, ids in enumerate(encoded)
        for window in windows(ids, number, width, max(1, width // 2))
    )
    ignored = {tokenizer.eos_token_id, tokenizer.pad_token_id} - {None}
    nll, tokens = np.zeros(len(texts)), np.zeros(len(texts))
    while batch := list(islice(cut, batch_size)):
        for window, losses in zip(batch, _score(model, batch, ignored), strict=True):
            nll[window.text] += float(losses.double().sum())
            tokens[window.text] += len(losses)
    if not tokens.sum() > 0:
        raise DataError(f"eval.generative_model={name_or_path}: no sample has a token to score")
    mean, error = ratio_with_standard_error(nll, tokens)
    return {
        "gen_ppl": math.exp(mean),
        "gen_nll": mean,
        "gen_nll_se": error,
        "gen_tokens": float(tokens.sum()),
    }


def _load_scorer(name_or_path: str, device: str | torch.device) -> tuple[PreTrainedModel, Any]:
    source = Path(name_or_path).expanduser().as_posix()
    try:
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    # Network, hub, missing files and wrong formats mean the same to a user.
    except Exception as error:
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"eval.generative_model={name_or_path}: not a causal model with its tokenizer, neither"
            f" a folder nor on the hub ({type(error).__name__}: {reason})"
        ) from error
    model.to(device)  # type: ignore[arg-type]  # transformers wraps it without its types
    return model.eval(), tokenizer


@torch.inference_mode()
def _score(model: PreTrainedModel, batch: Sequence[Window], ignored: set[int]) -> list[Tensor]:
    """-log p of the scored tokens of every window, without the ignored ones."""
    longest = max(len(window.ids) for window in batch)
    ids = torch.zeros(len(batch), longest, dtype=torch.long)
    present = torch.zeros_like(ids)
    for row, window in enumerate(batch):
        ids[row, : len(window.ids)] = torch.tensor(window.ids)
        present[row, : len(window.ids)] = 1
    logits = model(input_ids=ids.to(model.device), attention_mask=present.to(model.device)).logits
    losses = []
    for row, window in enumerate(batch):
        end = len(window.ids)
        targets = ids[row, end - window.scored : end]
        rows = logits[row, end - window.scored - 1 : end - 1].float()
        loss = F.cross_entropy(rows, targets.to(rows.device), reduction="none").cpu()
        losses.append(loss[[token not in ignored for token in targets.tolist()]])
    return losses


def mauve_is_installed() -> bool:
    """Whether the optional package mauve-text is there."""
    return importlib.util.find_spec("mauve") is not None


def mauve_score(
    texts: Sequence[str], references: Sequence[str], model: str = _MAUVE_MODEL
) -> float:
    """MAUVE between samples and human texts, in (0, 1] (arXiv 2102.01454).

    It depends on the number of texts and on the model that embeds them: compare equal ones only.
    """
    import mauve

    result = mauve.compute_mauve(
        p_text=list(references), q_text=list(texts), featurize_model_name=model, verbose=False
    )
    return float(result.mauve)
