"""The run folder: exact keys, honest status, strict JSON."""

import json

import pytest
from omegaconf import OmegaConf

from runtime.errors import ConfigError, Interrupted, NonFiniteError
from runtime.run import (
    SUMMARY_KEYS,
    RunFolder,
    load_summary,
    read_provenance,
    write_json,
    write_provenance,
)


@pytest.fixture
def folder(tmp_path):
    cfg = OmegaConf.create(
        {
            "mode": {"name": "train"},
            "algo": {"name": "mdlm"},
            "paths": {"run_dir": str(tmp_path / "run")},
            "again": "${algo.name}",
        }
    )
    folder = RunFolder(cfg)
    folder.open()
    return folder


def test_config_is_written_resolved(folder):
    assert OmegaConf.load(folder.path / "config.yaml").again == "mdlm"
    assert "$" not in (folder.path / "config.yaml").read_text()


def test_summary_of_a_run_that_is_done(folder):
    write_provenance(folder.path, {"git": "x", "config_hash": "y"})
    folder.close({"steps": 5, "val/nll": 1.5})
    summary = load_summary(folder.path)
    assert tuple(summary) == SUMMARY_KEYS
    assert (summary["mode"], summary["algo"], summary["status"]) == ("train", "mdlm", "done")
    assert summary["steps"] == 5 and summary["metrics"] == {"val/nll": 1.5}
    assert summary["provenance"] == {"git": "x", "config_hash": "y"} and summary["wall_s"] >= 0


@pytest.mark.parametrize(
    ("error", "status", "steps"),
    [
        (Interrupted(15, step=12), "interrupted", 12),
        (KeyboardInterrupt(), "interrupted", 0),
        (NonFiniteError("nan at step 3", step=3), "nonfinite", 3),
        (ConfigError("a=1: wrong"), "failed", 0),
        (ZeroDivisionError("two\nlines"), "failed", 0),
    ],
)
def test_summary_of_a_run_that_ended_early(folder, error, status, steps):
    folder.close(error=error)
    summary = load_summary(folder.path)
    assert (summary["status"], summary["steps"]) == (status, steps)
    assert tuple(summary) == (*SUMMARY_KEYS, "error") and "\n" not in summary["error"]
    assert set(summary["provenance"]) == {"git", "config_hash", "data_fingerprint", "versions"}


def test_json_is_strict_and_leaves_no_temporary_file(tmp_path):
    write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1.0]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {"x": "nan", "y": ["inf", 1.0]}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_a_new_run_in_the_folder_forgets_the_provenance_of_the_old_one(folder):
    write_provenance(folder.path, {"git": "x"})
    folder.open()
    assert read_provenance(folder.path) is None


@pytest.mark.parametrize(("signum", "code"), [(15, 143), (2, 130)])
def test_interrupted_has_the_exit_code_of_a_shell(signum, code):
    assert Interrupted(signum).exit_code == code
    assert not isinstance(Interrupted(signum), Exception)
