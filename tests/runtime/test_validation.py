"""A wrong key, type, range or combination is one line with key, value and what is allowed."""

import pytest
import torch
from lightning.pytorch.plugins.precision import FSDPPrecision
from omegaconf import OmegaConf

from runtime.config import instantiate
from runtime.devices import count_devices, world_size
from runtime.errors import ConfigError
from runtime.keys import KEYS
from runtime.validation import validate
from tests.support import compose_config

HERE = "/nonexistent/a.ckpt"

WRONG = [
    (["seed=-1"], "seed=-1: "),
    (["seed=true"], "seed=true: "),
    (["block_size=16"], "block_size=16: algo=mdlm has no choice of blocks; allowed: 128"),
    (["algo=bd3lm", "block_size=24"], "does not divide model.length=128; allowed: 1, 2, 4, 8, 16"),
    (["algo=bd3lm", "block_size=0"], "block_size=0: "),
    (["model.n_heads=3"], "model.n_heads=3: does not divide model.hidden_size="),
    (["model.length=12.5"], "model.length=12.5: "),
    (["model.dropout=1.0"], "allowed: a number in [0, 1)"),
    (["model.attn_backend=flash"], "allowed: auto, sdpa, flex, math"),
    (["training.resample=1"], "training.resample=1: wrong value; allowed: true, false"),
    (["training.ema=1"], "training.ema=1: "),
    (["training.sampling_eps_min=0.8", "training.sampling_eps_max=0.5"], "allowed: [0, 0.5]"),
    (["training.sampling_eps_max=1.5"], "allowed: a number in [0, 1]"),
    ([f"training.from_pretrained={HERE}"], "no such file"),
    (["loader.global_batch_size=0"], "allowed: an integer >= 1"),
    (["loader.batch_size=5"], "does not divide loader.global_batch_size=32"),
    (["trainer=cpu", "trainer.devices=3"], "allowed: multiples of 3"),
    (["trainer=cpu", "trainer.devices=2", "loader.batch_size=32"], "multiples of 64"),
    (["optim.lr=0"], "allowed: a number in (0, inf)"),
    (["optim.lr=fast"], "optim.lr=fast: "),
    (["optim.beta1=1.0"], "optim.beta1=1.0: "),
    (["sampling.nucleus_p=0"], "allowed: a number in (0, 1]"),
    (["sampling.num_steps=0"], "allowed: an integer >= 1, null"),
    (["eval.weights=best"], "allowed: ema, raw"),
    (["mode=ppl_eval"], "eval.checkpoint_path=null: mode=ppl_eval needs a checkpoint"),
    (["mode=sample_eval", f"eval.checkpoint_path={HERE}"], "no such file"),
    (["mode=depth_eval"], "eval.checkpoint_path=null: mode=depth_eval needs a checkpoint"),
    (["mode=depth_eval", "mode.num_samples=-1"], "mode.num_samples=-1: wrong value; allowed: an"),
    (["mode=compare"], "mode.runs=???: a value is required"),
    (["mode=compare", "mode.runs=[]"], "mode.runs=[]: wrong value; allowed: a folder, a glob or"),
    (["mode=compare", "mode.runs=a", "mode.metrics=nll"], "mode.metrics=nll: wrong value; allowed"),
    (["mode=compare", "mode.runs=a", "mode.reference=first"], "mode.reference=first: wrong value"),
    (["mode=compare", "mode.runs=a", "mode.x=1"], "mode.x=1: wrong value; allowed: a text, null"),
    (["mode=compare", "mode.runs=a", "mode.ignore=null"], "allowed: a list of keys"),
    (["mode=audit"], "mode.run=???: a value is required"),
    ([f"checkpointing.resume_ckpt_path={HERE}"], "checkpointing.resume_ckpt_path=/nonexistent"),
    (["checkpointing.resume_from_ckpt=maybe"], "allowed: true, false, required"),
    (["trainer.max_steps=-1"], "trainer.max_steps=-1: "),
    (["trainer.max_steps=null"], "trainer.max_steps=null: "),
    (["trainer.precision=fp8"], "trainer.precision=fp8: "),
    (["trainer.accelerator=tpu"], "allowed: auto, cpu, gpu"),
    (["trainer.val_check_interval=0"], "optimiser steps"),
    (["algo.clip_search_widths=[0.5,1.5]"], "allowed: a list of numbers in [0.01, 1)"),
    (["algo.clip_search_delta=0"], "allowed: a number in (0, 1)"),
    (["algo.var_min=1"], "allowed: true, false"),
    (["masking.mix_alpha=0.5"], "allowed: 0, or masking=dependency masking.mix_alpha=0.5"),
    (["algo=ar", "masking=dependency"], "masking.mix_alpha=0.0625: algo=ar masks nothing"),
    (["masking=dependency", "masking.mix_alpha=2"], "masking.mix_alpha=2: "),
    (["masking=dependency", "masking.depth_mode=tree"], "allowed: dependency, none, random, pos"),
    (["masking=dependency", "masking.depth_temp=0"], "masking.depth_temp=0: "),
    (["masking=dependency", "masking.reverse=1"], "masking.reverse=1: "),
    (["masking=dependency", "masking.target=mask"], "allowed: loss, schedule"),
    (["algo.T=-1"], "algo.T=-1: "),
    (["plugins=my_lab"], "a list of package names"),
    (["callbacks.checkpoints._target_=os.system"], "callbacks.checkpoints._target_=os.system"),
    (["block_size=${nowhere}"], "nowhere"),
    (["~optim.lr"], "optim.lr: missing"),
    (
        ["reward=judge_local", "model@reward.backend.target=tiny"],
        "reward.backend.target=tiny: no causal language model; allowed: model@reward.backend.",
    ),
    (["judge=local", "model@judge.backend.target=small"], "judge.backend.target=small: no causal"),
    (["judge=local", "model@judge.backend.target=nano"], "judge.backend.target={...}: no causal"),
    (["judge=local", "judge.backend.target=null"], "judge.backend.target=null: no causal"),
    (
        [
            "reward=combined",
            "judge/backend@reward.parts.safety.backend=local",
            "model@reward.parts.safety.backend.target=tiny",
            "reward.parts.factuality.backend.generator.model=a",
        ],
        "reward.parts.safety.backend.target=tiny: no causal",
    ),
    (
        ["reward=judge_local", "reward.cache=/"],
        "reward.cache=/: wrong value; allowed: the path of a file (no folder), null",
    ),
    (["judge=local", "judge.cache=/tmp"], "judge.cache=/tmp: wrong value"),
    (
        [
            "algo=rlmt_paper",
            "model=tiny_thinker",
            "data=thoughts",
            "data.form=prefixes",
            "data.files=a.jsonl",
            "reward=verifiable",
            "judge=verifiable",
        ],
        "judge: algo=rlmt_paper learns from reward=NAME and asks no judge; allowed: ~judge",
    ),
]


