"""The journey to best of n: its plot, and the whole way in minutes."""

import csv
import json
import os
import subprocess
import sys

import pytest

from scripts.refine.journey import SIZES, Journey
from scripts.refine.plateau import _smooth, plot_plateau
from tests.support import ROOT, environment


def test_the_plot_takes_what_training_logs(tmp_path):
    columns = (
        "step", "train/gamma", "train/nce_loss", "train/rank_accuracy", "train/scale_floor",
        "train/duplicate_floor",
    )  # fmt: skip
    for run in ("a", "b"):
        with (tmp_path / f"{run}.csv").open("w") as file:
            writer = csv.writer(file)
            writer.writerow(columns)
            # A row of a validation has none of them.
            writer.writerow([1, *[""] * 5])
            writer.writerows([[step, 1.0, 1.2, 0.4, 0.43, 0.1] for step in (10, 20, 30)])
    plot_plateau(tmp_path / "out" / "plot.png", {"a": tmp_path / "a.csv", "b": tmp_path / "b.csv"})
    assert (tmp_path / "out" / "plot.png").stat().st_size > 10_000
    assert _smooth([1.0, 2.0, 3.0, 4.0], window=2) == [1.0, 1.5, 2.5, 3.5]


def test_answered_prompts_are_there_whole_or_not_at_all(tmp_path, monkeypatch):
    journey = Journey(tmp_path, SIZES["smoke"], 1, ())
    monkeypatch.setattr(journey, "run", lambda *_: {})
    rows = [{"id": str(n), "messages": [], "answer": n} for n in range(3)]
    (tmp_path / "prompts").mkdir()
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "prompts" / "rows.jsonl").write_text(text)

    def kill(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(os, "replace", kill)
        journey.prompts()
    answered = tmp_path / "prompts" / "answered.jsonl"
    assert not answered.exists()
    journey.prompts()
    found = [json.loads(line) for line in answered.read_text().splitlines()]
    assert found == [row | {"response": row["id"], "finish": "stop"} for row in rows]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_journey(tmp_path):
    pytest.importorskip("reasoning_gym")
    command = [
        sys.executable, str(ROOT / "scripts" / "refine" / "journey.py"), "--size", "smoke",
        "--out", str(tmp_path / "out"), "--jobs", "2",
    ]  # fmt: skip
    variables = environment(PALIMPSEST_CACHE=str(tmp_path / "cache"))
    options = {"env": variables, "capture_output": True, "text": True, "timeout": 1700}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = (tmp_path / "out" / "table" / "benchmark_table.md").read_text()
    for run in ("ar", "control", "refined", "best_of_4_beam_perround", "best_of_4_temp07"):
        assert f"| {run} " in table
    assert (tmp_path / "out" / "plateau.png").is_file()
    # A second call finds everything done.
    summary = tmp_path / "out" / "table_thresholds" / "summary.json"
    written = summary.stat().st_mtime_ns
    assert subprocess.run(command, **options).returncode == 0
    assert summary.stat().st_mtime_ns == written
