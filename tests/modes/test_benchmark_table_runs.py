"""mode=benchmark_table: runs and published counts side by side."""

import json

import pytest

from data.errors import DataError
from modes import benchmark_table
from modes.benchmark_eval import run
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.benchmark_runs import GYM, configured, rows_of
from tests.support import ROOT, compose_config

pytest.importorskip("reasoning_gym", reason="needs the package reasoning_gym")


def table(folder, *overrides):
    cfg = compose_config("mode=benchmark_table", *overrides, run_dir=folder / "table")
    validate(cfg)
    return benchmark_table.run(cfg)


def test_a_table_of_two_models(tmp_path, capsys):
    run(configured(tmp_path / "old"))
    run(configured(tmp_path / "new", "model.seed=3", "mode.label=fresh"))
    # Random weights get nothing right.
    items = tmp_path / "new" / "items.jsonl"
    rows = [{**row, "correct": number < 6} for number, row in enumerate(rows_of(items))]
    items.write_text("".join(json.dumps(row) + "\n" for row in rows))
    metrics = table(
        tmp_path, f"mode.runs='{tmp_path}/[no][el][wd]'", f"mode.baseline={tmp_path}/old"
    )
    name = "fresh/reasoning_gym"
    assert metrics["accuracy/old/reasoning_gym"] == 0.0
    assert metrics[f"accuracy/{name}"] == metrics[f"delta/{name}"] == 0.5
    assert 0.0 < metrics[f"delta_low/{name}"] < 0.5 < metrics[f"delta_high/{name}"] < 1.0
    assert metrics[f"p/{name}"] == 2 / 2**6 and "McNemar p" in capsys.readouterr().out
    found = json.loads((tmp_path / "table" / "benchmark_table.json").read_text())
    assert [row["run"] for row in found["rows"]] == ["old", "fresh"]
    assert found["rows"][1]["pairs"] == {
        "both": 0, "only_first": 6, "only_second": 0, "neither": 6,
    }  # fmt: skip
    assert (
        found["rows"][1]["delta"]["p"] == 2 / 2**6 and found["rows"][0]["tokens_per_forward"] == 1.0
    )
    assert (tmp_path / "table" / "benchmark_table.md").is_file()
    assert (tmp_path / "table" / "benchmark_table.png").is_file()
    run(configured(tmp_path / "other", f"{GYM}.shots=1"))
    with pytest.raises(ValueError, match="had another prompt in the baseline"):
        table(tmp_path, f"mode.runs={tmp_path}/other", f"mode.baseline={tmp_path}/old")


def test_a_table_of_published_counts(tmp_path):
    published = ROOT / "docs" / "published"
    metrics = table(
        tmp_path, f"mode.runs=[{published}/qwen3_4b_stage3_nce_step8706.json]",
        f"mode.baseline={published}/qwen3_4b_stage2_step7335.json", "mode.remarks=[as published]",
    )  # fmt: skip
    assert metrics["delta/Stage-3 NCE (K=4, R=1, alpha=0.5)/humaneval"] == pytest.approx(-8 / 164)
    assert "- as published" in (tmp_path / "table" / "benchmark_table.md").read_text()


def test_a_glob_of_published_counts(tmp_path):
    for name in "abc":
        counts = {"label": name, "counts": {"toy": [1, 2]}}
        (tmp_path / f"{name}.json").write_text(json.dumps(counts))
    metrics = table(tmp_path, f"mode.runs='{tmp_path}/*.json'", f"mode.baseline={tmp_path}/b.json")
    assert [key for key in metrics if key.startswith("delta/")] == ["delta/a/toy", "delta/c/toy"]
    with pytest.raises(ConfigError, match=r"mode\.runs=.*/x\*\.json: no such files; allowed: fold"):
        table(tmp_path, f"mode.runs='{tmp_path}/x*.json'", f"mode.baseline={tmp_path}/b.json")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", r"a\.json: cannot be read"),
        ("[]", r"a\.json: no JSON object"),
        ('{"label": "x", "counts": {}}', r"a\.json: no label or no counts; allowed: \{\"label\""),
        ('{"counts": {"a": [1, 2]}}', r"a\.json: no label"),
        ('{"label": "x", "counts": {"a": [3, 2]}}', r"a\.json: a is \[3, 2\]; allowed"),
        ('{"label": "x", "counts": {"a": [0.5, 2]}}', r"a\.json: a is \[0\.5, 2\]"),
    ],
)
def test_files_that_are_no_counts(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        benchmark_table.read_run(tmp_path / "a.json")


def test_folders_that_are_no_runs(tmp_path):
    with pytest.raises(ConfigError, match=r"benchmark\.json: cannot be read \(FileNotFoundError\)"):
        table(tmp_path, f"mode.runs={tmp_path}", "mode.baseline=nowhere")
    with pytest.raises(ConfigError, match=r"nothing there beside mode\.baseline"):
        table(tmp_path, f"mode.runs={tmp_path}", f"mode.baseline={tmp_path}")
    run(configured(tmp_path / "run", "mode.limit=2"))
    items = tmp_path / "run" / "items.jsonl"
    items.write_bytes(items.read_bytes().splitlines(keepends=True)[0])
    with pytest.raises(ValueError, match=r"1 rows of reasoning_gym, benchmark\.json has another"):
        benchmark_table.read_run(tmp_path / "run")
    items.write_text('{"id": "a"}\n')
    with pytest.raises(DataError, match=r"items\.jsonl:1: task=null; allowed: a text \(what"):
        benchmark_table.read_run(tmp_path / "run")
