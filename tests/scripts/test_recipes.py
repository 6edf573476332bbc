"""Recipes of the published runs: their numbers, their folders, and their twins on small data."""

import os
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from runtime.run import load_summary
from runtime.trainer import accumulation_steps
from tests.support import ROOT, compose_config, environment

NAME = "a0.0625_normalized_dependency_reverseTrue"


def test_numbers_of_the_model_card():
    cfg = compose_config("experiment=train_lm1b_bd3lm_dep")
    assert (cfg.algo.name, cfg.block_size, cfg.training.resample) == ("bd3lm", 16, True)
    assert cfg.algo.var_min and list(cfg.algo.clip_search_widths) == [0.5, 0.6, 0.7, 0.8, 0.9]
    assert (cfg.model.name, cfg.model.length, cfg.model.attn_backend) == ("small", 128, "sdpa")
    masking = cfg.masking
    assert (masking.mix_alpha, masking.depth_mode, masking.reverse) == (0.0625, "dependency", True)
    assert masking.normalize_depth is True and masking.depth_temp == 1.0
    assert cfg.loader.global_batch_size == 512 and cfg.loader.batch_size == 64
    assert cfg.trainer.devices == 4 and accumulation_steps(cfg) == 2
    assert cfg.trainer.max_steps == 150_000 and cfg.data.parse.name == "stanza"
    mdlm = compose_config("experiment=train_lm1b_mdlm_dep")
    assert mdlm.algo.name == "mdlm" and mdlm.trainer.max_steps == 850_000
    assert mdlm.masking == masking and not mdlm.algo.var_min and mdlm.data.wrap


@pytest.mark.parametrize("suffix", ["", "_smoke"])
def test_folders_are_named_by_their_options(suffix):
    """In single runs and in sweeps; each block diffusion starts from its own MDLM."""
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        configs = [
            compose(
                "config", [f"experiment=train_lm1b_{algo}_dep{suffix}", "masking.mix_alpha=0.25",
                           "masking.depth_mode=random", "masking.reverse=false"],
                return_hydra_config=True,
            )
            for algo in ("mdlm", "bd3lm")
        ]  # fmt: skip
    folder = f"outputs/lm1b_dep{suffix}"
    names = "mdlm_a0.25_normalized_random_reverseFalse", "bd3lm_block16_a0.25_normalized_random_"
    for cfg, name in zip(configs, names, strict=True):
        assert cfg.paths.run_dir.startswith(f"{folder}/{name}")
        assert f"{cfg.hydra.sweep.dir}/{cfg.hydra.sweep.subdir}" == cfg.paths.run_dir
        assert cfg.checkpointing.subdir == "."
    assert configs[1].training.from_pretrained == f"{configs[0].paths.run_dir}/best.ckpt"


@pytest.mark.slow
def test_smoke_twins_run_the_whole_recipe(tmp_path):
    """Data, parser, parse, MDLM on two processes, BD3-LM from it with the search, its bound."""
    pytest.importorskip("stanza")
    pytest.importorskip("datasets")
    settings = {
        "SMOKE": "1", "SMOKE_DIR": str(tmp_path / "data"), "PYTHON": sys.executable,
        "OMP_NUM_THREADS": "1", "PATH": os.environ["PATH"],
    }  # fmt: skip
    folders = (f"paths.output_dir={tmp_path}/out", f"paths.cache_dir={tmp_path}/cache")
    for algo in ("mdlm", "bd3lm"):
        subprocess.run(
            ["bash", str(ROOT / "scripts" / "train" / f"train_lm1b_{algo}_dep.sh"), *folders],
            check=True, env=environment(**settings), cwd=tmp_path, timeout=500,
        )  # fmt: skip
    out = tmp_path / "out" / "lm1b_dep_smoke"
    parse = load_summary(out / "parse")["metrics"]
    assert parse["train/accounted_for"] == 1.0 and parse["train/failed"] == 0
    for name in (f"mdlm_{NAME}", f"bd3lm_block16_{NAME}"):
        assert (out / name / "best.ckpt").is_file() and (out / name / "last.ckpt").is_file()
        assert load_summary(out / name)["steps"] == 20
    assert (out / f"bd3lm_block16_{NAME}" / "clip_search.png").is_file()
    assert load_summary(out / f"bd3lm_block16_{NAME}" / "ppl_eval")["metrics"]["rows"] > 0