def complaint(cfg):
    """What validation says against a configuration."""
    try:
        validate(cfg)
    except ConfigError as error:
        return str(error)
    return None


@pytest.mark.parametrize(("overrides", "message"), WRONG)
def test_wrong(overrides, message):
    cfg = compose_config(*overrides)
    with pytest.raises(ConfigError) as error:
        validate(cfg)
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there():
    with pytest.raises(ConfigError, match=r"trainer\.accelerator=gpu: no such device here"):
        validate(compose_config("trainer=gpu"))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["algo=bd3lm", "block_size=4", "training.resample=true"],
        ["algo=ar"],
        ["algo=bd3lm", "algo.clip_search_widths=[0.5,0.9]", "training.resample=true"],
        ["masking=dependency", "masking.mix_alpha=0", "masking.target=schedule"],
        ["trainer.precision=32", "trainer.limit_val_batches=0.5"],
        ["trainer=cpu", "trainer.devices=2", "loader.batch_size=8"],
        ["training.sampling_eps_min=0.5", "training.sampling_eps_max=0.5"],
        ["logger=none", "callbacks=none"],
        ["~logger"],
        ["+model.depth_scale=3", "+algo.my_option=[1,2]", "+masking.bias=0.1"],
    ],
)
def test_right(overrides):
    assert complaint(compose_config(*overrides)) is None


def test_a_scale_of_one_number_is_not_sharded():
    cfg = compose_config("algo=nce", "model=tiny_causal", "trainer=fsdp", "training.ema=0")
    with pytest.raises(ConfigError, match="algo=nce has weights that cannot be sharded"):
        validate(cfg)


