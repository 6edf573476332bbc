"""mode=sample_eval: generate from a checkpoint, keep the samples, and measure them."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from data.grammar_model import ProbabilisticGrammar
from dataloader import LanguageData
from decoding.denoise import Generation
from decoding.settings import SamplingConfig
from diffusion import Diffusion
from evaluation.grammar import grammatical_rate
from evaluation.samples import (
    generative_perplexity,
    mauve_is_installed,
    mauve_score,
    sample_metrics,
)
from evaluation.tables import metrics_table
from opening import open_checkpoint
from runtime.checkpoint import provenance
from runtime.config import instantiate, locate
from runtime.devices import count_devices
from runtime.errors import ConfigError
from runtime.run import write_config, write_provenance

SHOWN = 3


def run(cfg: DictConfig) -> dict[str, float]:
    """Generate `sampling.num_sample_batches` batches from `eval.checkpoint_path`.

    Every sample becomes a row of samples.jsonl. A sample depends on the seed and its number, not
    on the batch size.

    Returns:
        nfe, nfe_per_sample, tokens_per_s, tokens_per_forward, the share of samples per stop reason,
        and those of `evaluation.samples`; gen_ppl with `eval.generative_model`; mauve with
        `eval.mauve`; the grammatical rate with `data=grammar`.

    Raises:
        ConfigError: an option that does not fit the checkpoint, or mauve without its package.
    """
    if cfg.eval.mauve and not mauve_is_installed():
        raise ConfigError("eval.mauve=true: needs the package mauve-text (pip install mauve-text)")
    model, cfg = open_checkpoint(cfg)
    if not isinstance(model, Diffusion):
        raise ConfigError(f"algo={cfg.algo.name}: mode=sample_eval cannot sample from it")
    model.to(sampling_device(cfg))
    generations = generate_batches(model, cfg)
    rows = [row for generation in generations for row in generation.rows()]
    texts = model.tokenizer.batch_decode(rows, skip_special_tokens=True)

    run_dir = Path(cfg.paths.run_dir)
    write_config(run_dir, cfg)
    write_samples(run_dir / "samples.jsonl", cfg.seed, generations, texts)
    write_provenance(run_dir, provenance(cfg))
    for text in texts[:SHOWN]:
        print(f"> {text}\n")

    metrics = cost_metrics(generations)
    special = {model.special.bos, model.special.eos, model.special.pad, model.special.mask}
    metrics |= sample_metrics(rows, special) | language_metrics(cfg, model, rows, texts)
    print(metrics_table(f"{cfg.algo.name} samples", metrics))
    return metrics


def sampling_device(cfg: DictConfig) -> torch.device:
    """One device of the kind that the trainer would use."""
    if cfg.trainer.accelerator == "cpu" or count_devices(cfg.trainer) == 0:
        return torch.device("cpu")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def sampling_config(cfg: DictConfig) -> SamplingConfig:
    """`sampling.*` with its strategy built."""
    node = cfg.sampling.strategy
    strategy = None if node is None else instantiate(node)
    return SamplingConfig.from_options(cfg.sampling, strategy, cfg.algo.T)


def generate_batches(model: Diffusion, cfg: DictConfig) -> list[Generation]:
    """All batches, with a progress bar over the tokens."""
    config = sampling_config(cfg)
    size = cfg.sampling.batch_size or cfg.loader.eval_global_batch_size
    prompt = cfg.sampling.prompt
    prompt_ids = prompt and model.tokenizer.encode(prompt, add_special_tokens=False)
    batches = range(cfg.sampling.num_sample_batches)
    if not batches:
        raise ConfigError("sampling.num_sample_batches=0: there is nothing to generate")
    generations = []
    with Progress(len(batches) * size * (config.length or model.length), model.special.mask) as bar:
        for batch in batches:
            first = batch * size
            generation = model.sample(size, config, prompt_ids, cfg.seed, bar.update, first)
            bar.finish(generation.ids.numel())
            generations.append(generation)
    return generations


class Progress:
    """A bar over tokens, which looks at the samples at most twice a second: a look may wait."""

    def __init__(self, total: int, mask_id: int, interval: float = 0.5) -> None:
        self._mask_id, self._interval = mask_id, interval
        self._bar = tqdm(total=total, unit="tok", desc="sampling")
        self._finished, self._last = 0, time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def update(self, x_BL: Tensor) -> None:
        """After a forward pass."""
        if time.monotonic() - self._last > self._interval:
            self._show(self._finished + int((x_BL != self._mask_id).sum()))
            self._last = time.monotonic()

    def finish(self, tokens: int) -> None:
        """After a batch: sequences that ended early count in full."""
        self._finished += tokens
        self._show(self._finished)

    def _show(self, tokens: int) -> None:
        self._bar.update(tokens - self._bar.n)


def cost_metrics(generations: Sequence[Generation]) -> dict[str, float]:
    """Network passes, speed, and why the samples ended, over all batches."""
    tokens = sum(generation.new_tokens for generation in generations)
    passes = [count for generation in generations for count in generation.sample_nfe]
    reasons = [reason for generation in generations for reason in generation.stop_reasons]
    return {
        "nfe": sum(generation.nfe for generation in generations),
        "nfe_per_sample": sum(passes) / len(passes),
        "tokens_per_s": tokens / sum(generation.seconds for generation in generations),
        "tokens_per_forward": tokens / sum(passes) if any(passes) else float("nan"),
        **{f"stopped/{why}": reasons.count(why) / len(reasons) for why in sorted(set(reasons))},
    }


def language_metrics(
    cfg: DictConfig, model: Diffusion, rows: Sequence[list[int]], texts: Sequence[str]
) -> dict[str, float]:
    """What needs another model, a package, or a grammar."""
    metrics: dict[str, float] = {}
    if cfg.eval.generative_model is not None:
        metrics |= generative_perplexity(texts, cfg.eval.generative_model, device=model.device)
    # The text that the model was trained on need not be here to sample from it.
    is_grammar = issubclass(locate(cfg.data.source._target_), ProbabilisticGrammar)
    if not (cfg.eval.mauve or is_grammar):
        return metrics
    data = LanguageData(cfg, model.tokenizer)
    if cfg.eval.mauve:
        count = min(len(texts), len(data.rows(cfg.eval.split)))
        references = data.texts_of_rows(cfg.eval.split, range(count))
        metrics["mauve"] = mauve_score(texts, references)
    if isinstance(data.source, ProbabilisticGrammar):
        sentences = first_documents(rows, model) if not cfg.data.wrap else texts
        training = [document["text"] for document in data.source.documents("train")]
        metrics |= grammatical_rate(sentences, data.source, training)
    return metrics


def first_documents(rows: Sequence[list[int]], model: Diffusion) -> list[str]:
    """The text of every sample up to its first end-of-text token, where a row is one document."""
    eos = model.special.eos
    # The first token may be the same as EOS: tokenizers with one special token for both exist.
    ends = [row.index(eos, 1) if eos in row[1:] else len(row) for row in rows]
    kept = [row[:end] for row, end in zip(rows, ends, strict=True)]
    return model.tokenizer.batch_decode(kept, skip_special_tokens=True)


def write_samples(
    path: Path, seed: int, generations: Sequence[Generation], texts: Sequence[str]
) -> None:
    """One JSON line per sample: its number and seed, text, tokens, cost and why it ended."""
    number = 0
    with path.open("w", encoding="utf-8") as file:
        for batch, generation in enumerate(generations):
            columns = generation.rows(), generation.stop_reasons, generation.sample_nfe
            for row, reason, nfe in zip(*columns, strict=True):
                line: dict[str, Any] = {
                    "sample": number,
                    "seed": seed,
                    "text": texts[number],
                    "length": len(row),
                    "stop_reason": reason,
                    "nfe": nfe,
                    "batch": batch,
                    "batch_nfe": generation.nfe,
                    "batch_seconds": round(generation.seconds, 4),
                    "ids": row,
                }
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                number += 1
