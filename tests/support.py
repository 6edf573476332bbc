"""What several tests need: a composed configuration, the toy training mode, a command line."""

import functools
import os
import pickle
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from tests.quick_hydra import remembering

ROOT = Path(__file__).resolve().parents[1]
# Data that is measured on but no part of the project.
SHARED = Path(os.environ.get("PALIMPSEST_SHARED", ROOT.parent / "shared"))
ENGLISH = SHARED / "data" / "ud_english_ewt" / "dev.conllu"
needs_english = pytest.mark.skipif(
    not ENGLISH.is_file(), reason=f"no {ENGLISH}; PALIMPSEST_SHARED names the folder of such data"
)

TOY = (
    "mode._target_=tests.plugins.toy_train.run",
    "+mode.fail_at=-1",
    "+mode.pause=0",
    "trainer=cpu",
    "trainer.max_steps=10",
    "trainer.val_check_interval=4",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
    "+trainer.enable_model_summary=false",
    "~callbacks.progress",
    "loader.global_batch_size=8",
    "loader.batch_size=4",
    "checkpointing.every_n_steps=3",
)


def compose_config(*overrides: str, run_dir: Path | str = "outputs/test") -> DictConfig:
    """The configuration that `main.py` would compose, with a fixed run folder.

    As Hydra does it: the files of the chosen options make a configuration, and values change it.
    The former takes a tenth of a second or two, and is kept; the latter a hundredth.
    """
    given = [f"paths.run_dir={run_dir}", *overrides]
    values = [text for text in given if not _chooses_a_file(text)]
    cfg = pickle.loads(_chosen(*(text for text in given if _chooses_a_file(text))))
    ConfigLoaderImpl._apply_overrides_to_config([_parsed(text) for text in values], cfg)
    return cfg


def plainly_composed(*overrides: str) -> DictConfig:
    """The configuration that Hydra composes."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", list(overrides))


@functools.lru_cache(maxsize=512)
def _chosen(*overrides: str) -> bytes:
    with remembering():
        return pickle.dumps(plainly_composed(*overrides))


@functools.lru_cache(maxsize=10_000)
def _parsed(override: str) -> Override:
    return OverridesParser.create().parse_override(override)


def _chooses_a_file(override: str) -> bool:
    key = override.partition("=")[0].lstrip("+~").partition("@")[0]
    return key.startswith("hydra.") or (ROOT / "configs" / key).is_dir()


def toy_config(run_dir: Path, *overrides: str) -> DictConfig:
    """The configuration of a toy run of ten steps with two micro-batches each."""
    return compose_config(*TOY, *overrides, run_dir=run_dir)


def command(*arguments: str) -> list[str]:
    """`python main.py` with arguments."""
    return [sys.executable, str(ROOT / "main.py"), *arguments]


def run_main(*arguments: str, cwd: Path = ROOT, **variables: str) -> subprocess.CompletedProcess:
    """Run `python main.py` to its end."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(**variables),
        capture_output=True,
        text=True,
        timeout=120,
    )


def environment(**variables: str) -> dict[str, str]:
    """The environment of a subprocess: one thread, no variable of a surrounding distributed run."""
    dropped = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "SLURM_PROCID", "HYDRA_FULL_ERROR"}
    kept = {key: value for key, value in os.environ.items() if key not in dropped}
    return {**kept, "OMP_NUM_THREADS": "1", **variables}


def equal(a: Any, b: Any) -> bool:
    """Exact equality of nested values with tensors in them."""
    import torch

    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, Sequence) and not isinstance(a, str):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b
