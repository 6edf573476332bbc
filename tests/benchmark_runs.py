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


def toy_grader(benchmark: str) -> tuple[str, str]:
    """In the place of a benchmark's own, of which no option is left."""
    return f"~{benchmark}.grader", f"+{benchmark}.grader={{_target_:{TOY}}}"


OPTIONS = (
    "mode=benchmark_eval", f"{GYM}.prompts.held_out_size=6", f"{GYM}.exemplars.train_size=2",
    *(f"~{GYM}.prompts.tasks.{task}" for task in DROPPED),
    *toy_grader(GYM), f"{GYM}.max_new_tokens=20", "mode.batch_size=4",
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


def gsm8k_files(folder: Path) -> tuple[str, ...]:
    """Six exemplars and five items of GSM8K as files, and the arguments for them."""
    for name, start, count in (("train", 0, 6), ("test", 100, 5)):
        rows = [
            {"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"}
            for n in range(start, start + count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return (
        f"benchmark.gsm8k.prompts.table.files={folder}/test.jsonl",
        f"benchmark.gsm8k.exemplars.table.files={folder}/train.jsonl",
        *toy_grader("benchmark.gsm8k"), "benchmark.gsm8k.max_new_tokens=8",
    )  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
