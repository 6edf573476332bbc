"""k steps, stop, resume to N equals N steps: weights, optimiser, random state, metrics."""

import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import DictConfig

from callbacks.checkpoints import BestAndLast
from callbacks.exact_resume import (
    capture_random_state,
    loop_position,
    restore_random_state,
    seed_rank,
)
from callbacks.graceful_stop import GracefulStop
from callbacks.metrics_csv import read_metrics
from runtime.checkpoint import read_checkpoint
from runtime.errors import Interrupted
from tests.plugins import toy_train
from tests.support import equal, toy_config

COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "random_states", "global_step")


def state(run_dir: Path) -> dict:
    content = read_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    return {key: content[key] for key in COMPARED}


def logged_steps(run_dir: Path) -> list[int]:
    return [int(row["step"]) for row in read_metrics(run_dir / "metrics.csv")]


def interrupt(cfg: DictConfig, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Train until GracefulStop sees a signal that arrived during `step`."""

    def told(self: GracefulStop, trainer) -> tuple[int, int]:
        return (signal.SIGTERM if trainer.global_step == step else 0), 0

    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "_agreed", told)
        with pytest.raises(Interrupted) as stop:
            toy_train.run(cfg)
    assert stop.value.step == step


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    toy_train.run(toy_config(run_dir))
    return run_dir


# 4 and 8 have a validation after them, 3 a scheduled last.ckpt, 9 is the last step but one.
@pytest.mark.parametrize("step", [1, 3, 4, 7, 8, 9])
def test_stopped_and_resumed_equals_straight(straight, tmp_path, monkeypatch, step):
    cfg = toy_config(tmp_path)
    interrupt(cfg, monkeypatch, step)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == step
    metrics = toy_train.run(cfg)
    assert metrics["steps"] == 10
    assert equal(state(tmp_path), state(straight))
    assert (tmp_path / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


def test_resumed_twice_with_workers(straight, tmp_path, monkeypatch):
    cfg = toy_config(tmp_path, "loader.num_workers=2")
    interrupt(cfg, monkeypatch, 2)
    interrupt(cfg, monkeypatch, 5)
    toy_train.run(cfg)
    assert equal(state(tmp_path), state(straight))
    assert (tmp_path / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


def test_killed_after_a_checkpoint_makes_the_lost_rows_again(straight, tmp_path, monkeypatch):
    """A kill at step 8 leaves last.ckpt of step 6 and rows up to step 8."""

    class Killed(BaseException):
        pass

    def die(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == 8:
            raise Killed

    cfg = toy_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(GracefulStop, "on_train_batch_start", die)
        with pytest.raises(Killed):
            toy_train.run(cfg)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 6
    assert "8,,," in (tmp_path / "metrics.csv").read_text()
    toy_train.run(cfg)
    assert equal(state(tmp_path), state(straight))
    assert (tmp_path / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


def test_resume_from_best_which_was_saved_inside_a_validation(straight, tmp_path, monkeypatch):
    interrupt(toy_config(tmp_path / "a"), monkeypatch, 9)
    best = tmp_path / "a" / "checkpoints" / "best.ckpt"
    assert read_checkpoint(best)["global_step"] == 8
    toy_train.run(toy_config(tmp_path / "b", f"checkpointing.resume_ckpt_path={best}"))
    assert equal(state(tmp_path / "b"), state(straight))


def test_other_accumulation_continues_at_the_same_step(tmp_path, monkeypatch):
    interrupt(toy_config(tmp_path), monkeypatch, 5)
    metrics = toy_train.run(toy_config(tmp_path, "loader.batch_size=2"))
    assert metrics["steps"] == 10
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 4, 5, 6, 7, 8, 8, 9, 10, 10]


def test_a_finished_run_does_nothing_and_keeps_its_metrics(straight, tmp_path):
    before, table = state(straight), (straight / "metrics.csv").read_text()
    metrics = toy_train.run(toy_config(straight))
    assert metrics["steps"] == 10 and "val/nll" in metrics and "tokens_per_s" not in metrics
    assert equal(state(straight), before) and (straight / "metrics.csv").read_text() == table


def test_a_longer_run_goes_on_from_a_finished_one(tmp_path):
    toy_train.run(toy_config(tmp_path, "trainer.max_steps=6"))
    metrics = toy_train.run(toy_config(tmp_path))
    assert metrics["steps"] == 10
    assert logged_steps(tmp_path) == [1, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8, 9, 10, 10]


def test_best_score_survives_resume(tmp_path):
    first = BestAndLast(tmp_path)
    first.best_score, first.best_step = 0.25, 40
    second = BestAndLast(tmp_path)
    second.load_state_dict(first.state_dict())
    assert (second.best_score, second.best_step) == (0.25, 40)


def test_dropout_would_differ_without_the_saved_generators(straight, tmp_path, monkeypatch):
    """The check above can fail: without the random state the resumed run is another one."""
    cfg = toy_config(tmp_path)
    interrupt(cfg, monkeypatch, 5)
    monkeypatch.setattr("callbacks.exact_resume.restore_random_state", lambda state: None)
    toy_train.run(cfg)
    assert not equal(state(tmp_path)["state_dict"], state(straight)["state_dict"])


def test_random_state_round_trip_as_plain_values(tmp_path):
    seed_rank(3, 0, 0)
    torch.rand(5), random.gauss(0, 1), np.random.standard_normal()
    torch.save({"rng": capture_random_state()}, tmp_path / "state.pt")
    expected = torch.rand(3), random.gauss(0, 1), np.random.standard_normal()
    restore_random_state(torch.load(tmp_path / "state.pt", weights_only=True)["rng"])
    found = torch.rand(3), random.gauss(0, 1), np.random.standard_normal()
    assert torch.equal(found[0], expected[0]) and found[1:] == expected[1:]


def test_ranks_and_steps_have_their_own_streams():
    drawn = set()
    for seed, rank, step in [(1, 0, 0), (1, 1, 0), (1, 0, 1), (2, 0, 0), (1, 0, 0)]:
        seed_rank(seed, rank, step)
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 4


def test_loop_position_names_counters_that_lightning_has(straight):
    loops = torch.load(
        straight / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=True
    )["loops"]["fit_loop"]
    for name, value in loop_position(3, 2).items():
        assert name in loops and set(value) <= set(loops[name]), name
