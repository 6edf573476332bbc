"""mode=compare on folders written by hand, and on real runs through main.py."""

import csv
import json
import math
import shutil

import pytest
from omegaconf import OmegaConf

from data.errors import DataError
from modes.compare import run
from runtime.errors import ConfigError
from runtime.run import load_summary
from tests.runs import call_main, tiny
from tests.support import compose_config


def write_run(folder, seed, val_nll, *overrides, status="done", mode="train", **metrics):
    """A run folder: config.yaml and summary.json."""
    cfg = compose_config(f"seed={seed}", *overrides, run_dir=folder)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(cfg, resolve=True))
    found = ({} if val_nll is None else {"val/nll": val_nll}) | metrics
    summary = {"mode": mode, "algo": "mdlm", "status": status, "steps": 3, "wall_s": 1.0,
               "metrics": found, "provenance": {}}  # fmt: skip
    if status != "done":
        summary["error"] = "NonFiniteError: loss at step 3"
    (folder / "summary.json").write_text(json.dumps(summary))


DEPENDENCY = "masking=dependency"


@pytest.fixture
def sweep(written_sweep, tmp_path):
    """mix_alpha 0, 0.5 and 1 with three seeds: 3.0, 2.9 and 2.6, and 0.1 more per seed."""
    return shutil.copytree(written_sweep, tmp_path / "sweep")


@pytest.fixture(scope="module")
def written_sweep(tmp_path_factory):
    """Composing nine configurations takes longer than what is tested on them."""
    folder = tmp_path_factory.mktemp("written")
    for alpha, nll in ((0, 3.0), (0.5, 2.9), (1, 2.6)):
        for seed in (1, 2, 3):
            options = (DEPENDENCY, f"masking.mix_alpha={alpha}")
            write_run(folder / f"{alpha}-{seed}", seed, nll + 0.1 * seed, *options, other=1.0)
    return folder


def compared(tmp_path, runs, *overrides):
    """Summary and lines of a comparison."""
    out = tmp_path / "out"
    cfg = compose_config("mode=compare", f"mode.runs={runs}", *overrides, run_dir=out)
    metrics = run(cfg)
    with (out / "compare.csv").open(newline="") as file:
        return metrics, list(csv.DictReader(file))


def test_a_sweep_over_one_number(sweep, tmp_path, capsys):
    metrics, lines = compared(tmp_path, f"{sweep}/*")
    assert metrics == {"runs": 9, "left_out": 0, "groups": 3, "lacking": 0}
    assert [line["masking.mix_alpha"] for line in lines] == ["0", "0.5", "1"]
    assert [float(line["mean"]) for line in lines] == pytest.approx([3.2, 3.1, 2.8])
    assert all(float(line["sd"]) == pytest.approx(0.1) and line["n"] == "3" for line in lines)
    half = 4.302653 * 0.1 / math.sqrt(3)
    assert float(lines[0]["high"]) == pytest.approx(3.2 + half)
    # Differences by seed are constant, so their interval is a point: pairing pays.
    assert [float(line["difference"]) for line in lines[1:]] == pytest.approx([-0.1, -0.4])
    assert float(lines[2]["difference_low"]) == pytest.approx(-0.4)
    assert json.loads(lines[2]["values"]) == pytest.approx([2.7, 2.8, 2.9])
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    said, table = capsys.readouterr().out, (tmp_path / "out" / "compare.md").read_text()
    for text in (said, table):
        assert "difference to masking.mix_alpha=0, of runs with equal seeds" in text
        assert "plot over masking.mix_alpha" in text and "1:2.7000 2:2.8000 3:2.9000" in text
        assert "9 runs compared, 0 left out" in text
    assert table.startswith("## val/nll\n\n| masking.mix_alpha | n |")


@pytest.mark.parametrize(
    "reference", ["{masking.mix_alpha:0.5}", '"masking.mix_alpha=0.5"', '"masking.mix_alpha=.50"']
)
def test_another_reference(sweep, tmp_path, reference):
    _, lines = compared(tmp_path, f"{sweep}/*", f"mode.reference={reference}")
    assert lines[1]["difference"] == ""
    assert float(lines[0]["difference"]) == pytest.approx(0.1)


