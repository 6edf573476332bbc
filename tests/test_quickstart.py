"""`make quickstart`, made small: three stages, and nothing twice."""

import subprocess
import sys

from runtime.run import load_summary
from tests.support import ROOT, environment

TINY = (
    "trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1", "model.length=16", "model.hidden_size=16",
    "model.n_blocks=1", "model.n_heads=2",
)  # fmt: skip


def quickstart(folder, *overrides):
    return subprocess.run(
        [sys.executable, "scripts/quickstart.py", "--out", str(folder / "out"), *TINY, *overrides],
        cwd=ROOT,
        env=environment(PALIMPSEST_CACHE=str(folder / "cache")),
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_quickstart(tmp_path):
    first = quickstart(tmp_path)
    assert first.returncode == 0, first.stderr
    stages = {"train": "train", "likelihood": "ppl_eval", "samples": "sample_eval"}
    for name, mode in stages.items():
        summary = load_summary(tmp_path / "out" / name)
        assert (summary["mode"], summary["status"]) == (mode, "done")
    metrics = load_summary(tmp_path / "out" / "likelihood")["metrics"]
    assert f"validation perplexity   {metrics['ppl']:.1f}" in first.stdout
    assert f"unigram perplexity      {metrics['unigram_ppl']:.1f}" in first.stdout
    assert "100%" in first.stdout, "a progress bar"
    assert (tmp_path / "out" / "train" / "curves.png").is_file()

    second = quickstart(tmp_path)
    assert second.returncode == 0 and second.stdout.count("done before") == 3
    assert second.stdout.split("== What came out")[1] == first.stdout.split("== What came out")[1]


def test_a_failing_stage_ends_it_with_its_exit_code(tmp_path):
    done = quickstart(tmp_path, "optim.lr=-1")
    assert done.returncode == 2
    assert "optim.lr=-1" in done.stderr and "stopped with exit code 2" in done.stdout
    assert "== Evaluate" not in done.stdout
