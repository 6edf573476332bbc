"""mode=decontaminate: the rows of mode.input that overlap with no item of mode.against."""

from pathlib import Path

from omegaconf import DictConfig

from data.decontaminate import AGAINST, INPUT, decontaminate
from data.manifest import row_files
from data.overlap import KINDS, OverlapRule
from evaluation.row_counts import count_metrics, counts_table, place
from evaluation.tables import text_table
from runtime.checkpoint import provenance
from runtime.progress import counting
from runtime.run import write_provenance

SET_COLUMNS = ("items", "items_hit", "rows_hit", *KINDS)


def run(cfg: DictConfig) -> dict[str, float]:
    """Write what is left to `mode.output`, and print which evaluation sets were hit how often.

    Returns:
        Rows in, out and removed by kind; rows in and out by source; of each evaluation set its
        items, the items and rows hit, and the hits by kind; whether outputs were kept.
    """
    mode = cfg.mode
    rows, against = row_files(mode.input, INPUT), row_files(mode.against, AGAINST)
    rule = OverlapRule(
        mode.ngram, mode.least_characters, list(mode.item_fields), list(mode.row_fields)
    )
    with counting("decontaminating", "rows") as tick:
        manifest = decontaminate(Path(mode.output), rows, against, rule, tick)
    sets = manifest["sets"]
    lines = [[name, *(line[column] for column in SET_COLUMNS)] for name, line in sets.items()]
    print(text_table(["evaluation set", *SET_COLUMNS], lines))
    print(counts_table(place(mode.output, manifest), manifest["rows"]))
    write_provenance(Path(cfg.paths.run_dir), provenance(cfg, manifest["key"]))
    hit = {f"{name}/{column}": line[column] for name, line in sets.items() for column in line}
    return count_metrics(manifest["rows"]) | hit | {"reused": float(manifest["reused"])}
