"""Whole training runs: exact resume, kills, schedules, determinism, precision, sweeps."""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from callbacks.metrics_csv import read_metrics
from data.errors import DataError
from modes.ppl_eval import run as evaluate
from runtime.checkpoint import read_checkpoint
from runtime.run import SUMMARY_KEYS, load_summary
from tests.runs import (
    ALGORITHMS,
    TREES,
    WEIGHTED,
    best,
    call_main,
    fit,
    interrupt,
    last,
    state,
    terminate_during,
    tiny,
)
from tests.support import compose_config, equal

RESAMPLED = (*ALGORITHMS["bd3lm"], "training.resample=true", "training.sampling_eps_min=0.3",
             "training.sampling_eps_max=0.8")  # fmt: skip
STREAMED = (*ALGORITHMS["mdlm"], "data.streaming=true")
RUNS = {
    **ALGORITHMS, "resampled": RESAMPLED, "streamed": STREAMED, "weighted": WEIGHTED,
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("training")


@pytest.fixture(scope="module")
def straight(folder):
    """Runs that nothing interrupted, each made when first asked for."""

    def run(name: str) -> Path:
        run_dir = folder / "straight" / name
        if not run_dir.exists():
            fit(folder, run_dir, *RUNS[name])
        return run_dir

    return run


def start_child(job: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    """Start `job` in a forked process: a kill is its own, and its loader workers end with it."""

    def run() -> None:
        torch.set_num_threads(1)  # the threads of the parent do not exist here
        job(*arguments)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def in_child(job: Callable[..., object], *arguments: object) -> None:
    process = start_child(job, *arguments)
    process.join()
    assert process.exitcode == 0


def table(run_dir: Path) -> str:
    return (run_dir / "metrics.csv").read_text()


# 39 rows in global batches of 8 make an epoch of 4 steps, where a validation is due as well; 3 and
# 6 have a scheduled last.ckpt behind them.
@pytest.mark.parametrize(
    ("name", "steps", "workers"),
    [
        ("mdlm", [1], 0),
        ("mdlm", [4], 0),
        ("mdlm", [2, 6], 2),
        ("bd3lm", [3], 0),
        ("bd3lm", [4, 7], 0),
        ("bd3lm", [5], 2),
        ("ar", [6], 0),
        ("resampled", [5], 0),
        ("streamed", [5], 0),
        ("weighted", [3, 6], 2),
    ],
)
def test_stopped_and_resumed_equals_straight(folder, straight, tmp_path, name, steps, workers):
    overrides = (*RUNS[name], f"loader.num_workers={workers}")
    for step in steps:
        in_child(interrupt, folder, tmp_path, step, *overrides)
        assert last(tmp_path)["global_step"] == step
    in_child(fit, folder, tmp_path, *overrides)
    assert equal(state(tmp_path), state(straight(name)))
    assert table(tmp_path) == table(straight(name))


def test_comparison_covers_what_it_should(straight):
    """The state above is that of a run with moving averages, momenta and a schedule."""
    found = state(straight("mdlm"))
    assert found["ema"]["num_updates"] == found["global_step"] == 8
    moments = found["optimizer_states"][0]["state"]
    assert all(float(entry["step"]) == 8 for entry in moments.values()) and len(moments) > 20
    assert any(entry["exp_avg"].abs().max() > 0 for entry in moments.values())
    assert found["lr_schedulers"][0]["last_epoch"] == 8
    averages = found["ema"]["shadow_params"]
    assert not equal(averages, [moved for moved in found["state_dict"].values()][: len(averages)])


def test_kills_at_any_moment_leave_a_checkpoint_that_can_be_resumed(folder, tmp_path):
    """SIGKILL while a checkpoint is written after every step; each time, go on from last.ckpt."""
    overrides = (*ALGORITHMS["mdlm"], "checkpointing.every_n_steps=1", "trainer.max_steps=24")
    fit(folder, tmp_path / "straight", *overrides)
    path, draw = tmp_path / "run" / "checkpoints" / "last.ckpt", random.Random(0)
    reached = []
    for _ in range(4):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = start_child(fit, folder, tmp_path / "run", *overrides)
        while process.is_alive() and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        reached.append(read_checkpoint(path)["global_step"])
    assert reached == sorted(set(reached)) and reached[0] > 0
    fit(folder, tmp_path / "run", *overrides)
    assert equal(state(tmp_path / "run"), state(tmp_path / "straight"))
    assert table(tmp_path / "run") == table(tmp_path / "straight")
    assert {file.name for file in path.parent.iterdir()} == {"best.ckpt", "last.ckpt"}


def arguments(folder: Path, run_dir: Path, *overrides: str) -> list[str]:
    return [*tiny(folder), f"paths.run_dir={run_dir}", *overrides]


@pytest.mark.parametrize("schedule", ["constant_warmup", "linear_warmup", "cosine_warmup"])
def test_a_resumed_run_passes_the_audit_and_a_doctored_one_does_not(
    folder, tmp_path, capfd, schedule
):
    command = arguments(folder, tmp_path / "run", f"lr_scheduler={schedule}")
    with terminate_during(5):
        assert call_main(command) == 143
    assert load_summary(tmp_path / "run")["status"] == "interrupted"
    assert call_main(command) == 0
    rates = [row["lr"] for row in read_metrics(tmp_path / "run" / "metrics.csv") if "lr" in row]
    assert len(rates) == 8 and max(rates) == pytest.approx(1e-2)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)

    audit = ["mode=audit", f"mode.run={tmp_path / 'run'}", f"paths.run_dir={tmp_path / 'audit'}",
             "trainer=cpu"]  # fmt: skip
    assert call_main(audit) == 0
    file = tmp_path / "run" / "metrics.csv"
    rows = [line.split(",") for line in file.read_text().splitlines()]
    rows[6][rows[0].index("lr")] = "0.002"  # of step 5, below all that follow under a warm-up
    rows[8][rows[0].index("lr")] = "0.009"
    file.write_text("\n".join(",".join(row) for row in rows) + "\n")
    capfd.readouterr()
    assert call_main(audit) == 1
    streams = capfd.readouterr()
    assert "FAIL  learning rate" in streams.out and streams.err.startswith("AuditError: ")


def test_same_seed_same_run_other_seed_other_run(folder, straight, tmp_path):
    fit(folder, tmp_path / "same", *RUNS["bd3lm"])
    fit(folder, tmp_path / "other", *RUNS["bd3lm"], "seed=2")
    assert equal(state(tmp_path / "same"), state(straight("bd3lm")))
    assert table(tmp_path / "same") == table(straight("bd3lm"))
    assert not equal(last(tmp_path / "other")["state_dict"], last(tmp_path / "same")["state_dict"])


def test_bf16_trains_and_is_validated_in_fp32(folder, straight, tmp_path):
    metrics = fit(folder, tmp_path / "run", *ALGORITHMS["mdlm"], "trainer.precision=bf16-mixed")
    rows, exact = (
        [row["train/loss"] for row in read_metrics(run / "metrics.csv") if "train/loss" in row]
        for run in (tmp_path / "run", straight("mdlm"))
    )
    assert rows != exact and rows == pytest.approx(exact, rel=0.05)
    weights = last(tmp_path / "run")["state_dict"]
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    options = ("mode=ppl_eval", "eval.num_draws=1", "trainer=cpu", "trainer.precision=32-true")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    cfg = compose_config(
        *options, f"eval.checkpoint_path={path}", f"paths.cache_dir={folder}/cache",
        run_dir=tmp_path / "evaluation",
    )  # fmt: skip
    (tmp_path / "evaluation").mkdir()
    assert evaluate(cfg)["nll"] == pytest.approx(metrics["val/nll"], abs=1e-6)


def test_a_sweep_over_block_sizes_writes_a_summary_per_job(folder, tmp_path):
    command = arguments(folder, tmp_path / "unused")[:-1]
    sweep = [f"hydra.sweep.dir={tmp_path}", "algo=bd3lm", "block_size=4,8", "trainer.max_steps=2"]
    assert call_main([*command, *sweep, "--multirun"]) == 0
    for number, block in enumerate((4, 8)):
        summary = load_summary(tmp_path / str(number))
        assert tuple(summary) == SUMMARY_KEYS
        assert (summary["status"], summary["steps"], summary["algo"]) == ("done", 2, "bd3lm")
        stored = read_checkpoint(best(tmp_path / str(number)))["hyper_parameters"]["config"]
        assert stored["block_size"] == block


@pytest.mark.parametrize("name", ["mdlm", "bd3lm"])
def test_weights_of_share_zero_train_as_none_to_the_bit(folder, tmp_path, name):
    """Twenty steps: weights, momenta, averages and every logged number."""
    overrides = (*ALGORITHMS[name], *TREES, "trainer.max_steps=20", "trainer.val_check_interval=10")
    fit(folder, tmp_path / "none", *overrides)
    weighted = ("masking=dependency", "masking.mix_alpha=0", "masking.target=schedule")
    fit(folder, tmp_path / "zero", *overrides, *weighted)
    assert state(tmp_path / "none")["global_step"] == 20
    assert equal(state(tmp_path / "zero"), state(tmp_path / "none"))
    assert table(tmp_path / "zero") == table(tmp_path / "none")
    other = ("masking=dependency", "masking.mix_alpha=0.0625", "trainer.max_steps=2")
    fit(folder, tmp_path / "some", *overrides, *other)
    fit(folder, tmp_path / "two", *overrides, "trainer.max_steps=2")
    assert not equal(state(tmp_path / "some")["state_dict"], state(tmp_path / "two")["state_dict"])


def test_data_without_depths_is_refused_in_one_line(folder, tmp_path):
    with pytest.raises(DataError, match=r"masking=dependency: data=text has no depth of words"):
        fit(folder, tmp_path, "masking=dependency")
