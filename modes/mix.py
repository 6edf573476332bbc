"""mode=mix: a training set of exact counts per group, some of it from an earlier set."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from data.manifest import row_files
from data.mixing import ANCHOR_INPUT, INPUT, Recipe, mix
from evaluation.row_counts import count_metrics, counts_table, place
from evaluation.tables import text_table
from runtime.checkpoint import provenance
from runtime.progress import counting
from runtime.run import write_provenance

COLUMNS = ("rows", "anchors", "copies", "prompts")


def run(cfg: DictConfig) -> dict[str, float]:
    """Write the mix to `mode.output`, and print what it consists of.

    Returns:
        Rows read, drawn and not drawn; of each group its rows, anchors, copies and different
        prompts; whether outputs were kept.
    """
    mode = cfg.mode
    recipe = Recipe(
        _plain(mode.counts), _groups(mode.groups), _plain(mode.anchors), mode.max_per_prompt,
        mode.repeat, mode.seed,
    )  # fmt: skip
    rows = row_files(mode.input, INPUT)
    anchors = row_files(mode.anchor_input, ANCHOR_INPUT) if mode.anchor_input else []
    with counting("mixing", "rows read") as tick:
        manifest = mix(Path(mode.output), rows, anchors, recipe, tick)
    groups = manifest["mix"]
    lines = [[name, *(line[column] for column in COLUMNS)] for name, line in groups.items()]
    print(text_table([place(mode.output, manifest), *COLUMNS], lines))
    print(counts_table(INPUT, manifest["rows"]))
    if anchors:
        print(counts_table(ANCHOR_INPUT, manifest["anchor_rows"]))
    write_provenance(Path(cfg.paths.run_dir), provenance(cfg, manifest["key"]))
    metrics = {f"mix/{name}/{column}": line[column] for name, line in groups.items()
               for column in COLUMNS}  # fmt: skip
    return count_metrics(manifest["rows"]) | metrics | {"reused": float(manifest["reused"])}


def _plain(node: Any) -> dict[str, int]:
    plain: Any = OmegaConf.to_container(node, resolve=True) if OmegaConf.is_config(node) else node
    return {str(key): value for key, value in (plain or {}).items()}


def _groups(node: Any) -> dict[str, list[str]]:
    """{group: patterns}; a single pattern may stand without brackets."""
    plain: dict[str, Any] = _plain(node)
    return {key: [value] if isinstance(value, str) else value for key, value in plain.items()}
