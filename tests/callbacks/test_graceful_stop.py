"""Signals: one stops at a step boundary, two at once; handlers are given back; exit codes."""

import os
import signal
import time
from pathlib import Path

import pytest

from callbacks.graceful_stop import GracefulStop
from callbacks.metrics_csv import read_metrics
from runtime.checkpoint import read_checkpoint
from runtime.errors import Interrupted
from runtime.run import load_summary
from tests.forks import Fork, start_main
from tests.plugins import toy_train
from tests.support import TOY, toy_config
from tests.test_two_ranks import launch


class Trainer:
    """As much of a trainer as the callback looks at."""

    world_size = 1
    accumulate_grad_batches = 2
    global_step = 7

    is_global_zero = True

    def save_checkpoint(self, path: Path) -> None:
        path.write_text(f"step {self.global_step}")


@pytest.fixture
def stop(tmp_path):
    callback = GracefulStop(tmp_path)
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    callback.on_train_start(Trainer(), None)
    yield callback
    callback.on_train_end(Trainer(), None)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stops_only_between_two_optimiser_steps(stop, tmp_path, number):
    trainer = Trainer()
    os.kill(os.getpid(), number)
    stop.on_train_batch_start(trainer, None, None, batch_idx=13)
    assert not list(tmp_path.iterdir())
    with pytest.raises(Interrupted) as caught:
        stop.on_train_batch_start(trainer, None, None, batch_idx=14)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
    assert (tmp_path / "last.ckpt").read_text() == "step 7"
    assert (caught.value.exit_code, caught.value.step) == (128 + number, 7)


def test_a_warning_of_slurm_waits_for_the_boundary_and_reaches_its_handler(tmp_path):
    """Saved first, then requeued by whoever had the signal; training goes on until SIGTERM."""
    calls = []

    def requeue(number, frame):
        calls.append((number, (tmp_path / "last.ckpt").is_file()))

    before = signal.signal(signal.SIGUSR1, requeue)
    try:
        callback = GracefulStop(tmp_path)
        callback.on_train_start(Trainer(), None)
        os.kill(os.getpid(), signal.SIGUSR1)
        callback.on_train_batch_start(Trainer(), None, None, batch_idx=13)
        assert calls == []
        for batch in (14, 16):
            callback.on_train_batch_start(Trainer(), None, None, batch_idx=batch)
        assert calls == [(signal.SIGUSR1, True)]
        callback.on_train_end(Trainer(), None)
        assert signal.getsignal(signal.SIGUSR1) is requeue
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_second_signal_stops_at_once(stop):
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted):
        os.kill(os.getpid(), signal.SIGINT)


def test_nothing_is_saved_before_the_first_step(stop, tmp_path):
    trainer = Trainer()
    trainer.global_step = 0
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted):
        stop.on_train_batch_start(trainer, None, None, batch_idx=0)
    assert not list(tmp_path.iterdir())


def test_no_handler_is_left_after_a_failed_run(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with pytest.raises(RuntimeError, match="non-finite loss at step 2"):
        toy_train.run(toy_config(tmp_path, "mode.fail_at=2"))
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def start(run_dir: Path, *overrides: str) -> Fork:
    """Start a slow toy run, and wait until it has logged its second step."""
    arguments = (*TOY, f"paths.run_dir={run_dir}", "mode.pause=0.1", *overrides)
    process = start_main(*arguments, said=run_dir / "said.txt")
    table, deadline = run_dir / "metrics.csv", time.monotonic() + 90
    while not (table.is_file() and len(read_metrics(table)) >= 2):
        assert process.is_alive(), process.errors()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return process


@pytest.mark.timeout(180)
def test_sigterm_saves_exits_143_and_resumes_exactly(tmp_path):
    process = start(tmp_path)
    process.terminate()
    assert process.wait() == 143
    assert process.errors().strip().splitlines()[-1] == "Interrupted: stopped by SIGTERM"
    summary = load_summary(tmp_path)
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"]
    assert summary["status"] == "interrupted" and summary["steps"] == saved >= 2

    toy_train.run(toy_config(tmp_path))
    straight = tmp_path / "straight"
    toy_train.run(toy_config(straight))
    assert (tmp_path / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


@pytest.mark.timeout(180)
def test_ctrl_c_with_loader_workers_exits_130(tmp_path):
    process = start(tmp_path, "loader.num_workers=1")
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to the workers too
    assert process.wait() == 130, process.errors()
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] >= 2


def go_on(rank: int, run_dir: Path, *overrides: str) -> None:
    toy_train.run(toy_config(run_dir, *overrides))


@pytest.mark.timeout(180)
def test_two_ranks_stop_together_when_one_is_told(tmp_path):
    two = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "loader.batch_size=2")
    process = start(tmp_path, *two)  # which starts the other rank
    process.terminate()  # rank 0 only
    assert process.wait() == 143, process.errors()
    saved = read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")
    assert len(saved["random_states"]) == 2 and saved["global_step"] < 10

    launch(go_on, tmp_path, *two)
    assert read_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"] == 10
    rows = read_metrics(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows if "lr" in row] == list(range(1, 11))
