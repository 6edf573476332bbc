"""mode=export_draft: a draft as a folder that SGLang, vLLM and z-lab's own code read."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig

from callbacks.metrics_csv import read_metrics
from draft import DFlashDraft
from evaluation.model_card import UNKNOWN, UNMEASURED, run_folder
from models.dflash_config import DFlashConfig
from runtime.checkpoint import provenance, read_checkpoint
from runtime.dflash.folder import CONFIG, WEIGHTS, write_draft
from runtime.run import write_provenance


def run(cfg: DictConfig) -> dict[str, float]:
    """Write the draft of `eval.checkpoint_path` to `mode.folder`, in the published layout.

    Returns:
        steps of the checkpoint, parameters, and megabytes written.

    Raises:
        CheckpointError: no checkpoint of a draft, or a folder that holds something else.
        ConfigError: a dtype that is not here, or a draft that others would read wrongly.
    """
    path = Path(cfg.eval.checkpoint_path)
    content = read_checkpoint(path)
    model = cast(DFlashDraft, DFlashDraft.load_from_checkpoint(path, weights=cfg.eval.weights))
    run_dir = Path(cfg.paths.run_dir)
    write_provenance(run_dir, provenance(model.config, content["provenance"]["data_fingerprint"]))
    folder = Path(cfg.mode.folder or run_dir / "draft")
    parameters = sum(parameter.numel() for parameter in model.network.parameters())
    facts = {"step": content["global_step"], "parameters": parameters, "dtype": cfg.mode.dtype}
    card = _card(folder.name, model, content, facts, _tau(path, content, cfg.eval.weights))
    write_draft(folder, model.network.config, model.network.state_dict(), cfg.mode.dtype, card)
    print(f"exported to {folder}")
    size = sum(file.stat().st_size for file in folder.iterdir() if file.is_file())
    return {"steps": facts["step"], "parameters": parameters, "megabytes": size / 1e6}


def _tau(path: Path, content: Mapping[str, Any], weights: str) -> float | None:
    """What the run's validation measured at the step of this checkpoint."""
    table = run_folder(path) / "metrics.csv"
    if "origin" in content or not table.is_file():
        return None
    # Validation uses the moving average where there is one.
    if weights == "raw" and content["ema"] is not None:
        return None
    rows = [row for row in read_metrics(table) if row["step"] == content["global_step"]]
    return next((row["val/tau"] for row in rows if "val/tau" in row), None)


def _card(
    name: str,
    model: DFlashDraft,
    content: Mapping[str, Any],
    facts: Mapping[str, Any],
    tau: float | None,
) -> str:
    """What is known of the draft, and how to serve it."""
    shape, target = model.network.config, content.get("target", {})
    rows = {
        "target": f"{target.get('name', UNKNOWN)} ({target.get('fingerprint', UNKNOWN)})",
        "layers": shape.num_hidden_layers,
        "target layers read": ", ".join(map(str, shape.target_layer_ids)),
        "block size": f"{shape.block_size}: {_slots(shape)}",
        "mask token": shape.mask_token_id,
        "parameters": f"{facts['parameters']:,} in {facts['dtype']}, without embedding and head",
        "objective": model.config["objective"]["name"],
        "optimiser steps": f"{facts['step']:,}",
        "validation tau, mean over random anchors": UNMEASURED if tau is None else f"{tau:.3f}",
        "code": content["provenance"].get("git") or UNKNOWN,
    }
    table = "\n".join(f"| {key} | {value} |" for key, value in rows.items())
    return f"""---
library_name: palimpsest
tags:
- palimpsest
- dflash
---

# {name}

| | |
|---|---|
{table}

`{WEIGHTS}` has the weights under the published names, `{CONFIG}` the shape.

{_serving(shape)}"""


def _slots(shape: DFlashConfig) -> str:
    if shape.sample_from_anchor:
        return f"{shape.num_drafts} drafts, the first in the anchor's own slot"
    return f"the anchor and {shape.num_drafts} drafts"


def _serving(shape: DFlashConfig) -> str:
    """How to start a server with it; servers know the published layout only."""
    if shape.sample_from_anchor:
        return "Slot 0 predicts, too, which servers do not know: decode with Palimpsest.\n"
    return f"""```bash
python -m sglang.launch_server --model-path TARGET --speculative-algorithm DFLASH \\
    --speculative-draft-model-path FOLDER --speculative-num-draft-tokens {shape.block_size}
vllm serve TARGET --speculative-config \\
    '{{"method": "dflash", "model": "FOLDER", "num_speculative_tokens": {shape.num_drafts}}}'
```
"""
