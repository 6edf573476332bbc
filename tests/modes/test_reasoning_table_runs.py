"""mode=reasoning_table: the tables of arms, from rows in folders alone; both modes as commands."""

import json

import pytest

from data.errors import DataError
from modes import reasoning_table
from runtime.errors import ConfigError
from runtime.run import load_summary
from runtime.validation import validate
from tests.benchmark_runs import gym
from tests.reasoning_runs import SHORT
from tests.support import compose_config


def write(folder, arm, benchmark, counts, ids="pqrs", **more):
    """Rows of an arm, two samples of each problem; `counts` says how many are right."""
    rows = [
        {
            "arm": arm, "benchmark": benchmark, "id": problem, "sample_idx": sample, "gold": "6",
            "prediction": "6", "correct": sample < right, "completion": "6",
            "completion_tokens": 10 * right + sample, "finish_reason": "stop", "seed": 1,
            "prompt_sha": "p", "grader_version": "g", "choices": 4,
        } | more
        for problem, right in zip(ids, counts, strict=True)
        for sample in range(2)
    ]  # fmt: skip
    (folder / arm).mkdir(parents=True, exist_ok=True)
    path = folder / arm / f"{benchmark}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def table(folder, *overrides):
    cfg = compose_config("mode=reasoning_table", *overrides, run_dir=folder / "table")
    validate(cfg)
    return reasoning_table.run(cfg)


def note(folder, arm, fingerprint, temperature=0.6, target="best.ckpt"):
    """The conditions of an arm's answers to benchmark x."""
    model = {"target": target, "fingerprint": fingerprint}
    one = {"model": model, "settings": {"temperature": temperature, "seed": 1}, "prefix": ""}
    (folder / arm / "conditions.json").write_text(json.dumps({"x": one}))


def test_halves_of_two_models_are_no_arm_and_other_settings_are_said(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, "base", "x", [0, 1], ids="pq")
    write(two, "base", "x", [1, 2], ids="rs")
    write(two, "rlmt", "x", [1, 1, 2, 2])
    note(one, "base", "f")
    note(two, "base", "f", target="elsewhere/best.ckpt")
    note(two, "rlmt", "g", temperature=1.0)
    runs = f"mode.runs=[{one},{two}]"
    table(tmp_path, runs)
    notes = json.loads((tmp_path / "table" / "reasoning_table.json").read_text())["notes"]
    assert notes[0] == "x: settings.temperature is 0.6 in base and 1.0 in rlmt"
    assert notes[1].startswith("rows: ")
    note(two, "base", "g")
    with pytest.raises(DataError, match=r"two/base/conditions\.json: arm=base has answers of"):
        table(tmp_path, runs)
    # A server says of its model no more than the name.
    note(one, "base", None, target="a")
    note(two, "base", None, target="b")
    with pytest.raises(DataError, match=r"arm=base has answers of another model here than by "):
        table(tmp_path, runs)