def test_nothing_is_dropped_in_silence(sweep, tmp_path, capsys):
    """Failed, unfinished, damaged and foreign folders, and runs without the metric, are named."""
    write_run(sweep / "x1", 4, 1.0, DEPENDENCY, "masking.mix_alpha=1", status="nonfinite")
    write_run(sweep / "x2", 4, 1.0, DEPENDENCY, "masking.mix_alpha=1", mode="audit")
    write_run(sweep / "x3", 4, None, DEPENDENCY, "masking.mix_alpha=1", other="nan", rest=1.0)
    (sweep / "x4").mkdir()
    write_run(sweep / "x5", 4, 1.0)
    (sweep / "x5" / "summary.json").unlink()
    write_run(sweep / "x6", 4, 1.0)
    (sweep / "x6" / "summary.json").write_text("{")
    (sweep / "multirun.yaml").write_text("a: 1")
    metrics, lines = compared(tmp_path, f"{sweep}/*", "mode.metrics=[val/nll,other]")
    assert metrics == {"runs": 10, "left_out": 5, "groups": 3, "lacking": 2}
    assert (lines[2]["runs"], lines[2]["n"], float(lines[2]["mean"])) == (
        "4",
        "3",
        pytest.approx(2.8),
    )
    said = capsys.readouterr().out
    for name, reason in (
        ("x1", "nonfinite: NonFiniteError: loss at step 3"), ("x2", "mode=audit measures no model"),
        ("x4", "no config.yaml"), ("x5", "no summary.json"),
        ("x6", "cannot be read (JSONDecodeError"),
    ):  # fmt: skip
        assert f"left out: {sweep / name}: {reason}" in said
    assert f"without a finite val/nll: 1 runs: {sweep / 'x3'}" in said
    assert f"without a finite other: 1 runs: {sweep / 'x3'}" in said
    assert "3 of 4" in said


@pytest.mark.parametrize(
    ("config", "summary", "reason"),
    [
        ("[1, 2]", {}, "config.yaml and summary.json do not hold keys and values"),
        ("paths: {}", {}, "config.yaml: seed is no integer"),
        ("seed: ???", {}, "config.yaml: seed is no integer"),
        ("seed: many", {}, "config.yaml: seed is no integer"),
        ("seed: 4\npaths: [a]", {}, "cannot be read (AttributeError: "),
        ("seed: 4\nsome: ${nowhere}", {}, "cannot be read (InterpolationKeyError: "),
        (f"seed: 4\nsome: 1{'0' * 400}", {}, "cannot be read (OverflowError: "),
        ("seed: 4", {"metrics": None}, "summary.json: metrics=None"),
        ("seed: 4", {"metrics": [1.0]}, "summary.json: metrics=list"),
        ("seed: 4", {"status": ["a"]}, "list"),
        ("seed: 4", [], "config.yaml and summary.json do not hold keys and values"),
        ("\x00", {}, "cannot be read (ReaderError: "),
    ],
)
def test_an_odd_folder_ends_no_comparison(sweep, tmp_path, capsys, config, summary, reason):
    write_run(sweep / "odd", 4, 1.0)
    (sweep / "odd" / "config.yaml").write_text(config)
    if isinstance(summary, dict):
        summary = load_summary(sweep / "odd") | summary
    (sweep / "odd" / "summary.json").write_text(json.dumps(summary))
    metrics, _ = compared(tmp_path, f"{sweep}/*")
    assert metrics == {"runs": 9, "left_out": 1, "groups": 3, "lacking": 0}
    assert f"left out: {sweep / 'odd'}: {reason}" in capsys.readouterr().out


def test_default_metrics_are_those_that_all_runs_share(tmp_path):
    for seed, more in ((1, {"nll": 1.0, "gap": 0.1}), (2, {"nll": 2.0})):
        write_run(tmp_path / f"runs/{seed}", seed, 5.0, **more)
    metrics, lines = compared(tmp_path, f"{tmp_path}/runs/*")
    assert [line["metric"] for line in lines] == ["nll", "val/nll"]
    assert metrics["groups"] == 1 and float(lines[0]["mean"]) == 1.5
    assert not (tmp_path / "out" / "compare.png").exists()


