"""Full states of whole runs: N + N steps are 2N, which of them stay, which are resumed from."""

import errno
import logging
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch

from callbacks.full_state import FullStateFolders
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError, ConfigError
from runtime.full_state import PATTERN, full_states, step_of
from runtime.parts import META, remove_unfinished
from runtime.trainer import build_trainer, resume_point
from runtime.validation import validate
from tests.runs import ALGORITHMS, call_main, configure, fit, interrupt, last, state, tiny
from tests.support import compose_config, equal
from tests.test_bad_input import files_no_larger_than
from tests.test_training import start_child

EVERY = "checkpointing.full_state_every_n_steps"
# Two micro-batches per step, validations after 4 and 8, last.ckpt after 3, 6 and 8.
RUNS = {
    "mdlm": (*ALGORITHMS["mdlm"], f"{EVERY}=2"),
    "bd3lm": (*ALGORITHMS["bd3lm"], f"{EVERY}=2", "loader.num_workers=2"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def straight(folder):
    """Runs of eight steps that nothing interrupted, each made when first asked for."""

    def run(name: str) -> Path:
        if not (folder / name).exists():
            fit(folder, folder / name, *RUNS[name])
        return folder / name

    return run


def states(run_dir: Path) -> list[Path]:
    return full_states(run_dir / "checkpoints")


def steps(run_dir: Path) -> list[int]:
    return [step_of(path) for path in states(run_dir)]


def table(run_dir: Path) -> str:
    return (run_dir / "metrics.csv").read_text()


def differing(path: Path, other: Path) -> set[str]:
    """Keys in which two states differ, apart from the folder of their run.

    Lightning's own counters (`loops`) do not decide anything: they are set from the step.
    """
    one, two = read_checkpoint(path), read_checkpoint(other)
    keys = (one.keys() | two.keys()) - {"hyper_parameters", "provenance", "loops"}
    return {key for key in keys if key not in one or not equal(one[key], two.get(key))}


def cut_back(run_dir: Path, to: Path, step: int) -> None:
    """A copy of a finished run with nothing but the full state of `step`, and all its metrics."""
    shutil.copytree(run_dir, to)
    for path in states(to):
        if step_of(path) != step:
            shutil.rmtree(path)
    (to / "checkpoints" / "last.ckpt").unlink()


def test_a_state_is_last_ckpt_in_parts(straight):
    run_dir = straight("mdlm")
    assert steps(run_dir) == [2, 4, 6, 8]
    found = read_checkpoint(states(run_dir)[-1])
    assert found.pop("eval_batches") == []
    assert equal(found, last(run_dir))
    assert found["ema"]["num_updates"] == found["global_step"] == 8
    assert found["optimizer_states"][0]["state"] and found["lr_schedulers"][0]["last_epoch"] == 8


@pytest.mark.parametrize(("name", "step"), [("mdlm", 4), ("mdlm", 6), ("bd3lm", 2)])
def test_half_and_half_is_the_whole(folder, straight, tmp_path, name, step):
    """By itself from the only state there: weights, moments, schedule, averages, metrics.csv."""
    cut_back(straight(name), tmp_path / "run", step)
    fit(folder, tmp_path / "run", *RUNS[name])
    assert steps(tmp_path / "run") == [step, *range(step + 2, 9, 2)]
    for found, expected in zip(
        states(tmp_path / "run")[1:], states(straight(name))[step // 2 :], strict=True
    ):
        assert not differing(found, expected)
    assert equal(state(tmp_path / "run"), state(straight(name)))
    assert table(tmp_path / "run") == table(straight(name))


def test_the_comparison_can_fail(folder, straight, tmp_path, monkeypatch):
    cut_back(straight("mdlm"), tmp_path / "run", 4)
    monkeypatch.setattr("callbacks.exact_resume.restore_random_state", lambda state: None)
    fit(folder, tmp_path / "run", *RUNS["mdlm"])
    assert not equal(state(tmp_path / "run"), state(straight("mdlm")))


@pytest.mark.slow  # single disk calls are killed in tests/runtime/test_parts.py by default
def test_kills_at_any_moment_leave_a_state_that_can_be_resumed(folder, tmp_path):
    """SIGKILL while a state is written after every step; each time, go on from the newest whole."""
    overrides = (f"{EVERY}=1", "trainer.max_steps=18", "checkpointing.every_n_steps=100",
                 "checkpointing.full_state_keep=3")  # fmt: skip
    fit(folder, tmp_path / "straight", *overrides)
    draw, reached = random.Random(0), []
    for _ in range(2):
        before = set(steps(tmp_path / "run"))
        process = start_child(fit, folder, tmp_path / "run", *overrides)
        while process.is_alive() and set(steps(tmp_path / "run")) <= before:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))
        process.kill()
        process.join()
        reached.append(read_checkpoint(states(tmp_path / "run")[-1])["global_step"])
    assert reached == sorted(set(reached)) and reached[0] > 0 and reached[-1] < 18
    fit(folder, tmp_path / "run", *overrides)
    assert steps(tmp_path / "run") == [reached[-1], 16, 17, 18], "the start and the newest three"
    assert not differing(states(tmp_path / "run")[-1], states(tmp_path / "straight")[-1])
    assert table(tmp_path / "run") == table(tmp_path / "straight")


def test_off_unless_asked_for(folder, tmp_path):
    fit(folder, tmp_path, "trainer.max_steps=2")
    assert not states(tmp_path)


def test_one_more_at_the_end_and_none_twice(folder, tmp_path):
    overrides = (f"{EVERY}=3", "trainer.max_steps=5")
    fit(folder, tmp_path, *overrides)
    assert steps(tmp_path) == [3, 5]
    fit(folder, tmp_path, *overrides)
    assert steps(tmp_path) == [3, 5]


def test_a_run_stopped_where_one_was_due_saves_it_later(folder, straight, tmp_path):
    interrupt(folder, tmp_path, 4, *RUNS["mdlm"])
    assert steps(tmp_path) == [2] and last(tmp_path)["global_step"] == 4
    fit(folder, tmp_path, *RUNS["mdlm"])
    assert steps(tmp_path) == [2, 4, 6, 8]
    for found, expected in zip(states(tmp_path), states(straight("mdlm")), strict=True):
        assert not differing(found, expected)


# Which stay --------------------------------------------------------------------------------------


def test_the_newest_stay(folder, tmp_path):
    fit(folder, tmp_path, f"{EVERY}=1", "checkpointing.full_state_keep=2")
    assert steps(tmp_path) == [7, 8]
    assert not [path for path in (tmp_path / "checkpoints").iterdir() if path.name[0] == "."]


def test_the_one_resumed_from_stays_and_later_ones_are_told(folder, straight, tmp_path, caplog):
    """Back to step 4 in the same folder: what was saved behind it belongs to another history."""
    shutil.copytree(straight("mdlm"), tmp_path / "run")
    for path in states(tmp_path / "run")[2:3]:
        shutil.rmtree(path)
    start = states(tmp_path / "run")[1]
    overrides = (f"checkpointing.resume_ckpt_path={start}", "checkpointing.full_state_keep=1",
                 f"{EVERY}=1", "trainer.max_steps=7")  # fmt: skip
    with caplog.at_level(logging.WARNING):
        fit(folder, tmp_path / "run", *overrides)
    assert steps(tmp_path / "run") == [4, 7, 8]
    assert "1 full states in" in caplog.text and "later steps than 4" in caplog.text


def test_what_a_kill_left_is_deleted_and_counted(folder, tmp_path, caplog):
    left = tmp_path / "checkpoints" / ".checkpoint-00000002-20260501_081812.part"
    left.mkdir(parents=True)
    (left / "model.pt").write_bytes(b"half")
    with caplog.at_level(logging.WARNING):
        fit(folder, tmp_path, f"{EVERY}=2", "trainer.max_steps=2")
    assert not left.exists() and steps(tmp_path) == [2]
    assert "deleted 1 full states that were broken off" in caplog.text


def test_an_old_state_that_cannot_be_deleted_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    """On one rank alone, that would leave the others waiting; what is left goes at the next start.

    The newest state is safe by then.
    """
    old = [tmp_path / f"checkpoint-0000000{n}-20260501_081812" for n in (1, 2)]
    for path in (*old, tmp_path / "checkpoint-00000003-20260501_081812"):
        path.mkdir()
        (path / META).write_text("{}")
    unlink = os.unlink

    def busy(name, *arguments, **options):
        if refuses:
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(name, *arguments, **options)

    monkeypatch.setattr(os, "unlink", busy)
    saver, refuses = FullStateFolders(tmp_path, every_n_steps=1, keep=1), True
    with caplog.at_level(logging.WARNING):
        saver._delete_old(3)
    assert [step_of(path) for path in full_states(tmp_path)] == [3]
    assert caplog.text.count("cannot be deleted (Device or resource busy); the run goes on") == 2
    assert remove_unfinished(tmp_path, PATTERN) == 0
    refuses = False
    assert remove_unfinished(tmp_path, PATTERN) == 2
    assert [path.name[:19] for path in tmp_path.iterdir()] == ["checkpoint-00000003"]


def test_wrong_options():
    for options in ({"every_n_steps": 0}, {"keep": 0}):
        with pytest.raises(ConfigError, match=r"callbacks\.full_state\.\w+=0: allowed >= 1, null"):
            FullStateFolders("x", **options)
    for override, says in [
        (f"{EVERY}=0", f"{EVERY}=0: wrong value; allowed: an integer >= 1, null"),
        ("checkpointing.full_state_keep=0", "full_state_keep=0: wrong value"),
    ]:
        with pytest.raises(ConfigError, match=says):
            validate(compose_config(override))
    sharded = ("trainer=ddp", "trainer.strategy=fsdp", "training.ema=0", f"{EVERY}=5")
    with pytest.raises(ConfigError, match=f"{EVERY}=5: a sharded"):
        validate(compose_config(*sharded))


def test_a_full_disk_ends_in_one_line(folder, tmp_path, capfd):
    fit(folder, tmp_path / "run", f"{EVERY}=1", "trainer.max_steps=1")
    [before] = states(tmp_path / "run")
    kept = read_checkpoint(before)
    command = [*tiny(folder), f"paths.run_dir={tmp_path}/run", f"{EVERY}=1",
               "checkpointing.every_n_steps=100", "trainer.max_steps=3"]  # fmt: skip
    capfd.readouterr()
    with files_no_larger_than(100_000):
        assert call_main(command) == 2
    [line] = capfd.readouterr().err.strip().splitlines()
    assert line.startswith(f"CheckpointError: {before.parent}/checkpoint-00000002-")
    assert "cannot be written (File too large); what was there before is unharmed" in line
    assert states(tmp_path / "run") == [before] and equal(read_checkpoint(before), kept)


# Which is resumed from ---------------------------------------------------------------------------


@pytest.fixture
def run_dir(straight, tmp_path) -> Path:
    """A copy of the straight run: full states of 2, 4, 6, 8, and last.ckpt of 8."""
    shutil.copytree(straight("mdlm"), tmp_path / "copy")
    return tmp_path / "copy"


def point(folder: Path, run_dir: Path, *overrides: str) -> Path | None:
    return resume_point(configure(folder, run_dir, *overrides))


def test_the_latest_step_is_resumed_from(folder, straight, run_dir):
    file = run_dir / "checkpoints" / "last.ckpt"
    assert point(folder, run_dir) == file, "no state is of a later step"
    shutil.rmtree(states(run_dir)[-1])
    assert point(folder, run_dir) == file
    file.unlink()
    assert point(folder, run_dir) == states(run_dir)[-1]
    assert step_of(point(folder, run_dir, "checkpointing.resume_from_ckpt=required")) == 6
    assert point(folder, run_dir, "checkpointing.resume_from_ckpt=false") is None
    older = read_checkpoint(states(run_dir)[0])
    torch.save(older, file)
    assert point(folder, run_dir) == states(run_dir)[-1], "last.ckpt is newer, but of step 2"
    shutil.rmtree(run_dir / "checkpoints")
    with pytest.raises(ConfigError, match="resume_from_ckpt=required: no"):
        point(folder, run_dir, "checkpointing.resume_from_ckpt=required")


def test_a_sharded_run_cannot_read_one(folder, run_dir):
    shutil.rmtree(states(run_dir)[-1])
    (run_dir / "checkpoints" / "last.ckpt").unlink()
    six = states(run_dir)[-1]
    for overrides in ((), (f"checkpointing.resume_ckpt_path={six}",)):
        with pytest.raises(ConfigError, match=f"{six}: a sharded trainer.strategy reads no full"):
            point(folder, run_dir, "trainer.strategy=fsdp", *overrides)


def test_torn_states_are_passed_over_and_counted(folder, run_dir, caplog):
    (run_dir / "checkpoints" / "last.ckpt").unlink()
    two, four, six, eight = states(run_dir)
    (eight / META).unlink()
    (six / "optimizer.pt").write_bytes((six / "optimizer.pt").read_bytes()[:-7])
    with caplog.at_level(logging.WARNING):
        assert point(folder, run_dir) == four
    assert "passed over 2 full states that are not whole" in caplog.text
    assert f"{eight / META}: missing" in caplog.text
    assert f"{six / 'optimizer.pt'}: truncated" in caplog.text
    for path in (two, four):
        (path / "rng_rank0.pt").unlink()
    assert point(folder, run_dir) is None
    with pytest.raises(CheckpointError, match=r"rng_rank0\.pt: missing"):
        fit(folder, run_dir, f"checkpointing.resume_ckpt_path={four}")


def test_every_door_takes_a_state(folder, run_dir, tmp_path):
    path, file = states(run_dir)[1], run_dir / "checkpoints" / "best.ckpt"
    for key in ("checkpointing.resume_ckpt_path", "training.from_pretrained"):
        validate(configure(folder, tmp_path, f"{key}={path}"))
        with pytest.raises(ConfigError, match="a folder; allowed: a checkpoint file, a full state"):
            validate(configure(folder, tmp_path, f"{key}={run_dir}"))
    evaluation = ("mode=ppl_eval", f"paths.cache_dir={folder}/cache", "trainer=cpu",
                  f"paths.run_dir={tmp_path}/eval", "eval.num_draws=1")  # fmt: skip
    assert call_main([*evaluation, f"eval.checkpoint_path={path}"]) == 0
    fit(folder, tmp_path / "warm", f"training.from_pretrained={path}", "trainer.max_steps=1",
        "optim.lr=1e-12")  # fmt: skip
    found, given = (read_checkpoint(p)["state_dict"]
                    for p in (tmp_path / "warm" / "checkpoints" / "last.ckpt", path))  # fmt: skip
    assert all(torch.allclose(found[name], given[name], atol=1e-9) for name in given)
    assert read_checkpoint(file)["global_step"] in (4, 8)


def test_plugins_of_the_configuration_stay(tmp_path):
    name = "lightning.pytorch.plugins.layer_sync.TorchSyncBatchNorm"
    for given in (f"[{{_target_:{name}}}]", f"{{_target_:{name}}}"):
        trainer = build_trainer(compose_config("trainer=cpu", f"+trainer.plugins={given}"))
        assert type(trainer._accelerator_connector._layer_sync).__name__ == "TorchSyncBatchNorm"
        assert type(trainer.strategy.checkpoint_io).__name__ == "FolderCheckpointIO"


def test_a_checkpoint_plugin_of_the_configuration_takes_the_place_of_ours():
    plugin = "+trainer.plugins={_target_:lightning.pytorch.plugins.io.AsyncCheckpointIO}"
    trainer = build_trainer(compose_config("trainer=cpu", plugin))
    assert type(trainer.strategy.checkpoint_io).__name__ == "AsyncCheckpointIO"
    with pytest.raises(ConfigError, match=f"{EVERY}=5: AsyncCheckpointIO of trainer.plugins writ"):
        build_trainer(compose_config("trainer=cpu", plugin, f"{EVERY}=5"))
