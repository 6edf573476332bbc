"""mode=gate_table: the reward gate anew from its rollouts: `mode.runs=[host1,host2]`."""

from pathlib import Path

from omegaconf import DictConfig

from evaluation.gate import gate
from modes.compare import run_folders, show_list
from modes.gate_arms import require_arms
from modes.gate_folder import ARMS, compared, metrics_of, read_arms, read_probes, write_results
from runtime.errors import ConfigError


def run(cfg: DictConfig) -> dict[str, float]:
    """Count the rollouts in the folders of `mode.runs`, whatever hosts they are from.

    Only the rows in `arms/` and `probe/` are counted: no model, no judge, no summary. By the
    conditions.json of several folders it is seen that one judge gave all rewards, and what else is
    unlike is said. Writes gate.json, gate.md and gate.png, and thought_probe.json and .md if there
    are rows of it.

    Returns:
        as mode=reward_gate.

    Raises:
        ConfigError: folders without rollouts, or an arm that is named and not there.
        DataError: a row that is none, arms that are there twice, lack samples, saw other
            prefixes, or had another judge.
    """
    out, patterns = Path(cfg.paths.run_dir), cfg.mode.runs
    listed = [patterns] if isinstance(patterns, str) else list(patterns)
    # The folder of the table itself may be that of the gate.
    folders = [out] if listed == [str(out)] else run_folders(listed, Path())
    arms = read_arms(folders, list(cfg.mode.order))
    if not arms:
        raise ConfigError(
            f"mode.runs={show_list(patterns)}: no {ARMS}/ARM.jsonl there; allowed: folders of"
            " mode=reward_gate"
        )
    require_arms(cfg, list(arms))
    found = gate(arms, cfg.mode.base_arm, cfg.mode.phase3_arm, (cfg.mode.open, cfg.mode.close))
    table = write_results(
        out,
        read_probes(folders, arms),
        found,
        [*compared(folders), f"runs: {', '.join(map(str, folders))}"],
    )
    return metrics_of(found, table)
