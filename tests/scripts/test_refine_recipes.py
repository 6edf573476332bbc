"""Recipes of the draft-refine runs: their numbers, their chain, their twins from text to table."""

import csv
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

from dataloader import LanguageData
from objectives.refinement import injection_rate
from runtime.checkpoint import read_checkpoint
from runtime.full_state import full_states, step_of
from runtime.run import load_summary
from runtime.trainer import accumulation_steps
from tests.support import ROOT, compose_config, environment

LARGE = "experiment=large_scale/qwen3_4b_"
STAGE3 = "stage3_nce_resume7335_"
# Steps of a scorer's training, and of its published folder, which counts on from stage 2.
PUBLISHED = {
    "beam_perround_6n": (1371, 8706),
    "beam_perround_6n_b2fix": (1371, 8706),
    "beam_lastround_6n": (3098, 10433),
    "temp07_perround_6n": (1789, 9124),
}


def config(name: str) -> DictConfig:
    """A stage in its own folder; FSDP without the GPUs that it asks for."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        return compose("config", [f"{LARGE}{name}", "trainer.accelerator=auto"])


@pytest.fixture(scope="module")
def stages() -> list[DictConfig]:
    names = ["stage1_masked_6n", "stage2_draft_refine_6n", f"{STAGE3}beam_perround_6n"]
    return [config(name) for name in names]


def test_numbers_that_all_stages_share(stages):
    for cfg in stages:
        assert (cfg.model.name, cfg.model.mask_token, cfg.model.length) == (
            "qwen3_4b_base", 151669, 4096,
        )  # fmt: skip
        assert (cfg.block_size, cfg.data.align, cfg.data.join, cfg.data.wrap) == (4, 4, True, False)
        assert cfg.data.insert_train_eos and not cfg.data.insert_train_special
        optim = cfg.optim
        assert (optim.lr, optim.weight_decay, optim.beta1, optim.beta2) == (5e-5, 0.01, 0.9, 0.999)
        assert (cfg.lr_scheduler.name, cfg.lr_scheduler.warmup_steps) == ("constant_warmup", 250)
        assert (cfg.seed, cfg.training.ema, cfg.trainer.gradient_clip_val) == (42, 0, 1.0)
        assert (cfg.trainer.num_nodes, cfg.trainer.devices) == (6, 4)
        assert cfg.trainer.precision == "bf16-mixed"
        assert cfg.loader.global_batch_size == 144 and accumulation_steps(cfg) == 3
    assert all(cfg.algo.gradient_checkpointing for cfg in stages[:2])
    assert stages[0].trainer.max_steps == round(2e9 / (144 * 4096))


def test_the_injection_ends_inside_of_stage_2(stages):
    """Which is what the comment on the batch gives as its reason."""
    cfg = stages[1]
    assert cfg.algo.max_passes == 3 and cfg.trainer.max_steps == 7335
    rates = [
        injection_rate(cfg.trainer.max_steps * batch * 4096, **cfg.algo.injection)
        for batch in (120, 144)
    ]
    assert rates[0] > 0.1 and rates[1] == 0.1
    assert injection_rate(0, **cfg.algo.injection) == 0.3
    steps = [n for n in range(6770, 6790) if injection_rate(n * 144 * 4096, 0.3, 0.1, 4e9) == 0.1]
    assert steps[0] == 6782


def test_stages_find_each_other(stages):
    """A stage starts from a file that the one before is sure to leave."""
    folders = [f"{cfg.paths.run_dir}/checkpoints" for cfg in stages]
    assert len(set(folders)) == 3
    starts = [cfg.training.from_pretrained for cfg in stages]
    assert starts == [None, f"{folders[0]}/last.ckpt", f"{folders[1]}/step7335.ckpt"]
    assert 7335 % stages[1].checkpointing.keep_every_n_steps == 0


@pytest.mark.parametrize("variant", PUBLISHED)
def test_scorers(variant):
    cfg, (steps, counted) = config(f"{STAGE3}{variant}"), PUBLISHED[variant]
    # As stage3.sh has it.
    assert cfg.paths.run_dir.endswith(f"/stage3_{variant.replace('_6n', '')}")
    assert cfg.trainer.max_steps == steps and 7335 + steps == counted
    assert cfg.bon.count == 4 and cfg.bon.alpha == 0.5 and cfg.bon.rounds == 2
    assert cfg.bon.score_agg == ("lastround" if "lastround" in variant else "perround")
    proposal = dict(cfg.bon.proposal)
    if "temp07" in variant:
        assert proposal["temperature"] == 0.7 and proposal["_target_"].endswith("SoftmaxSampling")
    else:
        assert proposal == {"_target_": "decoding.candidates.BeamBayes", "max_swap": 1}
    assert cfg.nce.loss["_target_"].endswith(".ranking")
    scale = cfg.scorer.scale
    learns = variant.endswith("b2fix")
    assert (scale.mode, scale.dtype) == ("learnable" if learns else "fixed", "float32")
    assert cfg.trainer.strategy == "ddp" and cfg.model.dtype == "bfloat16"
    assert cfg.checkpointing.full_state_every_n_steps == 500


def test_the_arithmetic_of_the_plateau():
    """What the comment on the fixed scale says of numbers in bf16."""
    one = torch.ones((), dtype=torch.bfloat16)
    up, down = (torch.nextafter(one, one + sign) - one for sign in (1, -1))
    assert (round(float(up), 4), round(-float(down), 4)) == (0.0078, 0.0039)
    assert one + 5e-5 == one == one - 5e-5
    assert 0.068 < 1371 * 5e-5 < 0.0695
    assert round(math.log(1 + 4 * math.exp(-2)), 2) == 0.43


def test_plain_text_becomes_documents_in_blocks(tmp_path):
    """experiment=block_text, on any model: a document begins with a block and ends with EOS."""
    texts = ["a bc", "defghij", "klmnopqrstuvw", "xy"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    cfg = compose_config(
        "experiment=block_text", "algo=masked_adapt", "model=tiny_causal", "data=text",
        f"data.files={tmp_path}/a.jsonl", f"data.valid_files={tmp_path}/a.jsonl",
        f"paths.cache_dir={tmp_path}/cache", "loader.global_batch_size=1",
    )  # fmt: skip
    data = LanguageData(cfg)
    (batch,) = data.eval_loader("validation", rank=0, world=1)
    ids_L, segment_L, response_L = (batch[k][0] for k in ("input_ids", "segment", "response"))
    found = []
    for number in range(len(texts)):
        place_P = (segment_L == number).nonzero()[:, 0]
        assert place_P[0] % 4 == 0 and len(place_P) % 4 == 0
        # The EOS of a document is learnt, those that fill its last block are not.
        answer_P = place_P[response_L[place_P] == 1]
        after_P = ids_L[place_P[len(answer_P) :]]
        assert (after_P == data.special.eos).all()
        found.append(data.tokenizer.decode(ids_L[answer_P]))
    assert sorted(found) == sorted(text + data.tokenizer.eos_token for text in texts)


def run_recipe(folder: Path, script: str, *arguments: str, **variables: str) -> None:
    """A script of scripts/refine on small data, into `folder`."""
    settings = {
        "SMOKE": "1", "OUT": str(folder / "out"), "SMOKE_DIR": str(folder / "data"),
        "PYTHON": sys.executable, "PALIMPSEST_CACHE": str(folder / "cache"), **variables,
    }  # fmt: skip
    done = subprocess.run(
        [str(ROOT / "scripts" / "refine" / script), *arguments],
        env=environment(**settings), capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]


def column(folder: Path, name: str) -> list[float]:
    """A column of metrics.csv where it holds something."""
    with (folder / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row[name]]


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_smoke_twins_run_the_whole_recipe(tmp_path):
    """Text, stage 1, stage 2, four scorers from the same checkpoint, and what they are worth."""
    pytest.importorskip("reasoning_gym")
    answers = {
        "BENCHMARKS": "reasoning_gym",
        "BENCHMARK_OPTIONS": "mode.limit=2 benchmark.reasoning_gym.max_new_tokens=8",
    }
    run_recipe(tmp_path, "stage1.sh")
    run_recipe(tmp_path, "stage2.sh", **answers)
    run_recipe(tmp_path, "stage3.sh", "beam_perround", **answers)
    variants = ("beam_lastround", "temp07_perround", "beam_perround_b2fix")
    for variant in variants:
        run_recipe(tmp_path, "stage3.sh", variant)
    out = tmp_path / "out"
    refined = read_checkpoint(out / "stage2" / "checkpoints" / "step8.ckpt")["state_dict"]
    for stage in ("stage1", "stage2", *(f"stage3_{v}" for v in ("beam_perround", *variants))):
        summary = load_summary(out / stage)
        assert (summary["status"], summary["steps"]) == ("done", 8)
        if not stage.startswith("stage3"):
            continue
        states = full_states(out / stage / "checkpoints")
        assert [step_of(state) for state in states] == [4, 8]
        weights = read_checkpoint(states[-1])["state_dict"]
        assert all(torch.equal(weights[name], refined[name]) for name in refined)
        moved = column(out / stage, "train/gamma_moved")
        assert any(moved) == stage.endswith("b2fix")
        assert "oracle" in load_summary(out / stage / "scorer")["metrics"]
    assert (out / "stage3_beam_perround" / "table" / "benchmark_table.md").is_file()
