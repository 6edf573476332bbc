"""The trainer of a configuration: accumulation, validation interval, where to resume."""

import os
from pathlib import Path

import pytest

from runtime.errors import ConfigError
from runtime.trainer import accumulation_steps, build_trainer, checkpoint_root, resume_point
from tests.support import compose_config, toy_config


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["loader.batch_size=null"], 1),
        (["loader.batch_size=8"], 4),
        (["loader.batch_size=8", "trainer.devices=2"], 2),
        (["loader.batch_size=8", "trainer.devices=2", "trainer.num_nodes=2"], 1),
        (["loader.batch_size=null", "trainer.devices=2"], 1),
    ],
)
def test_accumulation(overrides, expected):
    assert accumulation_steps(compose_config("trainer=cpu", *overrides)) == expected


def test_accumulation_that_leaves_a_rest():
    cfg = compose_config("trainer=cpu", "loader.batch_size=24")
    with pytest.raises(ConfigError, match="allowed: multiples of 24"):
        accumulation_steps(cfg)


def test_validation_interval_counts_optimiser_steps(tmp_path):
    trainer = build_trainer(toy_config(tmp_path, "loader.batch_size=2"))
    assert trainer.accumulate_grad_batches == 4 and trainer.val_check_interval == 16
    fraction = build_trainer(toy_config(tmp_path, "trainer.val_check_interval=0.5"))
    assert fraction.val_check_interval == 5 * 2


def test_groups_become_callbacks_and_loggers(tmp_path):
    trainer = build_trainer(toy_config(tmp_path))
    names = [type(callback).__name__ for callback in trainer.callbacks]
    for name in ("ExactResume", "FinalValidation", "GracefulStop", "BestAndLast"):
        assert names.count(name) == 1
    assert [type(logger).__name__ for logger in trainer.loggers] == ["MetricsCSV"]
    bare = build_trainer(compose_config("trainer=cpu", "callbacks=none", "logger=none"))
    assert not bare.loggers


def touch(path: Path, age: float = 0.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    os.utime(path, (path.stat().st_atime, path.stat().st_mtime - age))
    return path


def test_resume_policy(tmp_path):
    def point(*overrides: str) -> Path | None:
        return resume_point(compose_config(*overrides, run_dir=tmp_path))

    assert point() is None
    with pytest.raises(ConfigError, match=r"resume_from_ckpt=required: no .*last\.ckpt"):
        point("checkpointing.resume_from_ckpt=required")
    last = touch(tmp_path / "checkpoints" / "last.ckpt", age=60)
    assert point() == point("checkpointing.resume_from_ckpt=required") == last
    assert point("checkpointing.resume_from_ckpt=false") is None
    assert point("checkpointing.resume_ckpt_path=other.ckpt") == Path("other.ckpt")
    requeued = touch(tmp_path / "hpc_ckpt_1.ckpt")
    assert point() == requeued


def test_checkpoints_may_live_elsewhere(tmp_path):
    cfg = compose_config(f"checkpointing.save_dir={tmp_path}/kept", run_dir=tmp_path)
    assert checkpoint_root(cfg) == tmp_path / "kept"
    assert cfg.callbacks.checkpoints.dirpath == f"{tmp_path}/kept/checkpoints"
    last = touch(tmp_path / "kept" / "checkpoints" / "last.ckpt")
    assert resume_point(cfg) == last


def test_checkpoints_may_lie_beside_the_metrics(tmp_path):
    cfg = toy_config(tmp_path, "checkpointing.subdir=.")
    (tmp_path / "last.ckpt").touch()
    assert resume_point(cfg).samefile(tmp_path / "last.ckpt")
    saver = next(c for c in build_trainer(cfg).callbacks if type(c).__name__ == "BestAndLast")
    assert saver.best_path.resolve() == (tmp_path / "best.ckpt").resolve()
