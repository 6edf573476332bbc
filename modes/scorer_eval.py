"""mode=scorer_eval: what a candidate scorer is worth, before any benchmark is run with it."""

import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from torch import Tensor
from tqdm import tqdm

from algorithm import Algorithm
from data.errors import DataError
from data.tokenization import same_ids
from evaluation.grouped import Groups
from evaluation.scorer import ALPHAS, ScoredBlocks, selection
from evaluation.scorer_evaluation import ScorerEvaluation, evaluate, metrics_of, scalars
from evaluation.scorer_quality import LeakProbe, ordering
from evaluation.scorer_report import terminal_text, write_report
from evaluation.scorer_run import probe_leak, scored_blocks
from modes.sample_eval import sampling_device
from objectives.pairing import additive_weight
from opening import evaluation_data, open_checkpoint
from pretrained import PretrainedAlgorithm
from runtime.checkpoint import provenance
from runtime.errors import ConfigError
from runtime.overrides import overridden_keys
from runtime.run import write_config, write_json, write_provenance
from scorer import CandidateScorer


def run(cfg: DictConfig) -> dict[str, float]:
    """Score the candidates of held-out blocks behind their true past.

    The blocks are those that the checkpoint keeps (`mode.blocks=checkpoint`), or those of
    `eval.split` (`mode.blocks=data`). Writes blocks.jsonl, scorer.md and two plots.

    Returns:
        oracle, greedy, bon, gain and the rest of `evaluation.scorer_evaluation.metrics_of` with the
        alpha of `bon.alpha`; `tuned/alpha`, the best of the sweep on the rows of even number, with
        its gain on the odd ones (`tuned/gain`, `_low`, `_high`); `leak/...` of the probe;
        `judge/...`, the same of picking by the log-probability under `mode.judge`.

    Raises:
        ConfigError: a checkpoint without a scorer, or without blocks.
    """
    model, cfg = open_checkpoint(cfg)
    if not isinstance(model, CandidateScorer):
        raise ConfigError(
            f"eval.checkpoint_path={cfg.eval.checkpoint_path}: holds algo={cfg.algo.name}, which"
            " scores no candidates; allowed: a checkpoint of algo=nce"
        )
    if model.best_of.score_agg == "select_each":
        raise ConfigError(
            "bon.score_agg=select_each: its chain follows the scorer, so that there is no greedy"
            " block among the candidates to compare with; allowed: perround, lastround (answers of"
            " select_each are compared by mode=benchmark_eval)"
        )
    batches, fingerprint = _batches(cfg, model)
    device = sampling_device(cfg)
    model.to(device)
    batches = [{name: column.to(device) for name, column in batch.items()} for batch in batches]
    blocks = scored_blocks(model, tqdm(batches, desc="candidates", unit="batch"))
    alpha = additive_weight(cfg.bon.alpha, cfg.bon.form)
    found = evaluate(blocks, alpha)
    run_dir = Path(cfg.paths.run_dir)
    write_config(run_dir, cfg)
    title = f"{cfg.model.name}: {blocks.valid_MC.shape[0]} blocks"
    write_report(run_dir, title, blocks, found)
    write_provenance(run_dir, provenance(cfg, fingerprint))
    print(terminal_text(found))
    metrics = metrics_of(found) | tuned(blocks, allowed_alphas(model))
    leak: LeakProbe | str
    try:
        leak = probe_leak(model, tqdm(batches, desc="leak probe", unit="batch"))
        metrics |= leak_metrics(leak)
    except DataError as error:
        leak = str(error)
    if cfg.mode.judge is not None:
        judge = _judge(cfg, model)
        judged = scored_blocks(model, tqdm(batches, desc="judge", unit="batch"), judge)
        metrics |= judge_metrics(judged)
    write_json(run_dir / "scorer.json", metrics)
    print(_closing(found, metrics, leak))
    return metrics


def _judge(cfg: DictConfig, model: CandidateScorer) -> Algorithm:
    """The model of `mode.judge`, which reads the same tokens."""
    path = cfg.mode.judge
    judge = Algorithm.load_from_checkpoint(path)
    if not isinstance(judge, PretrainedAlgorithm):
        raise ConfigError(
            f"mode.judge={path}: algo={judge.config['algo']['name']} gives texts no likelihood;"
            " allowed: a checkpoint of algo=sft_raw"
        )
    if not same_ids(judge.tokenizer, model.tokenizer):
        raise ConfigError(f"mode.judge={path}: reads another tokenizer than the scorer's")
    return judge.to(sampling_device(cfg)).eval()


