"""mode=cache_features: what the target says of every token, written once for many epochs."""

import time
from pathlib import Path

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from data.blocks import IDS, LENGTH, SEGMENT, Block
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
from runtime.progress import counting
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
    rows = data.rows(split)
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
    fresh_rows = range(writer.rows_done, len(rows))
    began = time.monotonic()
    with counting(f"features of {split}", "rows", len(fresh_rows)) as tick:
        for number, start in enumerate(fresh_rows[:: cfg.mode.batch_size], start=1):
            index = np.arange(start, min(start + cfg.mode.batch_size, fresh_rows.stop))
            writer.write(*_features(algorithm, rows.take(index)))
            tick(len(index))
            if number % _BATCHES_PER_FLUSH == 0:
                writer.flush()
    writer.flush()
    seconds = time.monotonic() - began
    written = int(lengths_R[fresh_rows.start :].sum())
    result: dict[str, float] = {
        "rows": len(rows), "tokens": writer.sizes.tokens, "gigabytes": round(gigabytes, 4),
        "rows_written": len(fresh_rows),
    }  # fmt: skip
    return result | ({"tokens_per_s": written / seconds} if written else {})


def _features(algorithm: DFlashDraft, block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Taps, expected head vectors and entropies of some rows."""
    ids_BL, segment_BL = (
        torch.from_numpy(block[name].astype(np.int64)).to(algorithm.device)
        for name in (IDS, SEGMENT)
    )
    target = algorithm.target_here()
    output = algorithm.taps.run(ids_BL, position_ids=places_in_document(segment_BL))
    assert output.last_hidden_BSD is not None
    flat_TD = output.last_hidden_BSD.flatten(0, 1)
    expected_TD, entropy_T = teacher_summary(flat_TD, target.head_VD)
    shape = ids_BL.shape
    return output.taps_BSE, expected_TD.unflatten(0, shape), entropy_T.unflatten(0, shape)