BLOCKS = ("algo=draft_refine", "model=tiny_causal", "trainer=cpu", "data=chat", "data.files=a")
ALIGNED = (*BLOCKS, "data.align=4")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (BLOCKS, "data.align=null: documents have to begin with a block of block_size=4 tokens, in"
                 " rows of model.length=128; allowed: data.align=4"),
        ((*BLOCKS, "data.align=2"), "data.align=2: documents have to begin with a block"),
        ((*ALIGNED, "block_size=8"), "allowed: data.align=8"),
        ((*BLOCKS, "data.align=12", "model.length=128"), "data.align=12: "),
        ((*BLOCKS, "data.align=2", "model.length=90"),
         "block_size=4: does not divide model.length=90; allowed: 1, 2, 3, 5"),
        ((*ALIGNED, "data.join=false"), "data.join=false: algo=draft_refine has to know where the"),
        (BLOCKS[:3], "data=pydocs begin; allowed: data.join=true (data=chat, or any text with"),
        ((*ALIGNED, "trainer.precision=64-true"),
         "trainer.precision=64-true: algo=draft_refine computes log-probabilities in fp32; allowed:"
         " 32, 32-true, bf16, bf16-mixed"),
        ((*ALIGNED, "trainer.precision=64"), "trainer.precision=64: algo=draft_refine"),
        ((*ALIGNED, "training.ema=0",
          "trainer.strategy={_target_: models.FSDP, auto_wrap_policy: [models.dit.DiT]}"),
         "trainer.strategy.auto_wrap_policy=['models.dit.DiT']: algo=draft_refine refines in"),
    ],
)  # fmt: skip
def test_what_blocks_of_whole_documents_need(overrides, message):
    assert message in str(complaint(compose_config(*overrides)))


@pytest.mark.parametrize(
    "overrides",
    [
        ALIGNED,
        (*BLOCKS, "data.align=8"),
        (*BLOCKS, "block_size=1"),
        (*BLOCKS[:3], "experiment=block_text", "data=text", "data.files=a", "block_size=8"),
        (*ALIGNED, "trainer.precision=bf16-mixed"),
        # One's own encoder may tell and align documents as it likes.
        (*BLOCKS, "data.encoder._target_=tests.plugins.encoder.Mine"),
        (*BLOCKS, "data.join=false", "data.encoder._target_=tests.plugins.encoder.Mine"),
        # Modes that read no such rows.
        (*BLOCKS, "mode=benchmark_eval", "benchmark=gsm8k"),
        (*BLOCKS, "mode=scorer_eval", f"eval.checkpoint_path={__file__}"),
        # Algorithms that write none.
        ("algo=sft_raw", *BLOCKS[1:], "trainer.precision=64-true"),
    ],
)
def test_blocks_are_none_of_the_business_of_others(overrides):
    assert complaint(compose_config(*overrides)) is None


@pytest.mark.parametrize("mode", ["ppl_eval", "scorer_eval mode.blocks=data"])
def test_evaluations_read_rows_too(mode):
    file = f"eval.checkpoint_path={__file__}"
    cfg = compose_config(*BLOCKS, *f"mode={mode}".split(), file)
    assert "data.align=null" in str(complaint(cfg))


def test_sharded_weights_are_collected_in_fp32():
    """Lightning's own choice for bf16-mixed would validate with weights in bf16."""
    cfg = compose_config("trainer=fsdp")
    strategy = instantiate(cfg.trainer.strategy)
    strategy.precision_plugin = FSDPPrecision(cfg.trainer.precision)
    wanted = strategy.mixed_precision_config
    assert (wanted.param_dtype, wanted.reduce_dtype, wanted.buffer_dtype) == (None, None, None)
    assert strategy.precision_plugin.mixed_precision_config.param_dtype == torch.bfloat16


def test_options_of_another_component_are_its_own_business():
    cfg = compose_config()
    cfg.model = OmegaConf.create({"_target_": "models.dit.DiT", "name": "mine", "length": 128})
    cfg.algo = OmegaConf.create({"_target_": "diffusion.MDLM", "name": "mine"})
    cfg.block_size = 32
    assert complaint(cfg) is None


def test_every_contract_key_of_the_table_exists():
    cfg = compose_config()
    absent = [k.path for k in KEYS if OmegaConf.select(cfg, k.path, default="absent") == "absent"]
    # Null reads as absent for select; what is left must say that it is optional.
    names = {key.path: key for key in KEYS}
    assert all(names[path].nullable or names[path].optional for path in absent), absent


@pytest.mark.parametrize(
    ("devices", "count"), [(1, 1), (3, 3), ("auto", 1), (-1, 1), ("2", 2), ("0,1", 2), ([0, 1], 2)]
)
def test_devices_are_counted_as_lightning_counts_them(devices, count):
    trainer = OmegaConf.create({"accelerator": "cpu", "devices": devices, "num_nodes": 2})
    assert count_devices(trainer) == count and world_size(trainer) == 2 * count
