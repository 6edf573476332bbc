"""What training reports: metrics of the last and the best validation, and a plot."""

import lightning as L
import pytest

from callbacks.metrics_csv import MetricsCSV
from modes.train import final_metrics, plot_curves
from runtime.run import read_provenance
from tests.plugins import toy_train
from tests.support import toy_config


def test_last_and_best_validation_come_from_the_table(tmp_path):
    table = MetricsCSV(tmp_path)
    for step, nll in enumerate([3.0, 1.0, 2.0]):
        table.log_metrics({"train/loss": nll, "lr": 0.1}, step)
        table.log_metrics({"val/nll": nll, "val/ppl": nll**2}, step)
    metrics = final_metrics(L.Trainer(logger=False, accelerator="cpu"), tmp_path)
    assert metrics == {"steps": 0, "val/nll": 2.0, "val/ppl": 4.0, "best/val/nll": 1.0}


def test_plot(tmp_path):
    assert plot_curves(tmp_path) is None
    MetricsCSV(tmp_path).log_metrics({"train/loss": 1.0}, 0)
    assert plot_curves(tmp_path).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("logger", ["csv", "none"])
def test_a_run_reports_with_and_without_a_table(tmp_path, logger):
    cfg = toy_config(tmp_path, f"logger={logger}", "trainer.val_check_interval=3")
    metrics = toy_train.run(cfg)
    assert metrics["steps"] == 10 and metrics["val/nll"] >= metrics["best/val/nll"] >= 0
    assert metrics["tokens_per_s"] > 0
    assert (tmp_path / "curves.png").exists() is (logger == "csv")
    assert read_provenance(tmp_path)["data_fingerprint"] == "toy"
