"""mode=prompts: write a prompt set (prompts=NAME) as rows of JSON lines."""

from pathlib import Path

from omegaconf import DictConfig

from data.prompt_sets import PromptSet, write_prompts
from evaluation.row_counts import count_metrics, counts_table, place
from runtime.checkpoint import provenance
from runtime.config import ROOT, instantiate
from runtime.errors import ConfigError
from runtime.progress import counting
from runtime.run import write_provenance


def run(cfg: DictConfig) -> dict[str, float]:
    """Write `rows.jsonl` to `mode.output`, and say whether the set is complete.

    Returns:
        Rows of the set and rows written, by source; different prompts; whether the set has as
        many rows as published, where that is known; whether outputs were kept.

    Raises:
        ConfigError: no set is chosen.
    """
    if cfg.get("prompts") is None:
        there = sorted(path.stem for path in (ROOT / "configs" / "prompts").glob("*.yaml"))
        raise ConfigError(f"prompts=null: nothing to write; allowed: {', '.join(there)}")
    prompts: PromptSet = instantiate(cfg.prompts)
    with counting(f"writing {prompts.name}", "rows", prompts.expected) as tick:
        manifest = write_prompts(
            Path(cfg.mode.output), prompts, cfg.mode.limit, cfg.mode.seed, tick
        )
    found = manifest["prompts"]
    print(counts_table(place(cfg.mode.output, manifest), manifest["rows"]))
    if found["expected"] not in (None, found["found"]):
        print(f"{prompts.name}: {found['found']} rows; the complete set has {found['expected']}")
    write_provenance(Path(cfg.paths.run_dir), provenance(cfg, manifest["key"]))
    metrics = count_metrics(manifest["rows"]) | {"distinct": found["distinct"]}
    if found["expected"] is not None:
        metrics["complete"] = float(found["found"] == found["expected"])
    return metrics | {"reused": float(manifest["reused"])}
