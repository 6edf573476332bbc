"""Whole runs that learn from their own samples, on a model of random weights: a second each."""

import json
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf

from callbacks.metrics_csv import read_metrics
from dataloader import LanguageData
from models.reference import ReferenceWeights
from modes import train
from online import OnlineAlgorithm
from opening import build_algorithm
from policy import ThoughtPolicy
from runtime.errors import Interrupted
from tests.runs import STATE, last
from tests.support import compose_config

# Times of day and memory differ between two runs that are the same.
UNLIKE = ("train/rollout_tokens_per_s", "train/judging_s", "train/available_mem_gib")
EXACT = (*STATE, "online")


def sums(folder: Path, rows: int = 40) -> Path:
    """Documents with a question and an answer; made once per folder."""
    path = folder / "sums.jsonl"
    if not path.is_file():
        lines = [
            {"id": str(n), "text": f"Question: {n % 7} + {n % 5} =\nAnswer: {n % 7 + n % 5}\n"}
            for n in range(rows)
        ]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def tiny_online(folder: Path) -> tuple[str, ...]:
    """Overrides of a run of six steps with four rollouts of each of four prefixes."""
    return (
        "algo=rlmt_paper", "model=tiny_thinker", "model.hidden_size=32",
        "model.num_hidden_layers=2", "model.num_attention_heads=2",
        "model.num_key_value_heads=1", "model.length=64", "data=prefix_suffix",
        f"data.files={sums(folder)}", "data.valid_fraction=0.2", "data.chunking.mode=marker",
        "data.chunking.marker=Answer:", "data.chunking.suffix_len=12", "reward=verifiable",
        "algo.thought_tokens=5", "algo.suffix_tokens=4", "algo.samples=4",
        "algo.attn_backend=math", "loader.global_batch_size=4", "training.ema=0",
        "optim.lr=1e-2", "lr_scheduler=cosine_warmup", "lr_scheduler.warmup_steps=2",
        "trainer=cpu", "trainer.max_steps=6", "trainer.val_check_interval=4",
        "trainer.log_every_n_steps=1", "trainer.enable_progress_bar=false",
        "+trainer.enable_model_summary=false", f"paths.cache_dir={folder}/cache",
    )  # fmt: skip


def configure(
    folder: Path, run_dir: Path, *overrides: str, reward: dict[str, int] | None = None
) -> DictConfig:
    """The configuration of a tiny run; letters are rewarded, with the options of `reward`."""
    cfg = compose_config(*tiny_online(folder), *overrides, run_dir=run_dir)
    letters = {"_target_": "tests.plugins.letters_reward.LettersReward", **(reward or {})}
    OmegaConf.update(cfg, "reward", letters, merge=False, force_add=True)
    return cfg


def fit(
    folder: Path, run_dir: Path, *overrides: str, reward: dict[str, int] | None = None
) -> dict[str, float]:
    """A tiny run through mode=train."""
    return train.run(configure(folder, run_dir, *overrides, reward=reward))


def interrupt(
    folder: Path, run_dir: Path, step: int, *overrides: str, reward: dict[str, int] | None = None
) -> None:
    """A tiny run that gets SIGTERM while it learns from the batch that ends with step `step`."""
    with signalled(step), pytest.raises(Interrupted) as stop:
        fit(folder, run_dir, *overrides, reward=reward)
    assert stop.value.step == step


@contextmanager
def signalled(step: int) -> Iterator[None]:
    """Inside, an online run of this process gets SIGTERM in the batch that ends with a step."""
    original = OnlineAlgorithm.training_step

    def training_step(self: OnlineAlgorithm, batch: dict[str, Any], batch_idx: int) -> Any:
        if self.trainer.global_step == step - self.config["algo"]["updates"]:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, batch_idx)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OnlineAlgorithm, "training_step", training_step)
        yield


def build(
    folder: Path, *overrides: str, reward: dict[str, int] | None = None
) -> tuple[ThoughtPolicy, dict[str, Any]]:
    """An algorithm at its first step, with a reference if it has one, and its first batch."""
    cfg = configure(folder, folder / "unused", *overrides, "algo.samples_every=0", reward=reward)
    torch.manual_seed(0)
    data = LanguageData(cfg)
    algorithm = build_algorithm(cfg, data)
    assert isinstance(algorithm, ThoughtPolicy)
    algorithm.trainer = SimpleNamespace(global_step=0, is_global_zero=True)
    options = algorithm.config["algo"]["reference"]
    if options is not None:
        algorithm.reference = ReferenceWeights(algorithm.trained_parameters(), **options)
    return algorithm, next(iter(data.train_loader(max_steps=1)))


def state(run_dir: Path) -> dict[str, Any]:
    """What a run would go on from."""
    content = last(run_dir)
    return {key: content[key] for key in EXACT if key in content}


def table(run_dir: Path) -> list[dict[str, float]]:
    """metrics.csv without what no two runs have in common."""
    rows = read_metrics(run_dir / "metrics.csv")
    return [{name: value for name, value in row.items() if name not in UNLIKE} for row in rows]


def report(run_dir: Path) -> dict[str, Any]:
    """metrics.json without times and memory."""
    found = json.loads((run_dir / "metrics.json").read_text())
    unlike = {name.removeprefix("train/") for name in UNLIKE}
    for row in (found["final"], *found["history"]):
        for name in unlike & row.keys():
            del row[name]
    del found["wall_time_s"], found["arm"]
    return found