def judge_metrics(judged: ScoredBlocks) -> dict[str, float]:
    """What picking the candidate with the largest log-probability under the judge gains."""
    groups = Groups(judged.group_M)
    picked, order = selection(judged, math.inf, groups), ordering(judged, groups)
    return scalars(picked, "judge/") | scalars(order, "judge/")


def _batches(cfg: DictConfig, model: CandidateScorer) -> tuple[list[dict[str, Tensor]], str | None]:
    """Batches of text, and the identity of the data they are from."""
    if cfg.mode.blocks == "checkpoint":
        if not model.eval_batches:
            raise ConfigError(
                f"mode.blocks=checkpoint: {cfg.eval.checkpoint_path} keeps none (nce.eval_batches);"
                " allowed: mode.blocks=data"
            )
        return model.eval_batches, model.data_fingerprint
    named = "data.tokenizer_name_or_path" in overridden_keys()
    data = evaluation_data(cfg, model.tokenizer, named=named)
    loader = data.eval_loader(cfg.eval.split, cfg.eval.limit_rows, rank=0, world=1)
    return list(loader), data.fingerprint


def allowed_alphas(model: CandidateScorer) -> list[float]:
    """Those of the sweep with which decoding may add the scores."""
    allowed = []
    for alpha in ALPHAS:
        with suppress(ValueError):
            model.check_weight(alpha)
            allowed.append(alpha)
    return allowed


def tuned(blocks: ScoredBlocks, alphas: Sequence[float] = ALPHAS) -> dict[str, float]:
    """The alpha with the largest gain on rows of even number, and its gain on the odd ones.

    Empty if one of the two halves has no block.
    """
    even_M = blocks.group_M % 2 == 0
    if even_M.all() or not even_M.any():
        return {}
    tune, held_out = blocks.among(even_M), blocks.among(~even_M)
    seen = Groups(tune.group_M)
    gains = {alpha: selection(tune, alpha, seen).gain.value for alpha in alphas}
    best = max(gains, key=lambda alpha: gains[alpha] or 0.0)
    gain = selection(held_out, best, Groups(held_out.group_M)).gain
    found = {
        "tuned/alpha": best, "tuned/gain_seen": gains[best], "tuned/gain": gain.value,
        "tuned/gain_low": gain.low, "tuned/gain_high": gain.high,
    }  # fmt: skip
    return {name: value for name, value in found.items() if value is not None}


def leak_metrics(leak: LeakProbe) -> dict[str, float]:
    """The probe as numbers."""
    return {
        "leak/rate": leak.rate, "leak/low": leak.interval.low,
        "leak/high": leak.interval.high, "leak/chance": leak.chance, "leak/sets": leak.sets,
        "leak/at_chance": float(leak.at_chance),
    }  # fmt: skip


def _probe_text(leak: LeakProbe | str) -> str:
    if isinstance(leak, str):
        return f"leak probe: not measured ({leak})"
    return (
        f"leak probe: {leak.rate:.3f} [{leak.interval.low:.3f}, {leak.interval.high:.3f}] of"
        f" {leak.sets} sets, chance {leak.chance:.3f}"
        f"{'' if leak.at_chance else ': THE SCORER KNOWS A SLOT BY HOW IT WAS READ'}"
    )


def _closing(found: ScorerEvaluation, metrics: dict[str, Any], leak: LeakProbe | str) -> str:
    verdict = "ships" if found.gate.ships else "does not ship: its gain may be nothing"
    lines = [f"the scorer {verdict}", _probe_text(leak)]
    if "judge/gain" in metrics:
        lines.append(
            f"picked by the judge's log-probability: gain {metrics['judge/gain']:+.4f}"
            f" [{metrics.get('judge/gain_low', math.nan):+.4f},"
            f" {metrics.get('judge/gain_high', math.nan):+.4f}]"
        )
    if "tuned/alpha" in metrics:
        lines.append(
            f"alpha={metrics['tuned/alpha']:g} was best on even rows; gain on odd ones"
            f" {metrics['tuned/gain']:+.4f} [{metrics.get('tuned/gain_low', math.nan):+.4f},"
            f" {metrics.get('tuned/gain_high', math.nan):+.4f}]"
        )
    return "\n".join(lines)
