"""mode=subtract: the rows of mode.input whose prompts do not occur in mode.against."""

from pathlib import Path

from omegaconf import DictConfig

from data.manifest import row_files
from data.near import NearRule
from data.subtract import AGAINST, INPUT, subtract
from evaluation.row_counts import count_metrics, counts_table, place
from runtime.checkpoint import provenance
from runtime.config import instantiate
from runtime.errors import ConfigError
from runtime.progress import counting
from runtime.run import write_provenance


def run(cfg: DictConfig) -> dict[str, float]:
    """Write what is left to `mode.output`, and print what was removed from which source.

    Returns:
        Rows in, out and removed by reason; rows in and out by source; prompts of `mode.against`;
        whether outputs of the same key were kept.

    Raises:
        ConfigError: neither `mode.against` nor `mode.within` is given.
    """
    mode = cfg.mode
    if not mode.against and not mode.within:
        raise ConfigError(
            "mode.against=[]: there is nothing to subtract; allowed: files, globs, or"
            " mode.within=true for repetitions inside mode.input"
        )
    rows = row_files(mode.input, INPUT)
    against = row_files(mode.against, AGAINST) if mode.against else []
    rule: NearRule | None = instantiate(mode.near) if mode.near is not None else None
    with counting("subtracting", "rows") as tick:
        manifest = subtract(Path(mode.output), rows, against, rule, mode.within, tick)
    print(counts_table(place(mode.output, manifest), manifest["rows"]))
    write_provenance(Path(cfg.paths.run_dir), provenance(cfg, manifest["key"]))
    seen = {f"against/{name}": count for name, count in manifest["against"].items()}
    return count_metrics(manifest["rows"]) | seen | {"reused": float(manifest["reused"])}
