"""Runs of mode=benchmark_eval with a model of random weights on two tasks of reasoning-gym."""

import json
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from runtime.validation import validate
from tests.support import compose_config

GYM = "benchmark.reasoning_gym"
# Two tasks of ten stay.
DROPPED = ("products", "simple_equations", "gsm_symbolic", "spell_backward", "letter_counting",
           "calendar_arithmetic", "family_relationships", "sentence_reordering")  # fmt: skip
TOY = "tests.plugins.toy_benchmark.LastWordGrader"
TINY = ("model=tiny_causal", "model.num_hidden_layers=2", "model.dtype=float64", "trainer=cpu")
OPTIONS = (
    "mode=benchmark_eval", f"{GYM}.prompts.held_out_size=6", f"{GYM}.exemplars.train_size=2",
    *(f"~{GYM}.prompts.tasks.{task}" for task in DROPPED),
    f"{GYM}.grader={{_target_:{TOY}}}", f"{GYM}.max_new_tokens=20", "mode.batch_size=4",
)  # fmt: skip


def gym(
    *overrides: str, which: str = "benchmark=reasoning_gym", model: tuple[str, ...] = TINY
) -> tuple[str, ...]:
    """The arguments of a run."""
    return (which, *OPTIONS, *model, *overrides)


def configured(folder: Path, *overrides: str, **options: Any) -> DictConfig:
    """Its configuration, which is valid."""
    cfg = compose_config(*gym(*overrides, **options), run_dir=folder)
    validate(cfg)
    return cfg


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
