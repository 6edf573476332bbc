"""Two ranks equal one: gradient, weights, metrics, resume; and they fail together.

The ranks are forked, which saves starting Python twice, and do everything in one process group.
"""

import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as multiprocessing

from callbacks.metrics_csv import read_metrics
from runtime.errors import NonFiniteError
from tests.runs import ALGORITHMS, TREES, WEIGHTED, fit, interrupt, last, state
from tests.support import equal
from tests.test_algorithm import UNCUT, Sabotage, gradient, largest_difference, snapshot

DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=8",
       "trainer.val_check_interval=4", "trainer.log_every_n_steps=1",
       "trainer.enable_progress_bar=false")  # fmt: skip
ONE_STEP = ("trainer.max_steps=1", "trainer.gradient_clip_val=null")
THREE_STEPS = ("trainer.max_steps=3", "optim.lr=1e-3")
RUNS = {**ALGORITHMS, "weighted": WEIGHTED}
TWO = ("mdlm", "bd3lm", "weighted")


def launch(job: Callable[..., None], *arguments: object) -> None:
    """Run `job(rank, *arguments)` on two ranks that see each other, and wait for both."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.start_processes(
        _rank, (port, job, arguments), nprocs=2, start_method="fork", join=True
    )


def _rank(rank: int, port: int, job: Callable[..., None], arguments: tuple) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_RANK=str(rank), WORLD_SIZE="2"
    )
    torch.set_num_threads(1)  # the threads of the parent do not exist here
    job(rank, *arguments)


def train_everything(rank: int, folder: Path, out: Path) -> None:
    """All runs of this file on two ranks; rank 0 leaves the files, both leave `rank*.pt`."""
    warnings.simplefilter("error", UserWarning)
    for name in TWO:
        overrides = (*RUNS[name], *DDP)
        fit(folder, out / f"{name}-gradient", *overrides, *UNCUT, "loader.batch_size=2", *ONE_STEP)
        fit(folder, out / f"{name}-steps", *overrides, *UNCUT, "loader.batch_size=4", *THREE_STEPS)
        # Dropout, and two micro-batches per rank and step.
        dropped = (*overrides, "loader.batch_size=2")
        fit(folder, out / f"{name}-straight", *dropped)
        interrupt(folder, out / f"{name}-resumed", 5, *dropped)
        fit(folder, out / f"{name}-resumed", *dropped)
    for what in ("loss", "gradient"):
        spoil(rank, folder, out, what)


def spoil(rank: int, folder: Path, out: Path, what: str) -> None:
    """A run whose rank 1 meets a bad row in step 2; what both ranks say and hold goes to a file."""
    with pytest.MonkeyPatch.context() as patch:
        sabotage = Sabotage(patch, what if rank == 1 else "nothing", step=2)
        with pytest.raises(NonFiniteError) as error:
            fit(folder, out / what, *ALGORITHMS["mdlm"], *DDP, "loader.batch_size=4")
    found = {
        "message": str(error.value), "rows": sabotage.rows, "bad": sabotage.bad,
        "untouched": equal(snapshot(sabotage.model), sabotage.before),
        "weights": sabotage.before["weights"],
    }  # fmt: skip
    torch.save(found, out / f"{what}-rank{rank}.pt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder) -> Path:
    for data in ((), TREES):
        fit(folder, folder / "cache", *data, "trainer.max_steps=1", "callbacks=none", "logger=none")
    launch(train_everything, folder, folder / "two")
    return folder / "two"


@pytest.mark.parametrize("name", TWO)
def test_one_rank_and_two_take_the_same_steps(folder, two, tmp_path, name):
    fit(folder, tmp_path / "gradient", *RUNS[name], *UNCUT, *ONE_STEP)
    found, expected = gradient(two / f"{name}-gradient"), gradient(tmp_path / "gradient")
    assert largest_difference(found, expected) < 1e-6
    fit(folder, tmp_path / "steps", *RUNS[name], *UNCUT, *THREE_STEPS)
    weights, others = (
        list(last(run)["state_dict"].values())
        for run in (tmp_path / "steps", two / f"{name}-steps")
    )
    assert largest_difference(weights, others) < 1e-6
    rows = [
        read_metrics(run / "metrics.csv") for run in (tmp_path / "steps", two / f"{name}-steps")
    ]
    assert "val/nll" in rows[0][-1] and len(rows[0]) == 4
    for row, other in zip(*rows, strict=True):
        assert row == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("name", TWO)
def test_stopped_and_resumed_equals_straight(two, name):
    straight, resumed = two / f"{name}-straight", two / f"{name}-resumed"
    assert equal(state(resumed), state(straight))
    assert len(state(straight)["random_states"]) == 2
    assert (resumed / "metrics.csv").read_text() == (straight / "metrics.csv").read_text()


def test_ranks_draw_different_dropout(two):
    first, second = state(two / "mdlm-straight")["random_states"]
    assert not torch.equal(first["torch"], second["torch"])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_step_that_is_bad_on_one_rank_is_refused_by_both(two, what):
    found = [torch.load(two / f"{what}-rank{rank}.pt", weights_only=True) for rank in (0, 1)]
    rows = [found[1]["bad"]] if what == "loss" else found[0]["rows"] + found[1]["rows"]
    for rank in found:
        assert rank["message"] == (
            f"non-finite {what} at step 2, rows {rows}: the step was not applied"
        )
        assert rank["untouched"]
    assert equal(found[0]["weights"], found[1]["weights"])
