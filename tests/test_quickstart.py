"""`make quickstart`, made small: three stages, and nothing twice."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from runtime.run import load_summary
from scripts import quickstart
from tests.forks import start_main
from tests.support import ROOT, environment

TINY = (
    "trainer=cpu", "trainer.max_steps=2", "trainer.val_check_interval=2",
    "trainer.limit_val_batches=1", "model.length=16", "model.hidden_size=16",
    "model.n_blocks=1", "model.n_heads=2",
)  # fmt: skip


def typed(folder, *overrides):
    """As a user starts it: every stage imports what it needs."""
    return subprocess.run(
        [sys.executable, "scripts/quickstart.py", "--out", str(folder / "out"), *TINY, *overrides],
        cwd=ROOT,
        env=environment(PALIMPSEST_CACHE=str(folder / "cache")),
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture
def forked(monkeypatch, capsys):
    """Its stages are forked from this process."""

    def run(folder, *overrides):
        stages = []

        def start(command, **_):
            assert command[:2] == [sys.executable, "main.py"]
            stages.append(start_main(*command[2:], said=folder / f"said{len(stages)}.txt"))
            return stages[-1]

        monkeypatch.setenv("PALIMPSEST_CACHE", str(folder / "cache"))
        monkeypatch.setattr(quickstart, "subprocess", SimpleNamespace(Popen=start))
        monkeypatch.setattr(sys, "argv", ["", "--out", str(folder / "out"), *TINY, *overrides])
        code = 0
        try:
            quickstart.main()
        except SystemExit as stop:
            code = stop.code
        said = capsys.readouterr().out + "".join(stage.output() for stage in stages)
        errors = "".join(stage.errors() for stage in stages)
        return subprocess.CompletedProcess([], code, said, errors)

    return run


def check_quickstart(quickstart, folder):
    first = quickstart(folder)
    assert first.returncode == 0, first.stderr
    stages = {"train": "train", "likelihood": "ppl_eval", "samples": "sample_eval"}
    for name, mode in stages.items():
        summary = load_summary(folder / "out" / name)
        assert (summary["mode"], summary["status"]) == (mode, "done")
    metrics = load_summary(folder / "out" / "likelihood")["metrics"]
    assert f"validation perplexity   {metrics['ppl']:.1f}" in first.stdout
    assert f"unigram perplexity      {metrics['unigram_ppl']:.1f}" in first.stdout
    assert "100%" in first.stdout, "a progress bar"
    assert (folder / "out" / "train" / "curves.png").is_file()

    second = quickstart(folder)
    assert second.returncode == 0 and second.stdout.count("done before") == 3
    closing = second.stdout.split("== What came out")[1]
    assert first.stdout.split("== What came out")[1].startswith(closing)


def test_quickstart(tmp_path, forked):
    check_quickstart(forked, tmp_path)


@pytest.mark.slow
def test_quickstart_as_it_is_typed(tmp_path):
    check_quickstart(typed, tmp_path)


def test_a_failing_stage_ends_it_with_its_exit_code(tmp_path, forked):
    done = forked(tmp_path, "optim.lr=-1")
    assert done.returncode == 2
    assert "optim.lr=-1" in done.stderr and "stopped with exit code 2" in done.stdout
    assert "== Evaluate" not in done.stdout
