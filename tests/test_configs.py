"""Every yaml of every group composes, resolves and passes validation; its targets exist."""

import inspect
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from runtime.config import check_targets, locate, targets
from runtime.validation import validate
from tests.support import ROOT, compose_config

CONFIGS = ROOT / "configs"
NEEDED = {
    "acceptance_eval": ["mode.prompts={{a:b}}"],
    "acceptance_table": ["mode.runs=somewhere"],
    "audit": ["mode.run=somewhere"],
    "benchmark_table": ["mode.runs=somewhere", "mode.baseline=elsewhere"],
    "audit_labels": ["mode.input=rows.jsonl"],
    "combined": [
        f"reward.parts.{part}.backend.generator.model=a" for part in ("safety", "factuality")
    ],
    "compare": ["mode.runs=somewhere"],
    "continuation_eval": ["eval.checkpoint_path={ckpt}"],
    "decontaminate": ["mode.input=rows.jsonl", "mode.against=eval.jsonl"],
    "depth_eval": ["eval.checkpoint_path={ckpt}"],
    "export": ["eval.checkpoint_path={ckpt}"],
    "export_draft": ["eval.checkpoint_path={ckpt}"],
    "harness_eval": ["mode.tasks=[a_task]", "model=tiny_causal"],
    "judge_server": ["reward.backend.generator.model=a"],
    "mix": ["mode.input=rows.jsonl", "mode.counts={{a:1}}"],
    "insert_thoughts": ["mode.input=documents.jsonl", "model=tiny_causal"],
    "regenerate": ["mode.input=prompts.jsonl", "model=tiny_causal"],
    **{
        algo: ["model=tiny_causal", "experiment=block_text"]
        for algo in ("masked_adapt", "draft_refine", "nce")
    },
    **{
        algo: ["model=tiny_causal"]
        for algo in ("online_dpo", "rf_nll", "rlmt", "rlmt_paper", "rlmt_seed")
    },
    "sft_raw": ["model=tiny_causal"],
    "sft_thoughts": ["model=tiny_causal"],
    "sft_eval": ["eval.checkpoint_path={ckpt}"],
    "sft_table": ["mode.runs=somewhere"],
    "server": ["judge.backend.generator.model=a"],
    "scorer_eval": ["eval.checkpoint_path={ckpt}", "model=tiny_causal"],
    "ppl_eval": ["eval.checkpoint_path={ckpt}"],
    "sample_eval": ["eval.checkpoint_path={ckpt}"],
    "subtract": ["mode.input=rows.jsonl"],
    "bd3lm": ["block_size=16"],
    "cache_features": ["algo=dflash", "model=tiny_causal", "algo.feature_cache=somewhere"],
    "dflash": ["model=tiny_causal"],
    **{
        f"dflash_m1_{n}{size}": ["training.from_pretrained={ckpt}"]
        for n in (5, 6, 9)
        for size in ("", "_smoke")
    },
    "qwen3_0p6b": ["algo=dflash"],
    "qwen3_4b": ["algo=dflash"],
    "qwen3_4b_base": ["algo=sft_raw"],
    "large_scale/qwen3_4b_6n": ["algo=masked_adapt"],
    "large_scale/smoke_size": ["algo=sft_raw"],
    # FSDP asks for a GPU; all else of these can be checked without one.
    "large_scale/qwen3_4b_stage1_masked_6n": ["trainer.accelerator=auto"],
    "large_scale/qwen3_4b_stage2_draft_refine_6n": [
        "trainer.accelerator=auto",
        "training.from_pretrained={ckpt}",
    ],
    "large_scale/qwen3_4b_stage2_draft_refine_6n_smoke": ["training.from_pretrained={ckpt}"],
    **{
        f"large_scale/{path.stem}": ["training.from_pretrained={ckpt}"]
        for path in CONFIGS.glob("experiment/large_scale/*_stage3_*.yaml")
    },
    "qwen3_0p6b_base": ["algo=sft_raw"],
    **{f"thinking/{name}": ["algo=sft_raw"] for name in ("qwen3_0p6b", "smoke_size")},
    "thinking/prefix_suffix": ["algo=sft_raw"],
    "thinking/phase3": ["judge.backend.generator.model=a"],
    **{
        f"thinking/{stage}_{arm}{size}": ["training.from_pretrained={ckpt}"]
        for stage, arm in (
            ("sft", "think_phase3"),
            ("rlmt", "think_base"),
            ("rlmt", "think_phase3"),
        )
        for size in ("", "_smoke")
    },
    **{
        f"thinking/rlmt_{arm}": [
            "training.from_pretrained={ckpt}",
            "reward.backend.generator.model=a",
        ]
        for arm in ("think_base", "think_phase3")
    },
    "smollm2": ["algo=dflash"],
    "tiny_causal": ["algo=dflash"],
    "tiny_thinker": ["algo=dflash"],
    "dflash_smoke_size": ["algo=dflash", "checkpointing.keep_every_n_steps=4"],
    "fsdp": ["training.ema=0"],
    "train_lm1b_bd3lm_dep": ["training.from_pretrained={ckpt}"],
    "train_lm1b_bd3lm_dep_smoke": ["training.from_pretrained={ckpt}"],
    "text": ["data.train_path=a.txt", "data.valid_path=b.txt"],
}
GROUPS = sorted(
    [
        (path.parent.name, path.stem)
        for path in CONFIGS.glob("*/*.yaml")
        if path.parent.name not in ("hydra", "data", "grader")
    ]
    + [
        ("experiment", f"{path.parent.name}/{path.stem}")
        for path in CONFIGS.glob("experiment/*/*.yaml")
    ]
)


