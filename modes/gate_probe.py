"""The thoughts that a reward gate puts in the place of a model's own (`mode.probe=true`)."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.errors import DataError
from data.files import read_objects
from data.fingerprint import files_fingerprint
from evaluation.gate_run import GatePrefix, Row, deranged
from runtime.errors import ConfigError

# Tokens by prefix id and number of the sample.
Thoughts = Mapping[tuple[str, int], Sequence[int]]


def probe_options(cfg: DictConfig) -> dict[str, Any]:
    """What a probe depends on, beside the rollouts."""
    teacher = cfg.mode.teacher
    return {
        "samples": cfg.mode.probe_samples or cfg.mode.samples,
        "generic": cfg.mode.generic,
        "teacher": None if teacher is None else files_fingerprint([Path(teacher)]),
    }


def check_probe(cfg: DictConfig) -> None:
    """See before anything is opened that the options of a probe can be.

    Raises:
        ConfigError: more samples than the gate has, a single prefix, or no file of a teacher.
    """
    mode = cfg.mode
    if not mode.probe:
        return
    if (mode.probe_samples or 0) > mode.samples:
        raise ConfigError(
            f"mode.probe_samples={mode.probe_samples}: allowed 1 .. mode.samples={mode.samples},"
            " null"
        )
    if mode.prefixes < 2:
        raise ConfigError(
            f"mode.prefixes={mode.prefixes}: a thought of another prefix needs one; allowed: an"
            " integer >= 2 with mode.probe=true"
        )
    if mode.teacher is not None and not Path(mode.teacher).is_file():
        raise ConfigError(
            f"mode.teacher={mode.teacher}: no such file; allowed: a .jsonl of rows"
            ' {"prefix": TEXT, "thought": TEXT}, null'
        )


def check_teacher(cfg: DictConfig, prefixes: Sequence[GatePrefix]) -> None:
    """See before anything is sampled that every prefix will have its thoughts.

    Raises:
        DataError: a prefix without a teacher's thought.
    """
    if cfg.mode.probe and cfg.mode.teacher is not None:
        teacher_thoughts(Path(cfg.mode.teacher), prefixes)


def other_thoughts(
    cfg: DictConfig,
    rows: Sequence[Row],
    prefixes: Sequence[GatePrefix],
    tokens: Callable[[str], list[int]],
) -> dict[str, Thoughts]:
    """Thoughts by condition (`evaluation.thought_probe`), without `own`.

    Args:
        cfg: with `mode.probe_samples`, `mode.generic` and `mode.teacher`.
        rows: the arm's own rollouts.
        prefixes: of them.
        tokens: of a text.
    """
    own = {(row["prefix_id"], row["k"]): row["thought_ids"] for row in rows}
    places = [place for place in own if place[1] < probe_options(cfg)["samples"]]
    other = deranged([prefix.id for prefix in prefixes], cfg.seed)
    generic = tokens(cfg.mode.generic)
    found: dict[str, Thoughts] = {
        "blank": {place: [] for place in places},
        "generic": {place: generic for place in places},
        "swapped": {(prefix_id, k): own[other[prefix_id], k] for prefix_id, k in places},
    }
    if cfg.mode.teacher is not None:
        texts = teacher_thoughts(Path(cfg.mode.teacher), prefixes)
        known = {prefix_id: tokens(text) for prefix_id, text in texts.items()}
        found["teacher"] = {place: known[place[0]] for place in places}
    return found


def teacher_thoughts(path: Path, prefixes: Sequence[GatePrefix]) -> dict[str, str]:
    """Thoughts by prefix id: rows {"prefix": TEXT, "thought": TEXT}.

    Raises:
        DataError: a row that is none, or a prefix without one.
    """
    by_text: dict[str, str] = {}
    for place, row in read_objects(path):
        if not isinstance(row.get("prefix"), str) or not isinstance(row.get("thought"), str):
            raise DataError(f'{place}: allowed: {{"prefix": TEXT, "thought": TEXT}}')
        by_text[row["prefix"]] = row["thought"]
    for prefix in prefixes:
        if prefix.prefix not in by_text:
            raise DataError(
                f"mode.teacher={path}: no thought for prefix {prefix.id!r}; allowed: a row for each"
                " prefix of partial/prefixes.jsonl, with the same text"
            )
    return {prefix.id: by_text[prefix.prefix] for prefix in prefixes}
