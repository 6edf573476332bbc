"""Stages of the recipes: what counts as done."""

import subprocess

import pytest

from scripts.stages import stage


def test_a_stage_is_done_for_the_same_question_only(tmp_path, monkeypatch):
    """Other overrides, or another file behind the same path, are run again."""
    runs = []

    def fake_run(command, **options):
        runs.append(command)
        (tmp_path / "out" / "summary.json").write_text(f'{{"metrics": {{"runs": {len(runs)}}}}}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(subprocess, "run", fake_run)
    checkpoint = tmp_path / "a.ckpt"
    checkpoint.write_text("one")
    asked = ("mode=sample_eval", f"eval.checkpoint_path={checkpoint}")
    assert stage(tmp_path / "out", *asked) == {"runs": 1}
    assert stage(tmp_path / "out", *asked) == {"runs": 1}
    assert stage(tmp_path / "out", *asked, "seed=2") == {"runs": 2}
    assert stage(tmp_path / "out", *asked) == {"runs": 3}
    checkpoint.write_text("other")
    assert stage(tmp_path / "out", *asked) == {"runs": 4}
    (tmp_path / "out" / "checkpoints").mkdir()  # a training does not begin in another's weights
    assert stage(tmp_path / "out", *asked) == {"runs": 4}
    with pytest.raises(SystemExit, match="trained with other overrides; give another --out"):
        stage(tmp_path / "out", *asked, "seed=2")


def test_a_stage_that_fails_says_why(tmp_path, monkeypatch):
    def fake_run(command, stdout, **options):
        stdout.write("much before\nDataError: rows.jsonl:3: no text\n")
        return subprocess.CompletedProcess(command, 2)

    monkeypatch.setattr(subprocess, "run", fake_run)
    with pytest.raises(
        SystemExit, match=r"out: exit 2: DataError: rows\.jsonl:3: no text \("
    ) as end:
        stage(tmp_path / "out", "mode=prompts")
    assert str(tmp_path / "out" / "output.log") in str(end.value)
    assert not (tmp_path / "out" / "done.json").exists()
