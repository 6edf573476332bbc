"""mode=parse_depth: find the depth of every word of a data set, and store it for training."""

import os
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from data.blocks import PackingReport
from data.parse_store import STATUSES
from data.parsing import Outcome, Shard, parse_split, usable_processes
from dataloader import LanguageData
from evaluation.tables import metrics_table
from runtime.checkpoint import provenance
from runtime.errors import ConfigError
from runtime.progress import counting
from runtime.run import write_provenance

# What the packing says of tokens and words.
ALIGNMENT = (
    "tokens", "tokens_of_words", "tokens_without_word", "tokens_of_several_words",
    "words_without_token",
)  # fmt: skip


def run(cfg: DictConfig) -> dict[str, float]:
    """Parse the splits of `mode.splits` with `data.parse`, then see which tokens got a depth.

    Parts that exist are kept. Data that brings its own trees (`data.parse=null`) is only looked
    at. Tokens are looked at where the parse of a split is complete.

    Returns:
        Per split: documents by status, sentences, words, their rates per second over what was
        parsed now, and the tokens of words, without word, and so on.
    """
    data = LanguageData(cfg)
    splits = [split for split in cfg.mode.splits if split in data.plain_source.splits]
    if not splits:
        raise ConfigError(
            f"mode.splits={list(cfg.mode.splits)}: none of them is in data={cfg.data.name};"
            f" allowed: {', '.join(data.plain_source.splits)}"
        )
    shard = shard_of(cfg)
    metrics: dict[str, float] = {}
    finished = list(splits)
    store = data.parse_store
    for split in splits:
        if store is None:
            continue
        outcome = _parse(data, split, shard)
        found = parse_metrics(outcome)
        metrics |= {f"{split}/{name}": value for name, value in found.items()}
        print(metrics_table(f"{cfg.data.name} {split}: {store.folder}", found))
        if not outcome.finished:
            print(f"{split}: not complete before the other shards are done")
            finished.remove(split)
    # After all are parsed, because the identity of the data is that of its training split's parse.
    for split in finished:
        counts = alignment(data.packing_report(split), split, cfg.data.name)
        metrics |= {f"{split}/{name}": value for name, value in counts.items()}
        print(metrics_table(f"{cfg.data.name} {split}: tokens", counts))
    if finished == splits:
        write_provenance(Path(cfg.paths.run_dir), provenance(cfg, data.fingerprint))
    return metrics


def shard_of(cfg: DictConfig) -> Shard:
    """Which parts to make: `mode.shard` of `mode.num_shards`, or a task of a SLURM array.

    Raises:
        ConfigError: only one of the two is given, there is no such shard, or the tasks of the
            array are not evenly spaced.
    """
    number, count = cfg.mode.shard, cfg.mode.num_shards
    if number is None and count is None:
        # The jobs of a sweep may be tasks of an array, too; each of them has data of its own.
        is_task = "SLURM_ARRAY_TASK_ID" in os.environ and not _is_sweep()
        return _shard_of_array() if is_task else Shard()
    if number is None or count is None or number >= count:
        raise ConfigError(
            f"mode.shard={number}, mode.num_shards={count}: give both; allowed:"
            f" 0 <= mode.shard < mode.num_shards"
        )
    return Shard(number, count)


def _is_sweep() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _shard_of_array() -> Shard:
    names = ("ID", "MIN", "MAX", "STEP", "COUNT")
    given = {f"SLURM_ARRAY_TASK_{n}": os.environ.get(f"SLURM_ARRAY_TASK_{n}") for n in names}
    try:
        place, first, last, step, count = (int(value) for value in given.values() if value)
        number, beside = divmod(place - first, step)
        if beside == 0 and count == (last - first) // step + 1 and 0 <= number < count:
            return Shard(number, count)
    # A variable is not there, no number, or zero.
    except (ValueError, ZeroDivisionError):
        pass
    shown = ", ".join(f"{name}={value}" for name, value in given.items())
    raise ConfigError(
        f"{shown}: the tasks of this array are not evenly spaced; allowed: an array like"
        " --array=0-7, or mode.shard and mode.num_shards"
    )


def parse_metrics(outcome: Outcome) -> dict[str, float]:
    """The figures of a split."""
    counts, fresh, seconds = outcome.counts, outcome.fresh, outcome.seconds
    names = ("documents", *STATUSES, "sentences", "words", "unparsed_words")
    metrics: dict[str, float] = {name: counts[name] for name in names}
    metrics |= {name: count for name, count in sorted(counts.items()) if name not in names}
    metrics |= {"parts": outcome.parts, "kept_parts": outcome.kept}
    if fresh["documents"]:
        for name in ("documents", "sentences", "words"):
            metrics[f"{name}_per_s"] = round(fresh[name] / seconds, 3)
    return metrics


def alignment(report: PackingReport, split: str, name: str) -> dict[str, float]:
    """How tokens and words fit, with the share of tokens that are accounted for.

    Raises:
        ConfigError: the data has no trees.
    """
    if report.tokens and not report.tokens_of_words + report.tokens_without_word:
        raise ConfigError(
            f"data.parse=null: data={name} has no trees in {split}; allowed: data/parse=stanza,"
            " or data that has them (data=grammar, data=conllu)"
        )
    counts: dict[str, float] = {"documents": report.documents}
    counts |= {key: getattr(report, key) for key in ALIGNMENT}
    known = report.tokens_of_words + report.tokens_without_word
    return counts | {"accounted_for": known / report.tokens if report.tokens else 1.0}


def _parse(data: LanguageData, split: str, shard: Shard) -> Outcome:
    store = data.parse_store
    assert store is not None, "the caller has looked"
    parse = data.config.data.parse
    processes = usable_processes(parse.num_processes, data.parser.on_gpu)
    with counting(f"parsing {split}", "documents") as tick:
        return parse_split(data.plain_source, split, store, data.parser, processes, shard, tick)
