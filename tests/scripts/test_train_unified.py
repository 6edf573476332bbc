"""The published command line means what it says it means."""

import subprocess
import sys

import pytest
from omegaconf import OmegaConf

from scripts.train_unified import REMARK, main, names, translate
from tests.support import ROOT, compose_config, environment

PERROUND = "qwen3_4b_stage3_nce_resume7335_beam_perround_6n"
CONFIG = f"configs/large_scale/{PERROUND}.yaml"


# What a command line says, and where it has to arrive.
MEANINGS = [
    (
        "combine=beam_bayes combine=perround score_scale=learnable optim.lr=0.25",
        {"bon.proposal._target_": "decoding.candidates.BeamBayes", "bon.score_agg": "perround",
         "scorer.scale.mode": "learnable", "optim.lr": 0.25, "bon.rounds": 2},
    ),
    (
        "combine=softmax_sampling combine=lastround score_scale=fixed proposal_temperature=0.6",
        {"bon.proposal._target_": "decoding.candidates.SoftmaxSampling",
         "bon.score_agg": "lastround", "scorer.scale.mode": "fixed",
         "bon.proposal.temperature": 0.6, "bon.count": 4, "bon.alpha": 0.5},
    ),
    (
        "combine=select_each score_scale=b2fix",
        {"bon.score_agg": "select_each", "bon.rounds": 1, "scorer.scale.mode": "learnable",
         "scorer.scale.dtype": "float32", "trainer.max_steps": 1371},
    ),
]  # fmt: skip
# Before them, so that no default passes for a translation.
OPPOSITES = (
    "bon/proposal=beam_exact bon.score_agg=select_each scorer.scale.mode=learnable",
    "bon.score_agg=perround scorer.scale.mode=learnable",
    "bon.score_agg=perround scorer.scale.mode=fixed scorer.scale.dtype=bfloat16",
)


@pytest.mark.parametrize(
    ("line", "meaning", "opposite"),
    [(*case, opposite) for case, opposite in zip(MEANINGS, OPPOSITES, strict=True)],
)
def test_old_names_reach_their_keys(line, meaning, opposite):
    overrides = translate(["--config", CONFIG, *opposite.split(), *line.split()])
    cfg = compose_config(*overrides)
    assert {key: OmegaConf.select(cfg, key) for key in meaning} == meaning


@pytest.mark.parametrize("folder", ["run/checkpoint-00008706-20260501_081812", "./a b=1/c,d"])
def test_resume_names_the_folder(folder):
    cfg = compose_config(*translate(["--resume", folder, "--config", CONFIG]))
    assert cfg.checkpointing.resume_ckpt_path == folder


@pytest.mark.parametrize("spelling", [PERROUND, f"{PERROUND}.yaml", f"/else/where/{PERROUND}.yaml"])
def test_a_run_is_known_by_its_name(spelling):
    assert translate(["--config", spelling]) == [f"experiment=large_scale/{PERROUND}"]


def test_every_published_run_has_its_twin():
    published = {name for name in names() if not name.endswith("_smoke")}
    assert {f"{name}_smoke" for name in published} | published == set(names())
    stage3 = "qwen3_4b_stage3_nce_resume7335"
    assert published >= {
        f"{stage3}_{variant}_6n"
        for variant in ("beam_perround", "beam_lastround", "temp07_perround")
    }


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--config"),
        (["--config", "configs/large_scale/qwen3_8b.yaml"], f"no such run; allowed: {names()[0]}"),
        (["--config", "qwen3_4b_6n"], "no such run"),
        (["--config", CONFIG, "combine=best"], "combine=best: unknown; allowed: beam_bayes"),
        (["--config", CONFIG, "score_scale=b3"], "allowed: learnable, fixed, b2fix"),
        (["--config", CONFIG, "--steps", "3"], "--steps; allowed: --config NAME, --resume DIR"),
        (["--conf", CONFIG], "--config"),
    ],
)
def test_what_nobody_knows_is_one_line(arguments, told, capsys):
    assert main(arguments) == 2
    out, error = capsys.readouterr()
    (line,) = error.splitlines()
    assert line.startswith("ConfigError: ") and told in line and not out


def test_it_becomes_main(tmp_path):
    """Which has checks of its own; here of the last override."""
    start = tmp_path / "a.ckpt"
    start.touch()
    script = str(ROOT / "scripts" / "train_unified.py")
    more = [f"training.from_pretrained={start}", "score_scale=b2fix", "optim.lr=-1"]
    done = subprocess.run(
        [sys.executable, script, "--config", CONFIG, *more],
        env=environment(), capture_output=True, text=True,
    )  # fmt: skip
    remark, command = done.stdout.splitlines()
    assert remark == REMARK
    assert command.startswith(f"python main.py experiment=large_scale/{PERROUND} {more[0]} scorer.")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("ConfigError: optim.lr=-1: wrong value")
