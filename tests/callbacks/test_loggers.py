"""The optional trackers work without a network, and metrics.csv is written beside them."""

import pytest

from callbacks.metrics_csv import MetricsCSV, read_metrics
from callbacks.progress import progress_bar
from runtime.trainer import build_group
from tests.plugins import toy_train
from tests.support import compose_config, toy_config

OFFLINE = {
    "wandb": ["logger.wandb.offline=true"],
    "tensorboard": [],
    "trackio": [],
}


@pytest.fixture(autouse=True)
def local_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("WANDB_SILENT", "true")


@pytest.mark.parametrize("name", sorted(OFFLINE))
@pytest.mark.timeout(120)
def test_trackers_log_a_run_offline(name, tmp_path):
    pytest.importorskip(name)
    toy_train.run(toy_config(tmp_path / "run", f"logger={name}", *OFFLINE[name]))
    rows = read_metrics(tmp_path / "run" / "metrics.csv")
    assert [row["step"] for row in rows if "lr" in row] == list(range(1, 11))
    assert [path for path in tmp_path.rglob("*") if name in path.name]


def test_csv_alone_is_the_default(tmp_path):
    (logger,) = build_group(compose_config(run_dir=tmp_path), "logger")
    assert isinstance(logger, MetricsCSV) and logger.path == tmp_path / "metrics.csv"


@pytest.mark.parametrize(("tty", "name"), [(True, "RichProgressBar"), (False, "TQDMProgressBar")])
def test_progress_bar_suits_its_place(monkeypatch, tty, name):
    monkeypatch.setattr("sys.stdout.isatty", lambda: tty)
    assert type(progress_bar()).__name__ == name
