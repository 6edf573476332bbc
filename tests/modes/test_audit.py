"""mode=audit accepts an honest run and finds every kind of broken promise."""

import json
import shutil
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from modes.audit import audit, check_rates, check_steps, run
from runtime.errors import AuditError, ConfigError
from runtime.run import RunFolder
from tests.plugins import toy_train
from tests.support import toy_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("run")
    cfg = toy_config(run_dir)
    folder = RunFolder(cfg)
    folder.open()
    folder.close(toy_train.run(cfg))
    return run_dir


@pytest.fixture
def copy(finished, tmp_path):
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def failed(run_dir: Path) -> set[str]:
    return {check.name for check in audit(run_dir) if not check.passed}


def test_an_honest_run_passes_also_after_it_was_moved(finished, copy, capsys):
    assert failed(finished) == failed(copy) == set()
    cfg = OmegaConf.create({"mode": {"run": str(copy)}})
    assert run(cfg) == {"checks": 7, "failed": 0}
    assert capsys.readouterr().out.count("ok  ") == 7


def test_a_rate_that_bounces(copy):
    table = copy / "metrics.csv"
    lines = table.read_text().splitlines()
    cells = lines[-2].split(",")
    cells[2] = "0.04"
    table.write_text("\n".join([*lines[:-2], ",".join(cells), lines[-1], ""]))
    assert failed(copy) == {"learning rate"}


def test_a_missing_row(copy):
    table = copy / "metrics.csv"
    table.write_text("".join(x for x in table.open() if not x.startswith("6,")))
    assert failed(copy) == {"steps"}


def test_rows_that_end_early(copy):
    table = copy / "metrics.csv"
    table.write_text("".join(x for x in table.open() if not x.startswith(("9,", "10,"))))
    assert failed(copy) == {"end"}


def test_another_configuration(copy):
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("weight_decay: 0.0", "weight_decay: 0.1"))
    assert failed(copy) == {"config hash"}


@pytest.mark.parametrize(("key", "value"), [("status", "failed"), ("extra", 1)])
def test_a_summary_that_is_not_one_of_a_finished_run(copy, key, value):
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, key: value}))
    assert failed(copy) == {"summary"}


def test_checkpoints(copy):
    (copy / "checkpoints" / "best.ckpt").write_bytes(b"broken")
    (copy / "checkpoints" / "last.ckpt").unlink()
    assert failed(copy) == {"best.ckpt", "last.ckpt"}


def test_a_folder_without_a_run(tmp_path):
    with pytest.raises(ConfigError, match=r"no config\.yaml there"):
        audit(tmp_path)


def test_failures_end_in_an_error(copy, capsys):
    (copy / "checkpoints" / "last.ckpt").unlink()
    with pytest.raises(AuditError, match=r"1 of 7 checks failed: last\.ckpt"):
        run(OmegaConf.create({"mode": {"run": str(copy)}}))
    assert "FAIL  last.ckpt" in capsys.readouterr().out


def test_exit_code_of_a_failed_audit_is_1(copy, tmp_path, call):
    (copy / "checkpoints" / "last.ckpt").unlink()
    done = call("mode=audit", f"mode.run={copy}", "trainer=cpu", f"paths.run_dir={tmp_path}/a")
    assert done.returncode == 1 and done.stderr.startswith("AuditError: ")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("rates", "passed"),
    [
        ([1, 2, 3, 3, 2, 1], True),
        ([3, 3, 3], True),
        ([1, 2, 3], True),
        ([1, 3, 2, 3], False),
        ([3, 2, 2.5], False),
        ([1, 2, 1, 3], False),
    ],
)
def test_rates(rates, passed):
    assert check_rates(list(enumerate(rates))).passed is passed
    assert not check_rates([]).passed


def test_steps():
    assert check_steps([10, 20, 30], 10).passed
    assert not check_steps([10, 20, 20, 30], 10).passed
    assert not check_steps([10, 30], 10).passed
    assert not check_steps([], 10).passed
