"""metrics.json of a run of an online algorithm: what it says for every way in which a run ends."""

import json
from types import SimpleNamespace

import pytest

from callbacks import online_report
from callbacks.metrics_csv import MetricsCSV
from callbacks.online_report import OnlineReport
from runtime.errors import Interrupted, NonFiniteError


class Clock:
    """Seconds that pass when they are told to."""

    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(online_report, "time", clock)
    return clock


@pytest.fixture
def saved(monkeypatch):
    """Where checkpoints were saved."""
    paths = []
    monkeypatch.setattr(online_report, "save_atomically", lambda trainer, path: paths.append(path))
    return paths


def trainer_at(step, first=True):
    return SimpleNamespace(global_step=step, is_global_zero=first)


def ended(reason=None):
    return SimpleNamespace(stopped_reason=reason)


def content(folder):
    return json.loads((folder / "metrics.json").read_text())


@pytest.fixture
def table(tmp_path):
    """Rows of two steps and of a validation between them."""
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"train/loss": 0.5, "train/reward_mean": 0.25, "lr": 1e-3}, 0)
    logger.log_metrics({"val/nll": 3.0}, 0)
    logger.log_metrics({"train/loss": 0.25, "lr": 5e-4}, 1)
    return tmp_path


def test_the_whole_file(table, clock):
    report = OnlineReport(table, table / "checkpoints", "think_base")
    report.on_train_start(trainer_at(0), ended())
    clock.now += 7.5
    report.on_train_end(trainer_at(2), ended())
    assert content(table) == {
        "arm": "think_base",
        "completed_steps": 2,
        "stopped_reason": None,
        "wall_time_s": 7.5,
        "final": {"step": 2, "loss": 0.25, "lr": 5e-4},
        "history": [
            {"step": 1, "loss": 0.5, "reward_mean": 0.25, "lr": 1e-3},
            {"step": 2, "loss": 0.25, "lr": 5e-4},
        ],
    }


def test_the_name_of_the_folder_is_the_arm_without_another(tmp_path, clock):
    report = OnlineReport(tmp_path / "rlmt_3", tmp_path)
    (tmp_path / "rlmt_3").mkdir()
    report.on_train_end(trainer_at(0), ended())
    found = content(tmp_path / "rlmt_3")
    assert found["arm"] == "rlmt_3" and found["history"] == [] and found["final"] == {}


def test_time_adds_up_over_a_resume(table, clock):
    first = OnlineReport(table, table)
    first.on_train_start(trainer_at(0), ended())
    clock.now += 3.0
    second = OnlineReport(table, table)
    second.load_state_dict(first.state_dict())
    clock.now += 1000.0
    second.on_train_start(trainer_at(1), ended())
    clock.now += 4.0
    second.on_train_end(trainer_at(2), ended())
    assert content(table)["wall_time_s"] == 7.0


@pytest.mark.parametrize(
    ("error", "reason", "saves"),
    [
        (NonFiniteError("non-finite loss at step 2, rows [3]", 2), "non-finite loss at step 2", 1),
        (Interrupted(15, 2), "stopped by SIGTERM", 0),
        (RuntimeError("of a library\nsays a lot"), "RuntimeError", 0),
    ],
    ids=["non-finite", "signal", "other"],
)
def test_why_it_ended(table, clock, saved, error, reason, saves):
    report = OnlineReport(table, table / "checkpoints")
    report.on_exception(trainer_at(2), ended(), error)
    assert content(table)["stopped_reason"].startswith(reason)
    assert "\n" not in content(table)["stopped_reason"]
    assert saved == [table / "checkpoints" / "last.ckpt"] * saves


def test_an_alert_that_ended_it(table, clock):
    OnlineReport(table, table).on_train_end(trainer_at(1), ended("artifact_rate=0.5: above 0.1"))
    assert content(table)["stopped_reason"] == "artifact_rate=0.5: above 0.1"


def test_nothing_is_saved_before_the_first_step_and_one_rank_writes(table, clock, saved):
    report = OnlineReport(table, table)
    report.on_exception(trainer_at(0, first=False), ended(), NonFiniteError("bad", 0))
    assert saved == [] and not (table / "metrics.json").exists()
