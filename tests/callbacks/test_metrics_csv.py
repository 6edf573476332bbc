"""metrics.csv grows, survives a torn row, and forgets what is made again."""

import math

from callbacks.metrics_csv import MetricsCSV, read_metrics


def test_rows_are_on_disk_at_once_and_columns_may_grow(tmp_path):
    table = MetricsCSV(tmp_path / "run")
    table.log_metrics({"train/loss": 2.0, "epoch": 0}, step=0)
    assert table.path.read_text() == "step,train/loss\n1,2.0\n"
    table.log_metrics({"val/nll": 1.5}, step=0)
    table.log_metrics({"train/loss": 1.0, "lr": 0.1}, step=1)
    assert read_metrics(table.path) == [
        {"step": 1, "train/loss": 2.0},
        {"step": 1, "val/nll": 1.5},
        {"step": 2, "train/loss": 1.0, "lr": 0.1},
    ]
    assert (table.name, table.save_dir) == ("metrics", str(tmp_path / "run"))


def test_a_new_process_appends_and_drops_rows_beyond_the_resumed_step(tmp_path):
    first = MetricsCSV(tmp_path)
    for step in range(5):
        first.log_metrics({"loss": float(step)}, step=step)
    second = MetricsCSV(tmp_path)
    second.drop_after(3)
    second.log_metrics({"loss": 9.0}, step=3)
    assert [(row["step"], row["loss"]) for row in read_metrics(second.path)] == [
        (1, 0.0), (2, 1.0), (3, 2.0), (4, 9.0),
    ]  # fmt: skip


def test_a_row_cut_off_by_a_kill_is_dropped(tmp_path):
    table = MetricsCSV(tmp_path)
    table.log_metrics({"loss": 1.0, "lr": 0.5}, step=0)
    with table.path.open("a") as file:
        file.write("2,0.7")
    assert [row["step"] for row in read_metrics(table.path)] == [1]
    MetricsCSV(tmp_path).drop_after(10)
    assert table.path.read_text().splitlines() == ["step,loss,lr", "1,1.0,0.5"]


def test_drop_after_without_a_file_does_nothing(tmp_path):
    MetricsCSV(tmp_path).drop_after(3)
    assert not list(tmp_path.iterdir())


def test_non_finite_values_can_be_read_back(tmp_path):
    table = MetricsCSV(tmp_path)
    table.log_metrics({"loss": float("nan"), "norm": float("inf")}, step=0)
    row = read_metrics(table.path)[0]
    assert math.isnan(row["loss"]) and math.isinf(row["norm"])
