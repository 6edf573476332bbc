"""Whole runs of the algorithms that write blocks, on a model of random weights: a second each."""

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from algorithm import Algorithm
from dataloader import LanguageData
from modes import train
from opening import build_algorithm
from refine import BlockModel
from runtime.errors import Interrupted
from tests.runs import EIGHT_STEPS
from tests.support import compose_config

# hidden_size 32: a step takes some ten milliseconds.
TARGET = (
    "model=tiny_causal", "model.hidden_size=32", "model.num_hidden_layers=2", "model.length=96",
    "model.num_attention_heads=2", "model.num_key_value_heads=1",
)  # fmt: skip
ALGORITHMS = {
    "sft_raw": ("algo=sft_raw",),
    "sft_thoughts": ("algo=sft_thoughts",),
    "masked_adapt": ("algo=masked_adapt",),
    "draft_refine": ("algo=draft_refine",),
    "nce": ("algo=nce",),
}


def answered(folder: Path, rows: int = 60) -> Path:
    """Short dialogues whose answers can be learned; made once per folder."""
    path = folder / "answered.jsonl"
    if not path.is_file():
        lines = [
            {"id": str(n), "source": "made", "prompt": f"{n}", "response": "ab" * (1 + n % 7) + "."}
            for n in range(rows)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def chat(folder: Path) -> tuple[str, ...]:
    """Overrides: about two dialogues to a row of 96."""
    return (
        "data=chat", f"data.files={answered(folder)}", "data.valid_fraction=0.2",
        "data.thinking=true", "data.align=4",
    )  # fmt: skip


def plain(folder: Path) -> tuple[str, ...]:
    """Overrides: several lines of text without prompts to a row, as experiment=block_text."""
    path = folder / "plain.txt"
    if not path.is_file():
        path.write_text("".join(f"line {n} {'xy' * (n % 5)}\n\n" for n in range(200)))
    return (
        "experiment=block_text", "data=text", f"data.files={path}", "data.valid_fraction=0.2",
        "data.split_paragraphs=true",
    )  # fmt: skip


def tiny_blocks(folder: Path, data: Callable[[Path], tuple[str, ...]] = chat) -> tuple[str, ...]:
    """Overrides of a tiny run with blocks of four."""
    return (
        *TARGET, *data(folder), "algo.attn_backend=math", f"paths.cache_dir={folder}/cache",
        *EIGHT_STEPS,
    )  # fmt: skip


def configure(
    folder: Path, run_dir: Path, name: str, *overrides: str, data: Any = chat
) -> DictConfig:
    """The configuration of a tiny run of an algorithm."""
    chosen = (*ALGORITHMS[name], *tiny_blocks(folder, data), *overrides)
    return compose_config(*chosen, run_dir=run_dir)


def fit(
    folder: Path, run_dir: Path, name: str, *overrides: str, data: Any = chat
) -> dict[str, float]:
    """A tiny run through mode=train."""
    return train.run(configure(folder, run_dir, name, *overrides, data=data))


def build(
    folder: Path, name: str, *overrides: str, step: int = 0, data: Any = chat
) -> tuple[Any, LanguageData, dict[str, Any]]:
    """An algorithm, its data, and the first micro-batch of its training, ready for the loss."""
    cfg = configure(folder, folder / "unused", name, *overrides, data=data)
    torch.manual_seed(0)
    rows = LanguageData(cfg)
    algorithm = build_algorithm(cfg, rows)
    return algorithm, rows, batch_of(algorithm, rows, step)


def batch_of(algorithm: Algorithm, data: LanguageData, step: int = 0) -> dict[str, Any]:
    """The first micro-batch of a training, as `on_before_batch_transfer` leaves it."""
    batch = next(iter(data.train_loader(max_steps=1, accumulate=2)))
    return prepared(algorithm, batch, step) if isinstance(algorithm, BlockModel) else batch


def prepared(algorithm: BlockModel, batch: dict[str, Any], step: int = 0) -> dict[str, Any]:
    """A micro-batch with its blocks and what is random in it."""
    batch = {**batch, "layout": algorithm.layout(batch)}
    batch["inputs"] = algorithm.corrupt(batch, step)
    return batch


def interrupt(
    folder: Path, run_dir: Path, name: str, step: int, *overrides: str, data: Any = chat
) -> None:
    """A tiny run that gets SIGTERM in the second micro-batch of optimiser step number `step`."""
    original, calls = Algorithm.training_step, []

    def training_step(self: Algorithm, batch: dict[str, Any], batch_idx: int) -> Any:
        calls.append(self.trainer.global_step == step - 1)
        if sum(calls) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Algorithm, "training_step", training_step)
        with pytest.raises(Interrupted) as stop:
            fit(folder, run_dir, name, *overrides, data=data)
    assert stop.value.step == step