def overrides(group: str, option: str, ckpt: Path) -> list[str]:
    more = [text.format(ckpt=ckpt) for text in NEEDED.get(option, [])]
    return [f"{group}={option}", *more]


@pytest.fixture
def ckpt(tmp_path):
    (tmp_path / "a.ckpt").touch()
    return tmp_path / "a.ckpt"


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_composes_and_validates(group, option, ckpt):
    if group == "hparams_search":
        pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    cfg = compose_config(*overrides(group, option, ckpt))
    OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    check_targets(cfg)
    if option not in ("gpu", "fsdp") or torch.cuda.is_available():
        validate(cfg)


@pytest.mark.parametrize("option", sorted(p.stem for p in (CONFIGS / "data").glob("*.yaml")))
def test_data_composes(option):
    cfg = compose_config(f"data={option}")
    check_targets(cfg.data, "data")
    assert cfg.data.name


def own_modes(cfg: DictConfig) -> list[tuple[str, str]]:
    return [(key, target) for key, target in targets(cfg) if not key.startswith("data.")]


@pytest.mark.parametrize(("group", "option"), GROUPS)
def test_targets_exist_and_take_the_options(group, option, ckpt):
    """No yaml names an option that its class does not have."""
    cfg = compose_config(*overrides(group, option, ckpt))
    for key, target in own_modes(cfg):
        found = locate(target, key)
        node = OmegaConf.select(cfg, key.removesuffix("._target_"))
        if key.split(".")[0] in ("algo", "mode"):
            continue  # these get the whole configuration
        parameters = inspect.signature(found).parameters
        given = {name for name in node if not name.startswith("_")} - {"name"}
        takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
        assert takes_all or given <= set(parameters), key


def test_no_yaml_reaches_for_hardware_network_or_code():
    for path in CONFIGS.rglob("*.yaml"):
        text = path.read_text()
        for banned in ("${eval", "device_count", "${hydra:", "/home/", "weights_only"):
            assert banned not in text, f"{path}: {banned}"


def test_hydra_side_composes():
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose("config", ["hydra/launcher=slurm"], return_hydra_config=True)
    assert cfg.hydra.launcher.tasks_per_node == 1
    assert cfg.hydra.run.dir == cfg.paths.run_dir
    assert cfg.hydra.help.app_name == "palimpsest"


CONTRACT = """
algo.T algo.clip_search_widths algo.var_min algo.fix_clipping algo.ignore_bos algo.mdlm_loss_scale
block_size seed model.length model.attn_backend loader.batch_size loader.global_batch_size
loader.eval_batch_size loader.eval_global_batch_size loader.num_workers training.resample
training.from_pretrained training.ema training.antithetic_sampling training.sampling_eps_min
training.sampling_eps_max sampling.nucleus_p sampling.kv_cache sampling.first_hitting
sampling.num_sample_batches sampling.var_length checkpointing.save_dir
checkpointing.resume_from_ckpt checkpointing.resume_ckpt_path eval.checkpoint_path
trainer.max_steps trainer.val_check_interval trainer.precision optim.lr optim.beta1 optim.beta2
optim.weight_decay lr_scheduler._target_
"""


@pytest.mark.parametrize("key", CONTRACT.split())
@pytest.mark.parametrize("algo", ["ar", "mdlm", "bd3lm"])
def test_the_names_users_type_exist(algo, key):
    node = compose_config(f"algo={algo}")
    for part in key.split("."):
        assert part in node, key
        node = node[part]


def test_example_experiment_is_what_it_says():
    cfg = compose_config("experiment=bd3lm_cosine")
    assert (cfg.algo.name, cfg.block_size, cfg.lr_scheduler.name) == ("bd3lm", 4, "cosine_warmup")
