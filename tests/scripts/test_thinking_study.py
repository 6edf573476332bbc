"""The study of thinking mid-training: killed again and again, it goes on to all of its tables."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from tests.support import ROOT

# What there is when a stage is under way.
KILLED_AT = (
    "base/metrics.csv", "phase3/metrics.csv", "sft/think_base/metrics.csv",
    "rlmt/think_base_rlmt/metrics.csv", "gate/partial", "answers/think_base/think_base",
)  # fmt: skip
TABLES = ("continuation", "sft_table", "rlmt_table", "gate", "reasoning")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_killed_at_any_stage_the_study_goes_on(tmp_path):
    pytest.importorskip("reasoning_gym")
    out = tmp_path / "study"
    command = [
        sys.executable, "scripts/thinking/study.py", "--out", str(out), "--size", "smoke",
        "--jobs", "2",
    ]  # fmt: skip
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    for marker in KILLED_AT:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        while process.poll() is None and not (out / marker).exists():
            time.sleep(0.05)
        assert process.poll() is None, f"it ended before {marker}"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for name in TABLES:
        summary = json.loads((out / name / "summary.json").read_text())
        assert summary["status"] == "done" and list((out / name).glob("*.md"))
        assert str(out / name) in done.stdout
    assert (out / "thought_kinds" / "thought_kinds.md").is_file()
    notes = {path: path.stat().st_mtime_ns for path in out.rglob("done.json")}
    assert len(notes) > 20
    subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    assert notes == {path: path.stat().st_mtime_ns for path in out.rglob("done.json")}
