"""mode=rlmt_table: files of runs in, a table out."""

import json

import pytest

from evaluation.rlmt_table import AVERAGES
from modes import rlmt_table
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.support import compose_config


def write(folder, **changes):
    """The metrics.json of a run of two steps."""
    known = {"loss": "nan", **dict.fromkeys(AVERAGES, 0.5)}
    steps = [{"step": n, "reward_mean": 0.25 * n, **known} for n in (1, 2)]
    found = {"arm": folder.name, "completed_steps": 2, "stopped_reason": None, "wall_time_s": 1.5,
             "final": steps[-1], "history": steps}  # fmt: skip
    folder.mkdir(exist_ok=True)
    (folder / "metrics.json").write_text(json.dumps({**found, **changes}))


def run(folder, *runs):
    listed = ",".join(str(folder / name) for name in runs)
    cfg = compose_config("mode=rlmt_table", f"mode.runs=[{listed}]", run_dir=folder / "table")
    validate(cfg)
    return rlmt_table.run(cfg)


def test_the_table_of_two_runs(tmp_path, capsys):
    write(tmp_path / "b")
    write(tmp_path / "a", stopped_reason="non-finite loss", completed_steps=1)
    metrics = run(tmp_path, "b", "a")
    assert (metrics["b/reward_mean"], metrics["b/final_reward"]) == (0.375, 0.5)
    assert metrics["a/completed_steps"] == 1 and metrics["a/wall_time_s"] == 1.5
    text = (tmp_path / "table" / "rlmt_table.md").read_text()
    assert "| b | 2 | null | 0.375000 | 0.500000 | 0.5000 |" in text
    assert "| a | 1 | non-finite loss |" in text and "runs: " in text
    found = json.loads((tmp_path / "table" / "rlmt_table.json").read_text())
    assert [row["arm"] for row in found["rows"]] == ["b", "a"]
    assert (tmp_path / "table" / "rlmt_table.png").read_bytes()[:4] == b"\x89PNG"
    assert "Avg Length Drift" in capsys.readouterr().out


@pytest.mark.parametrize(("changes", "message"), [
    ({"arm": 3}, "arm=3; allowed: a text"),
    ({"stopped_reason": 1}, "stopped_reason=1; allowed: a text or null"),
    ({"completed_steps": -1}, "completed_steps=-1; allowed: an integer >= 0"),
    ({"history": [{"reward_mean": "x"}]}, "history="),
    ({"arm": "b"}, "two runs are of arm b"),
    ({"history": [{"kept_rate": 1.0, "kl": 0.1}]},
     r"arm a: no step has reward_mean, .*; allowed: runs of algo=rlmt, rlmt_paper"),
], ids=lambda value: value if isinstance(value, str) else "")  # fmt: skip
def test_refusals(tmp_path, changes, message):
    write(tmp_path / "b")
    write(tmp_path / "a", **changes)
    with pytest.raises(ConfigError, match=message):
        run(tmp_path, "b", "a")
    (tmp_path / "a" / "metrics.json").unlink()
    with pytest.raises(ConfigError, match=r"metrics\.json: cannot be read"):
        run(tmp_path, "b", "a")
