"""Runs that write blocks go on where they were left: after a signal, and from full states."""

import shutil

import pytest
import torch

from callbacks.metrics_csv import read_metrics
from checkpointing import load_full_state
from runtime.full_state import full_states, step_of
from tests.block_runs import fit, interrupt
from tests.runs import STATE, last
from tests.support import equal

EXACT = (*STATE, "eval_batches")
# Rows of 18 in global batches of 8: the stops are inside of an epoch and of a step's two parts.
RUNS = {
    "draft_refine": ("draft_refine", "refine.commit.threshold=0.2"),
    "nce": (
        "nce", "bon/proposal=softmax_sampling", "bon.score_agg=perround", "bon.rounds=2",
        "nce.blocks_per_row=5",
    ),
}  # fmt: skip
EVERY = "checkpointing.full_state_every_n_steps=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    fit(folder, folder / "start", "draft_refine", "trainer.max_steps=4")
    return folder


def chosen(folder, name):
    start = f"training.from_pretrained={folder}/start/checkpoints/last.ckpt"
    return (*RUNS[name], start, EVERY)


@pytest.fixture(scope="module")
def straight(folder):
    """Eight steps that nothing interrupted."""
    for name in RUNS:
        fit(folder, folder / name, *chosen(folder, name))
    return folder


def state(run_dir):
    content = last(run_dir)
    return {key: content[key] for key in EXACT if key in content}


def table(run_dir):
    return (run_dir / "metrics.csv").read_text()


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_is_the_unbroken_run(straight, tmp_path, name):
    run = chosen(straight, name)
    interrupt(straight, tmp_path, run[0], 5, *run[1:])
    assert last(tmp_path)["global_step"] == 5
    fit(straight, tmp_path, *run)
    assert equal(state(tmp_path), state(straight / name))
    assert table(tmp_path) == table(straight / name)
    assert bool(state(tmp_path).get("eval_batches")) == (name == "nce")


@pytest.mark.parametrize("name", RUNS)
def test_half_and_half_is_the_whole(straight, tmp_path, name):
    """From the full state of step 4, in a folder of its own."""
    four = full_states(straight / name / "checkpoints")[1]
    assert step_of(four) == 4
    resumed = f"checkpointing.resume_ckpt_path={four}"
    fit(straight, tmp_path, *chosen(straight, name), resumed)
    assert equal(state(tmp_path), state(straight / name))
    rows = [row for row in read_metrics(straight / name / "metrics.csv") if row["step"] > 4]
    assert read_metrics(tmp_path / "metrics.csv") == rows


@pytest.mark.parametrize("name", RUNS)
def test_a_full_state_opens_as_what_it_is(straight, tmp_path, name):
    folder = full_states(straight / name / "checkpoints")[-1]
    moved = tmp_path / "elsewhere"
    shutil.copytree(folder, moved)
    found, kept = load_full_state(moved), last(straight / name)
    assert found.step == 8 and found.meta["world_size"] == len(found.rng) == 1
    for key, value in found.model.state_dict().items():
        assert torch.equal(value, kept["state_dict"][key])
    assert equal(found.optimizer, kept["optimizer_states"][0])
    assert equal(found.scheduler, kept["lr_schedulers"][0])
    assert equal(found.eval_batches, kept.get("eval_batches", []))
    # What training would go on with takes the state over.
    optimizer = torch.optim.AdamW(found.model.parameter_groups(), lr=1.0, fused=True)
    optimizer.load_state_dict(found.optimizer)
    groups = {"draft_refine": 1, "nce": 2}[name]
    assert len(optimizer.param_groups) == groups and len(optimizer.state) > 10
    assert optimizer.param_groups[-1]["lr"] == found.optimizer["param_groups"][-1]["lr"]


def test_the_comparison_can_fail(straight):
    """Steps move the weights, and another name has other blocks."""
    for name in RUNS:
        states = full_states(straight / name / "checkpoints")
        assert [step_of(path) for path in states] == [2, 4, 6, 8]
        first, final = (load_full_state(states[place]) for place in (0, -1))
        assert not equal(first.model.state_dict(), final.model.state_dict())
        assert not equal(first.optimizer, final.optimizer)
        assert equal(first.eval_batches, final.eval_batches)
