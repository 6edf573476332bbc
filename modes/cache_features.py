"""mode=cache_features: what the target says of every token, written once for many epochs."""

import contextlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data.blocks import IDS, LENGTH, SEGMENT
from data.errors import DataError
from data.feature_cache import FeatureWriter
from dataloader import LanguageData
from draft import DFlashDraft
from objectives.anchors import places_in_document
from objectives.fused_acceptance import teacher_summary
from opening import build_algorithm
from runtime.checkpoint import provenance
from runtime.devices import chosen_accelerator
from runtime.errors import ConfigError
from runtime.run import write_provenance

_BATCHES_PER_FLUSH = 10


def run(cfg: DictConfig) -> dict[str, float]:
    """Write the features of `mode.splits` to `algo.feature_cache`; rows that are there are kept.

    Returns:
        Per split rows, tokens and gigabytes; rows written now and their tokens per second.

    Raises:
        ConfigError: no folder is given, or the algorithm is none that reads features.
        DataError: the disk has no room, or the folder holds features of something else.
    """
    if cfg.algo.get("feature_cache") is None:
        raise ConfigError("algo.feature_cache=null: mode=cache_features needs a folder to write to")
    data = LanguageData(cfg)
    algorithm = build_algorithm(cfg, data)
    if not isinstance(algorithm, DFlashDraft):
        raise ConfigError(f"algo={cfg.algo.name}: reads no features of a target; allowed: dflash")
    # The features are those of the whole target whatever is trained on them.
    device = "cuda" if chosen_accelerator(cfg.trainer.accelerator) in ("gpu", "cuda") else "cpu"
    algorithm.to(device)
    metrics: dict[str, float] = {}
    for split in cfg.mode.splits:
        if split in data.source.splits:
            metrics |= {
                f"{split}/{k}": v for k, v in write_split(cfg, algorithm, data, split).items()
            }
    write_provenance(Path(cfg.paths.run_dir), provenance(cfg, data.fingerprint))
    return metrics


@torch.no_grad()
def write_split(
    cfg: DictConfig, algorithm: DFlashDraft, data: LanguageData, split: str
) -> dict[str, float]:
    """Write what is missing of one split; says how large it will be before it begins."""
    rows, target = data.rows(split), algorithm.target_here()
    if not {LENGTH, SEGMENT} <= set(rows.names):
        raise DataError(
            f"data={cfg.data.name}: rows that are no conversations; allowed: data=chat (with"
            " data.join=true)"
        )
    lengths_R = np.concatenate([block[LENGTH] for block in rows.blocks()]).astype(np.int64)
    config = algorithm.network.config
    writer = FeatureWriter(
        cfg.algo.feature_cache, split, algorithm.cache_identity(data.fingerprint), lengths_R,
        config.taps_size, config.hidden_size, cfg.mode.dtype,
    )  # fmt: skip
    gigabytes = writer.sizes.bytes(cfg.mode.dtype) / 1e9
    print(
        f"{split}: {len(rows)} rows, {writer.sizes.tokens} tokens, {gigabytes:.2f} GB as"
        f" {cfg.mode.dtype} in {cfg.algo.feature_cache}; {writer.rows_done} rows are there",
        flush=True,
    )
    fresh = slice(writer.rows_done, len(rows))
    began = time.monotonic()
    starts = range(fresh.start, fresh.stop, cfg.mode.batch_size)
    for number, start in enumerate(_progress(starts, f"features of {split}"), start=1):
        index = np.arange(start, min(start + cfg.mode.batch_size, fresh.stop))
        block = rows.take(index)
        batch = {
            name: torch.from_numpy(block[name].astype(np.int64)).to(algorithm.device)
            for name in (IDS, SEGMENT)
        }
        output = algorithm.taps.run(batch[IDS], position_ids=places_in_document(batch[SEGMENT]))
        assert output.last_hidden_BSD is not None
        flat = output.last_hidden_BSD.flatten(0, 1)
        expected, entropy = teacher_summary(flat, target.head_VD)
        shape = batch[IDS].shape
        writer.write(output.taps_BSE, expected.unflatten(0, shape), entropy.unflatten(0, shape))
        if number % _BATCHES_PER_FLUSH == 0:
            writer.flush()
    writer.flush()
    seconds = time.monotonic() - began
    written = int(lengths_R[fresh].sum())
    result: dict[str, float] = {
        "rows": len(rows), "tokens": writer.sizes.tokens, "gigabytes": round(gigabytes, 4),
        "rows_written": fresh.stop - fresh.start,
    }  # fmt: skip
    return result | ({"tokens_per_s": written / seconds} if written else {})


def _progress(items: Any, description: str) -> Any:
    columns = ("{task.description}", BarColumn(), MofNCompleteColumn())
    progress = Progress(
        *columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)
    )
    with progress if sys.stderr.isatty() else contextlib.nullcontext():
        yield from progress.track(items, description=description)