def test_folders_of_two_hosts(tmp_path, capsys):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, "base", "x", [0, 1, 2, 0])
    write(one, "base", "y", [1, 1, 1, 1])
    write(two, "rlmt", "x", [1, 1, 2, 2])
    write(two, "rlmt", "y", [0, 0], ids="pq")
    # The other half of this benchmark ran on the first host.
    write(one, "rlmt", "y", [2, 0], ids="rs")
    (one / "base" / "partial.jsonl").write_text('{"id": "p/0"}\n')  # answers, no samples
    metrics = table(tmp_path, f"mode.runs=[{one},{two}]")
    assert metrics["mean/base/x"] == 3 / 8 and metrics["mean/rlmt/x"] == 6 / 8
    assert metrics["any/rlmt/y"] == 1 / 4 and metrics["any/base/Macro"] == (2 / 4 + 1) / 2
    assert metrics["tokens/base/x"] == pytest.approx(10 * 3 / 4 + 0.5)
    assert metrics["delta_mean/rlmt-base/x"] == 3 / 8
    assert metrics["delta_mean/rlmt-base/Macro"] == (3 / 8 + 2 / 8 - 4 / 8) / 2
    assert metrics["delta_any_p/rlmt-base/x"] <= 1 and "delta_tokens_low/rlmt-base/y" in metrics
    out = capsys.readouterr().out
    assert "| rlmt vs base | Macro | +0.062500 |" in (
        tmp_path / "table" / "reasoning_table.md"
    ).read_text() and "rlmt vs base" in out  # fmt: skip
    found = json.loads((tmp_path / "table" / "reasoning_table.json").read_text())
    assert [(row["arm"], row["benchmark"]) for row in found["rows"]] == [
        ("base", "x"), ("base", "y"), ("rlmt", "x"), ("rlmt", "y"),
    ]  # fmt: skip
    assert found["rows"][0]["chance"] == {"mean": 0.25, "passed": 0.4375}
    assert found["rows"][0]["pass_at"]["1"]["value"] == 3 / 8 and found["samples"] == 2
    picture = (tmp_path / "table" / "reasoning_table.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 5000


def test_which_arms_benchmarks_and_comparisons(tmp_path, monkeypatch):
    monkeypatch.setattr(reasoning_table, "plot_reasoning", lambda path, table: None)
    for arm in ("a", "b", "c"):
        write(tmp_path / "run", arm, "x", [1, 0, 2, 0])
        write(tmp_path / "run", arm, "y", [1, 0, 2, 0])
    chosen = (f"mode.runs={tmp_path}/run", "mode.arms=[c,a,b]", "mode.benchmarks=[y]")
    metrics = table(tmp_path, *chosen)
    deltas = [key for key in metrics if key.startswith("delta_mean/")]
    assert deltas == [
        f"delta_mean/{pair}/{name}" for pair in ("a-c", "b-a") for name in ("y", "Macro")
    ]
    metrics = table(tmp_path, *chosen, "mode.comparisons=[[b,c]]")
    deltas = [key for key in metrics if key.startswith("delta_mean/")]
    assert deltas == ["delta_mean/b-c/y", "delta_mean/b-c/Macro"]
    with pytest.raises(ConfigError, match=r"mode\.comparisons: no arm d; allowed: pairs \[RIGH"):
        table(tmp_path, *chosen, "mode.comparisons=[[d,c]]")
    with pytest.raises(ConfigError, match=r"mode\.comparisons: \[a,a\] is one arm twice; allowed"):
        table(tmp_path, *chosen, "mode.comparisons=[[b,c],[a,a]]")
    table(tmp_path, chosen[0], "mode.arms=[a,c]", chosen[2])
    notes = json.loads((tmp_path / "table" / "reasoning_table.json").read_text())["notes"]
    assert notes[-1] == f"rows: {tmp_path}/run/a/y.jsonl, {tmp_path}/run/c/y.jsonl"
    with pytest.raises(ConfigError, match=r"mode\.arms=\[d\]: no d; allowed: a, b, c"):
        table(tmp_path, chosen[0], "mode.arms=[d]")
    with pytest.raises(ConfigError, match=r"mode\.comparisons=.*\[\[RIGHT,LEFT\],\.\.\.\]"):
        table(tmp_path, chosen[0], "mode.comparisons=[[d,c,b]]")


def test_rows_that_are_missing_or_there_twice(tmp_path):
    run = tmp_path / "run"
    write(run, "a", "x", [1, 0, 2, 0])
    path = write(run, "b", "x", [1, 0, 2, 0])
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:5] + lines[6:]))
    with pytest.raises(DataError, match=r"arm=b, benchmark=x: 1 of 8 .* are missing: \('r', 1\)"):
        table(tmp_path, f"mode.runs={run}")
    path.write_text("".join([*lines, lines[2]]))
    with pytest.raises(DataError, match=r"x\.jsonl:9: a second row of arm=b, .*id='q', sample_i"):
        table(tmp_path, f"mode.runs={run}")
    with pytest.raises(ConfigError, match=r"mode\.runs=\[.*/run/a\]: no ARM/BENCHMARK\.jsonl"):
        table(tmp_path, f"mode.runs={run}/a")


def test_both_modes_as_commands(tmp_path, call):
    pytest.importorskip("reasoning_gym", reason="needs the package reasoning_gym")
    kept = [text for text in gym(*SHORT) if text != "mode=benchmark_eval"]
    done = call("mode=reasoning_eval", *kept, f"paths.run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    found = load_summary(tmp_path)
    assert (found["mode"], found["status"]) == ("reasoning_eval", "done")
    tokens = found["metrics"]["reasoning/reasoning_gym/tokens"]
    # The folder of the runs is where tables look by themselves.
    done = call("mode=reasoning_table", f"paths.run_dir={tmp_path}")
    assert done.returncode == 0, done.stderr
    metrics = load_summary(tmp_path)["metrics"]
    assert metrics["tokens/one/reasoning_gym"] == metrics["tokens/one/Macro"] == tokens > 0
    assert "Direct comparisons" not in (tmp_path / "reasoning_table.md").read_text()
