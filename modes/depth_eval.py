"""mode=depth_eval: likelihood, training weight and order of unmasking by depth in the tree.

Which tokens does a model find hard, which ones did its training weigh, and which ones does its
sampler reveal first? Answered by the depth of a word in its dependency tree, and by position.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from tqdm.auto import tqdm

from data.blocks import FEATURE_DTYPE
from data.depth import DEPTH
from data.grammar_model import ProbabilisticGrammar
from data.parse_store import PARSED
from data.source import Document
from dataloader import LanguageData
from decoding.denoise import with_prompts
from decoding.trace import RevealTrace
from diffusion import Diffusion
from evaluation.breakdown import (
    ClassRatios,
    classes_by_value,
    metrics_by,
    nll_lines,
    weight_lines,
)
from evaluation.breakdown_plot import plot_breakdown
from evaluation.perplexity import likelihood_metrics
from evaluation.tables import metrics_table, text_table
from evaluation.unmasking import (
    USED,
    OrderedSample,
    Parser,
    by_words,
    ordered_samples,
    rank_lines,
    tau_metrics,
)
from modes.sample_eval import sampling_config, sampling_device
from opening import evaluation_data, open_checkpoint
from runtime.checkpoint import provenance
from runtime.errors import ConfigError
from runtime.overrides import overridden_keys
from runtime.run import write_config, write_provenance

Lines = list[dict[str, Any]]
_DEPTHS = int(np.iinfo(FEATURE_DTYPE).max) + 1


def run(cfg: DictConfig) -> dict[str, float]:
    """Break `eval.checkpoint_path` on `eval.split` down by depth and by position.

    1. The bound of mode=ppl_eval, token by token; 2. the training weights of the same tokens; 3.
    samples, their trees, and when each word was revealed; 4. files, a plot and a table.

    Returns:
        nll and its errors as mode=ppl_eval has them; per depth nll/depth_D (nats per token),
        weight/depth_D (mean training weight) and rank/depth_D (mean reveal rank in its block, 0
        first, 1 last); tau (Kendall's tau-b of depth and step within blocks, mean over samples)
        with its interval; how many samples were used and left out.

    Raises:
        ConfigError: an algorithm without likelihoods per token, or samples longer than a row.
    """
    model, cfg = open_checkpoint(cfg)
    if not isinstance(model, Diffusion):
        raise ConfigError(f"algo={cfg.algo.name}: mode=depth_eval has no likelihood of its tokens")
    if (cfg.sampling.length or 0) > model.length:
        raise ConfigError(
            f"sampling.length={cfg.sampling.length}: the order is that of rows as in training;"
            f" allowed: up to model.length={model.length}, null"
        )
    model.to(sampling_device(cfg))
    named = "data.tokenizer_name_or_path" in overridden_keys()
    data = evaluation_data(cfg, model.tokenizer, named, with_parse=True)
    run_dir = Path(cfg.paths.run_dir)
    write_config(run_dir, cfg)
    write_provenance(run_dir, provenance(cfg, data.fingerprint))
    scores = score_rows(model, data, cfg)
    samples = sample_orders(model, cfg, tree_parser(data))
    return report(run_dir, f"{cfg.data.name} {cfg.eval.split}", scores, samples, model.is_exact)


@dataclass
class Scores:
    """What the rows of a split add up to, class by class.

    Attributes:
        nll_by_position: by place in the row.
        nll_by_place: by place in the block; None where a block is one token or the whole row.
        nll_by_depth: None where the rows have no trees, like the next one.
        weight_by_depth: training weights.
        nll: nats of the rows of every batch, [B, draws].
        tokens: their numbers of tokens.
    """

    nll_by_position: ClassRatios
    nll_by_place: ClassRatios | None
    nll_by_depth: ClassRatios | None = None
    weight_by_depth: ClassRatios | None = None
    nll: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def score_rows(model: Diffusion, data: LanguageData, cfg: DictConfig) -> Scores:
    """The bound of every token, in the mean over the draws, and its training weight."""
    blocks = 1 < model.block_size < model.length
    scores = Scores(ClassRatios(model.length), ClassRatios(model.block_size) if blocks else None)
    loader = data.eval_loader(cfg.eval.split, cfg.eval.limit_rows, rank=0, world=1)
    for batch in tqdm(loader, desc="tokens", unit="batch"):
        add_batch(scores, model, batch, 1 if model.is_exact else cfg.eval.num_draws)
    return scores


def add_batch(scores: Scores, model: Diffusion, batch: dict[str, Any], draws: int) -> None:
    """Add the rows of a batch (host tensors) to the classes of their tokens."""
    scored_BL, text_BL = model.scored_places(batch), batch["token_mask"]
    nll_BLK = torch.stack([token_nll(model, batch, draw) for draw in range(draws)], dim=-1)
    nll_BL = nll_BLK.mean(-1)
    place_BL = torch.arange(model.length).expand_as(scored_BL)
    position_BL = classes_by_value(place_BL, text_BL)
    scores.nll_by_position.add(position_BL, nll_BL, scored_BL)
    if scores.nll_by_place is not None:
        inside_BL = classes_by_value(place_BL % model.block_size, text_BL)
        scores.nll_by_place.add(inside_BL, nll_BL, scored_BL)
    if DEPTH in batch:
        scores.nll_by_depth = scores.nll_by_depth or ClassRatios(_DEPTHS)
        scores.weight_by_depth = scores.weight_by_depth or ClassRatios(_DEPTHS)
        depth_BL = classes_by_value(batch[DEPTH], text_BL)
        scores.nll_by_depth.add(depth_BL, nll_BL, scored_BL)
        scores.weight_by_depth.add(depth_BL, model.token_weights(batch), scored_BL)
    scores.nll.append(nll_BLK.sum(1))
    scores.tokens.append((scored_BL & text_BL).sum(-1))


def token_nll(model: Diffusion, batch: dict[str, Any], draw: int) -> Tensor:
    """[B, L] contributions to the bound in one draw, on the host."""
    inputs = model.corrupt_for_bound(batch, draw)
    moved = {name: value.to(model.device) for name, value in inputs.items()}
    return model.token_nll({**batch, "draws": {draw: moved}}, draw).cpu()


def tree_parser(data: LanguageData) -> Parser | None:
    """What finds the trees of samples: the grammar, or the parser of `data.parse`."""
    source = data.plain_source
    if isinstance(source, ProbabilisticGrammar):

        def depths(words: Sequence[str]) -> Sequence[int] | None:
            """Those of a sentence of the grammar."""
            sentence = source.parse(words)
            return None if sentence is None else sentence.depths

        return by_words(depths)
    if data.config.data.get("parse") is None:
        return None

    def trees(texts: Sequence[str]) -> list[Document | None]:
        """Documents with the words that the parser found; None for what it could not parse."""
        found = zip(texts, data.parser.parse(texts), strict=True)
        return [parse.document(text) if parse.status == PARSED else None for text, parse in found]

    return trees


def sample_orders(model: Diffusion, cfg: DictConfig, parser: Parser | None) -> list[OrderedSample]:
    """Samples with the step at which every word was revealed; none without a parser of them."""
    config, total = sampling_config(cfg), cfg.mode.num_samples
    if parser is None or total == 0:
        return []
    prompt = cfg.sampling.prompt
    prompt_ids = prompt and model.tokenizer.encode(prompt, add_special_tokens=False)
    bos = model.special.bos if model.starts_with_bos else None
    size = cfg.sampling.batch_size or cfg.loader.eval_global_batch_size
    rows: list[list[int]] = []
    steps: list[np.ndarray] = []
    for first in tqdm(range(0, total, size), desc="samples", unit="batch"):
        count, length = min(size, total - first), config.length or model.length
        start_BL = with_prompts(prompt_ids, count, length, model.special.mask, bos)
        trace = RevealTrace(start_BL.to(model.device), model.special.mask)
        generation = model.sample(count, config, prompt_ids, cfg.seed, trace, first)
        rows += generation.rows()
        steps += list(trace.step_BL.cpu().numpy())
    # Blocks of one token leave no order inside them: theirs is that of the row.
    block_size = model.block_size if model.block_size > 1 else model.length
    return ordered_samples(rows, steps, block_size, model.tokenizer, model.special, parser)


def report(
    run_dir: Path, title: str, scores: Scores, samples: Sequence[OrderedSample], exact: bool
) -> dict[str, float]:
    """Write the files, the plot and the table; return the summary's metrics."""
    nll_RK, tokens_R = torch.cat(scores.nll).numpy(), torch.cat(scores.tokens).numpy()
    metrics = likelihood_metrics(nll_RK, tokens_R.astype(np.float64), exact)
    position = nll_lines("position", scores.nll_by_position.estimates(), of="row")
    place = scores.nll_by_place
    inside = [] if place is None else nll_lines("position", place.estimates(), of="block")
    write_lines(run_dir / "nll_by_position.jsonl", [*position, *inside])
    (depth, weights), ranks = depth_lines(scores), rank_lines(samples)
    if depth:
        write_lines(run_dir / "nll_by_depth.jsonl", depth)
        write_lines(run_dir / "weight_by_depth.jsonl", weights)
        metrics |= metrics_by(depth, "depth", "nll") | metrics_by(weights, "depth", "weight")
    if samples:
        numbered = [{"sample": n, **sample.line()} for n, sample in enumerate(samples)]
        write_lines(run_dir / "unmasking_order.jsonl", numbered)
        metrics |= metrics_by(ranks, "depth", "rank")
    metrics |= tau_metrics(samples)
    plot_breakdown(run_dir / "breakdown.png", depth, weights, ranks, position, inside)
    print(metrics_table(title, {key: metrics[key] for key in metrics if "/" not in key}), "\n")
    print(depth_table(depth, weights, ranks) if depth else position_table(position))
    print(remarks(bool(depth), samples))
    return metrics


def depth_lines(scores: Scores) -> tuple[Lines, Lines]:
    """Likelihoods and weights by depth; empty without trees."""
    if scores.nll_by_depth is None or scores.weight_by_depth is None:
        return [], []
    nll = nll_lines("depth", scores.nll_by_depth.estimates())
    return nll, weight_lines(scores.weight_by_depth.estimates())


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    """One JSON object per line; what is not a finite number is null."""
    with path.open("w", encoding="utf-8") as file:
        for line in lines:
            plain = {key: None if _is_nan(value) else value for key, value in line.items()}
            file.write(json.dumps(plain, ensure_ascii=False, allow_nan=False) + "\n")


def _is_nan(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def depth_table(depth: Lines, weights: Lines, ranks: Lines) -> str:
    """One line per depth: its likelihood, its weight in training, when it is revealed."""
    header = ["depth", "tokens", "nll", "s.e.", "share of nats", "weight", "s.e.",
              "revealed", "rank", "95 % interval"]  # fmt: skip
    weight_of = {line["depth"]: line for line in weights}
    rank_of = {line["depth"]: line for line in ranks}
    rows = []
    for line in depth:
        weight, rank = weight_of[line["depth"]], rank_of.get(line["depth"])
        interval = rank and f"[{rank['rank_low']:.3f}, {rank['rank_high']:.3f}]"
        rows.append(
            [str(line["depth"]), line["tokens"], line["nll"], line["nll_se"], line["share"],
             weight["weight"], weight["weight_se"], rank and rank["tokens"],
             rank and rank["rank"], interval]
        )  # fmt: skip
    return text_table(header, rows)


def position_table(position: Lines, shown: int = 16) -> str:
    """Likelihood by place in the row: the first ones, then every power of two."""
    kept = [
        line for line in position
        if isinstance(line["position"], str) or line["position"] < shown
        or not line["position"] & (line["position"] - 1)
    ]  # fmt: skip
    rows = [[str(line["position"]), line["tokens"], line["nll"], line["nll_se"]] for line in kept]
    return text_table(["position", "tokens", "nll", "s.e."], rows)


def remarks(has_depth: bool, samples: Sequence[OrderedSample]) -> str:
    """What the tables leave out, and what to expect of the order."""
    said = []
    if not has_depth:
        said.append("no depths: this data has no dependency trees, so positions are all there is")
    if not samples:
        said.append("order of unmasking: no samples (without a parser for them, or num_samples=0)")
    else:
        used = sum(sample.status == USED for sample in samples)
        said.append(
            f"order of unmasking: {used} of {len(samples)} samples have a tree; rank 0 is the first"
            " of its block; tau > 0: shallow words first. Where the order ignores the text, as in"
            " first hitting, expect rank 0.5 and tau 0 over all samples; leaving out those without"
            " a tree keeps the orders that led to sentences, which can shift both"
        )
    return "\n".join(said)
