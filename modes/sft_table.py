"""mode=sft_table: arms of supervised fine-tuning side by side: `mode.runs=[raw,think]`."""

from pathlib import Path

from omegaconf import DictConfig

from evaluation.benchmark_report import markdown
from evaluation.sft_table import NOTES, evidence_table, remarks, sft_table
from evaluation.tables import text_table
from modes.benchmark_folder import read_json
from modes.compare import run_folders, show_list
from modes.sft_eval import METRICS
from runtime.errors import ConfigError
from runtime.run import write_json

ALLOWED = "folders of finished mode=sft_eval runs, or their metrics.json"


def run(cfg: DictConfig) -> dict[str, float]:
    """Put the arms of `mode.runs` into one table, in the order given.

    Writes sft_table.md and .json.

    Returns:
        `WHAT/ARM` of every arm, WHAT a column of the table.

    Raises:
        ConfigError: no such run.
        DataError: runs that make no table.
    """
    out, patterns = Path(cfg.paths.run_dir), cfg.mode.runs
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    files: list[Path] = []
    for pattern in listed:
        is_file = pattern.endswith(".json")
        found = [Path(pattern)] if is_file else [x / METRICS for x in run_folders([pattern], out)]
        files += found
    if not files:
        raise ConfigError(f"mode.runs={show_list(patterns)}: nothing there; allowed: {ALLOWED}")
    arms = [read_json(file.expanduser(), ALLOWED) for file in dict.fromkeys(files)]
    tables = [sft_table(arms), evidence_table(arms)]
    out.mkdir(parents=True, exist_ok=True)
    lines = "\n".join(f"{markdown(*table)}\n" for table in tables)
    sources = ", ".join(map(str, files))
    notes = "\n\n".join([NOTES, *remarks(arms)])
    (out / "sft_table.md").write_text(f"{lines}\n{notes}\n\nRuns: {sources}\n", encoding="utf-8")
    write_json(out / "sft_table.json", {"arms": arms, "notes": remarks(arms)})
    print("\n\n".join(text_table(*table) for table in tables) + "\n" + notes)
    return {
        f"{name}/{arm['arm']}": value
        for arm in arms
        for name, value in arm.items()
        if isinstance(value, int | float)
    }