def test_folders_seeds_and_checkpoints_make_no_group(tmp_path, capsys):
    """Evaluations of one configuration's checkpoints: what differs is where they lie, and seeds."""
    for seed in (1, 2):
        (tmp_path / f"{seed}.ckpt").touch()
        place = f"eval.checkpoint_path={tmp_path}/{seed}.ckpt"
        write_run(
            tmp_path / f"runs/{seed}", seed, None, place, f"paths.cache_dir=/c{seed}", nll=seed
        )
    listed = f"[{tmp_path}/runs/1,{tmp_path}/runs/2,{tmp_path}/runs/*]"
    metrics, _ = compared(tmp_path, listed)
    assert metrics["groups"] == 1 and metrics["runs"] == 2, "a folder counts once"
    metrics, lines = compared(tmp_path, listed, "mode.ignore=[]")
    assert metrics["groups"] == 2 and "eval.checkpoint_path" in lines[0]
    assert "no plot: no number differs" in capsys.readouterr().out


def test_lines_of_a_plot_are_the_other_keys(sweep, tmp_path):
    for seed in (1, 2):
        options = (DEPENDENCY, "masking.mix_alpha=0", "optim.lr=0.1")
        write_run(sweep / f"lr-{seed}", seed, 2.0, *options)
    metrics, lines = compared(tmp_path, f"{sweep}/*", "mode.x=optim.lr")
    assert metrics["groups"] == 4 and {"optim.lr", "masking.mix_alpha"} < set(lines[0])
    with pytest.raises(
        ConfigError, match=r"mode\.x=masking\.name: .* allowed: masking\.mix_alpha,"
    ):
        compared(tmp_path, f"{sweep}/*", "mode.x=masking.name")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode.runs={0}/none*"], r"mode\.runs=\S+none\*: no finished run there \(nothing fits\)"),
        (["mode.runs={0}/none"], r"mode\.runs=\S+/none: no such folder"),
        (["mode.runs=[{0}]"], r"no finished run there \(\S+sweep: no config\.yaml\)"),
        (["mode.metrics=[val/nll,ppl]"], r"no run has ppl; allowed: other, val/nll"),
        (['mode.reference="masking.mix_alpha=7"'], r"fits 0 groups; allowed: one of masking\.mix"),
        (['mode.reference="a=1,b"'], r"mode\.reference=a=1,b: allowed KEY=VALUE"),
        (
            ["mode.x=seed"],
            r"mode\.x=seed: not a number that differs .* allowed: masking\.mix_alpha",
        ),
    ],
)
def test_what_users_get_wrong(sweep, tmp_path, overrides, message):
    overrides = [text.replace("{0}", str(sweep)) for text in overrides]
    runs = [] if overrides[0].startswith("mode.runs") else [f"mode.runs={sweep}/*"]
    cfg = compose_config("mode=compare", *runs, *overrides, run_dir=tmp_path / "out")
    with pytest.raises((ConfigError, DataError), match=message) as error:
        run(cfg)
    assert "\n" not in str(error.value)


def test_runs_without_a_common_metric(tmp_path):
    write_run(tmp_path / "runs/1", 1, None, tokens=1.0)
    with pytest.raises(ConfigError, match=r"mode\.metrics=null: .* allowed: a list of tokens"):
        compared(tmp_path, f"{tmp_path}/runs/*")


def test_a_seed_twice(sweep, tmp_path):
    write_run(sweep / "again", 1, 3.0, DEPENDENCY, "masking.mix_alpha=0")
    with pytest.raises(DataError, match="the same configuration and seed=1; leave one of them out"):
        compared(tmp_path, f"{sweep}/*")


def test_real_runs_through_main(tmp_path, capsys):
    for seed in (1, 2):
        for rate in ("1e-2", "1e-3"):
            options = (f"seed={seed}", f"optim.lr={rate}", "trainer.max_steps=2")
            call_main([*tiny(tmp_path), *options, f"paths.run_dir={tmp_path}/runs/{rate}-{seed}"])
    capsys.readouterr()
    code = call_main(["mode=compare", f"mode.runs={tmp_path}/runs/*", "mode.metrics=[val/ppl]",
                      "trainer=cpu", f"paths.run_dir={tmp_path}/runs/compared"])  # fmt: skip
    assert code == 0
    said = capsys.readouterr().out
    assert "optim.lr" in said and "4 runs compared, 0 left out" in said
    found = load_summary(tmp_path / "runs/compared")
    assert found["metrics"] == {"runs": 4, "left_out": 0, "groups": 2, "lacking": 0}
    ppl = load_summary(tmp_path / "runs/1e-2-1")["metrics"]["val/ppl"]
    assert f"1:{ppl:.4f}" in said
