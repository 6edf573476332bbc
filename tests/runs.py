"""Whole runs of the real algorithms on a few lines of text: half a second each."""

import functools
import os
import random
import runpy
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from lightning.fabric.utilities import registry
from omegaconf import DictConfig

from algorithm import LossTerms
from diffusion import Diffusion
from modes import train
from runtime.checkpoint import read_checkpoint
from runtime.errors import Interrupted
from tests.quick_hydra import remembering
from tests.support import ROOT, compose_config

ALGORITHMS = {"mdlm": ("algo=mdlm",), "bd3lm": ("algo=bd3lm", "block_size=4"), "ar": ("algo=ar",)}
TREES = ("data.source._target_=tests.plugins.toy_trees.TreeText",)
# Token weights in the schedule, resampled masks, and a search for their interval.
WEIGHTED = (
    *ALGORITHMS["bd3lm"], *TREES, "masking=dependency", "masking.mix_alpha=0.5",
    "masking.target=schedule", "training.resample=true", "algo.clip_search_widths=[0.5,0.75]",
    "algo.clip_search_delta=0.25",
)  # fmt: skip
# Two micro-batches per step, a moving average, a schedule that falls, two validations.
EIGHT_STEPS = (
    "training.ema=0.9", "loader.global_batch_size=8", "loader.batch_size=4", "optim.lr=1e-2",
    "lr_scheduler=cosine_warmup", "lr_scheduler.warmup_steps=3", "trainer=cpu",
    "trainer.max_steps=8", "trainer.val_check_interval=4", "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false", "+trainer.enable_model_summary=false",
    "checkpointing.every_n_steps=3",
)  # fmt: skip
# Everything that a resumed run must have in common with an unbroken one.
STATE = (
    "state_dict", "optimizer_states", "lr_schedulers", "ema", "random_states", "global_step",
    "sampling_interval",
)  # fmt: skip


_draw_curves, _drawn = train.plot_curves, []


def _curves(run_dir: Path) -> Path | None:
    """Those of the first run are drawn, those of others are a copy: a fifth of their time."""
    if _drawn and (run_dir / "metrics.csv").is_file():
        (run_dir / "curves.png").write_bytes(_drawn[0])
        return run_dir / "curves.png"
    path = _draw_curves(run_dir)
    if path is not None:
        _drawn.append(path.read_bytes())
    return path


train.plot_curves = _curves
# Each trainer looks through all installed packages for callbacks.
registry.entry_points = functools.cache(registry.entry_points)


def write_corpus(folder: Path, lines: int = 52, seed: int = 0) -> Path:
    """Lines of 2 to 13 words: padded to rows of 16 they have very different numbers of tokens."""
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(30)]
    text = [" ".join(draw.choices(words, k=draw.randint(2, 13))) for _ in range(lines)]
    path = folder / "corpus.txt"
    path.write_text("\n".join(text) + "\n")
    return path


def tiny(folder: Path) -> tuple[str, ...]:
    """Overrides of a tiny run on the corpus in `folder`: about 40 rows, 5 steps per
    epoch, dropout."""
    corpus = folder / "corpus.txt"
    if not corpus.is_file():
        write_corpus(folder)
    return (
        "data=text", f"data.files={corpus}", "data.tokenizer_name_or_path=word", "data.wrap=false",
        "data.valid_fraction=0.2",
        f"paths.cache_dir={folder}/cache", "model.length=16", "model.hidden_size=16",
        "model.n_blocks=2", "model.n_heads=2", "model.cond_dim=8", "model.dropout=0.1",
        "model.attn_backend=math", *EIGHT_STEPS,
    )  # fmt: skip


def configure(folder: Path, run_dir: Path, *overrides: str) -> DictConfig:
    """The configuration of a tiny run."""
    return compose_config(*tiny(folder), *overrides, run_dir=run_dir)


def fit(folder: Path, run_dir: Path, *overrides: str) -> dict[str, float]:
    """A tiny run through mode=train."""
    return train.run(configure(folder, run_dir, *overrides))


def interrupt(folder: Path, run_dir: Path, step: int, *overrides: str) -> None:
    """A tiny run that gets SIGTERM in the middle of optimiser step number `step`."""
    with terminate_during(step), pytest.raises(Interrupted) as stop:
        fit(folder, run_dir, *overrides)
    assert stop.value.step == step


@contextmanager
def terminate_during(step: int) -> Iterator[None]:
    """Inside, a run of this process sends itself SIGTERM during optimiser step number `step`."""
    original, sent = Diffusion.loss_terms, []

    def loss_terms(self: Diffusion, batch: dict[str, Any]) -> LossTerms:
        if self.trainer.global_step == step - 1 and not sent:
            sent.append(True)
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Diffusion, "loss_terms", loss_terms)
        yield
    assert sent


def last(run_dir: Path) -> dict[str, Any]:
    """The content of last.ckpt."""
    return read_checkpoint(run_dir / "checkpoints" / "last.ckpt")


def best(run_dir: Path) -> Path:
    """The path of best.ckpt."""
    return run_dir / "checkpoints" / "best.ckpt"


def state(run_dir: Path) -> dict[str, Any]:
    """The state that the run would go on from."""
    content = last(run_dir)
    return {key: content[key] for key in STATE if key in content}


def call_main(arguments: Sequence[str]) -> int:
    """`python main.py ARGUMENTS` inside this process; returns the exit code."""
    with remembering(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["main.py", *arguments])
        GlobalHydra.instance().clear()
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "main.py"), run_name="__main__")
        HydraConfig.instance().cfg = None
        return end.value.code
