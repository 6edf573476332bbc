"""Runs of mode=reasoning_eval with a model of random weights: two tasks of reasoning-gym, two
problems, two samples of four tokens."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from runtime.validation import validate
from tests.benchmark_runs import gym
from tests.support import compose_config

SHORT = ("mode.limit=2", "mode.samples=2", "mode.max_new_tokens=4", "mode.arm=one")


def sampling(folder: Path, *overrides: str, **options: Any) -> DictConfig:
    """The configuration of a run, which is valid."""
    given = gym(*SHORT, *overrides, **options)
    kept = [text for text in given if text != "mode=benchmark_eval"]
    cfg = compose_config("mode=reasoning_eval", *kept, run_dir=folder)
    validate(cfg)
    return cfg
