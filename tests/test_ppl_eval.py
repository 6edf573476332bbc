"""mode=ppl_eval measures what training reported, and a checkpoint opens with nothing else."""

import json
import math

import pytest
import torch
from omegaconf import OmegaConf

from algorithm import Algorithm
from diffusion import AR, BD3LM, MDLM, Diffusion
from modes.ppl_eval import run
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError
from runtime.run import load_summary
from tests.runs import ALGORITHMS, best, call_main, configure, fit, last, write_corpus
from tests.support import compose_config, equal

CLASSES = {"mdlm": MDLM, "bd3lm": BD3LM, "ar": AR}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def trained(folder):
    """Runs of eight steps, validated after every third, each made when first asked for."""
    metrics = {}

    def train(name):
        if name not in metrics:
            overrides = (*ALGORITHMS[name], "trainer.val_check_interval=3")
            metrics[name] = fit(folder, folder / name, *overrides)
        return folder / name, metrics[name]

    return train


def evaluate(folder, checkpoint, out, *overrides):
    """mode=ppl_eval with one draw, as validation during training has it."""
    out.mkdir(exist_ok=True)
    return run(
        compose_config(
            "mode=ppl_eval", "eval.num_draws=1", f"eval.checkpoint_path={checkpoint}",
            f"paths.cache_dir={folder}/cache", "trainer=cpu", *overrides, run_dir=out,
        )
    )  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_equals_the_validation_of_training_with_the_averaged_weights(
    folder, trained, tmp_path, name
):
    run_dir, metrics = trained(name)
    newest = run_dir / "checkpoints" / "last.ckpt"
    for path, key in ((newest, "val/nll"), (best(run_dir), "best/val/nll")):
        found = evaluate(folder, path, tmp_path / "ema")
        # The table of training rounds to float32.
        assert found["nll"] == pytest.approx(metrics[key], rel=1e-6)
        assert found["ppl"] == pytest.approx(math.exp(found["nll"]))
        # One draw says nothing about its own error, unless there is nothing to draw.
        assert found["rows"] == 13
        assert found["nll_se_draws"] == pytest.approx(0 if name == "ar" else math.nan, nan_ok=True)
    assert found["nll_se"] > 0 and metrics["val/nll_se"] > 0
    raw = evaluate(folder, newest, tmp_path / "raw", "eval.weights=raw")
    assert abs(raw["nll"] - metrics["val/nll"]) > 1e-3


def test_rows_of_the_run_add_up_to_its_metrics(folder, trained, tmp_path):
    run_dir, _ = trained("ar")
    found = evaluate(folder, best(run_dir), tmp_path, "eval.num_draws=3", "eval.limit_rows=7")
    lines = (tmp_path / "likelihoods.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["index"] for row in rows] == list(range(7)) and found["rows"] == 7
    tokens = sum(row["tokens"] for row in rows)
    assert tokens == found["tokens"]
    # AR is exact: whatever number of draws was asked for, one is made.
    assert all(len(row["nll"]) == 1 for row in rows) and found["nll_se_draws"] == 0
    assert found["nll"] == pytest.approx(sum(row["nll"][0] for row in rows) / tokens)


@pytest.mark.parametrize("batch_size", [1, 5])
def test_does_not_depend_on_the_batch_size(folder, trained, tmp_path, batch_size):
    run_dir, metrics = trained("bd3lm")
    found = evaluate(folder, best(run_dir), tmp_path, f"loader.eval_global_batch_size={batch_size}")
    assert found["nll"] == pytest.approx(metrics["best/val/nll"], rel=1e-6)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_checkpoint_opens_with_nothing_else(trained, name):
    run_dir, _ = trained(name)
    stored = last(run_dir)
    model = CLASSES[name].load_from_checkpoint(run_dir / "checkpoints" / "last.ckpt")
    assert type(model) is CLASSES[name] and not model.training
    assert model.tokenizer.decode(model.tokenizer.encode("w3 w12")) == "w3 w12"
    assert equal([p.detach() for p in model.parameters()], stored["ema"]["shadow_params"])
    for base in (Diffusion, Algorithm):
        raw = base.load_from_checkpoint(run_dir / "checkpoints" / "last.ckpt", weights="raw")
        assert type(raw) is CLASSES[name]
        assert equal(dict(raw.state_dict()), dict(stored["state_dict"]))
    assert not equal(dict(model.state_dict()), dict(stored["state_dict"]))


def test_the_state_dict_in_the_file_is_raw_also_where_validation_wrote_it(trained):
    """best.ckpt is saved by a callback of validation, which runs on the averages."""
    run_dir, _ = trained("mdlm")
    stored = read_checkpoint(best(run_dir))
    names = [name for name in stored["state_dict"] if not name.endswith("inv_freq")]
    averages = dict(zip(names, stored["ema"]["shadow_params"], strict=True))
    moments = stored["optimizer_states"][0]["state"]
    moved = [n for n, m in zip(names, moments.values(), strict=True) if m["exp_avg"].any()]
    assert moved
    assert all(not torch.equal(stored["state_dict"][name], averages[name]) for name in moved)


def test_a_configuration_of_your_own(folder, trained, tmp_path):
    run_dir, _ = trained("bd3lm")
    cfg = configure(folder, tmp_path, *ALGORITHMS["bd3lm"], "block_size=8")
    assert BD3LM.load_from_checkpoint(best(run_dir), config=cfg).block_size == 8
    assert BD3LM.load_from_checkpoint(best(run_dir)).block_size == 4
    larger = configure(folder, tmp_path, *ALGORITHMS["bd3lm"], "model.hidden_size=32")
    with pytest.raises(CheckpointError, match=r"best\.ckpt: misshapen backbone\.\S+ \(\("):
        BD3LM.load_from_checkpoint(best(run_dir), config=larger)


def test_another_algorithm_or_weights_are_refused(trained):
    run_dir, _ = trained("mdlm")
    with pytest.raises(CheckpointError, match=r"best\.ckpt: holds MDLM, which is not a AR"):
        AR.load_from_checkpoint(best(run_dir))
    with pytest.raises(CheckpointError, match="holds MDLM, which is not a BD3LM"):
        BD3LM.load_from_checkpoint(best(run_dir))
    with pytest.raises(ValueError, match="weights=best: allowed ema, raw"):
        MDLM.load_from_checkpoint(best(run_dir), weights="best")


def test_another_data_set_is_read_with_the_tokenizer_of_the_checkpoint(folder, trained, tmp_path):
    run_dir, metrics = trained("mdlm")
    corpus = write_corpus(tmp_path, seed=1)
    command = [
        "mode=ppl_eval", f"eval.checkpoint_path={best(run_dir)}", "trainer=cpu",
        f"paths.run_dir={tmp_path}/other", f"paths.cache_dir={folder}/cache",
        "data=text", f"data.files={corpus}", "data.wrap=false",
    ]  # fmt: skip
    assert call_main(command) == 0
    summary = json.loads((tmp_path / "other" / "summary.json").read_text())
    assert summary["metrics"]["nll"] != pytest.approx(metrics["best/val/nll"], rel=1e-3)
    assert summary["metrics"]["nll_se_draws"] > 0


@pytest.mark.parametrize("mode", ["ppl_eval", "sample_eval"])
def test_the_run_folder_tells_what_was_evaluated(folder, trained, tmp_path, mode):
    """summary.json and config.yaml name the checkpoint's algorithm, not the default one."""
    run_dir, _ = trained("bd3lm")
    code = call_main([
        f"mode={mode}", f"eval.checkpoint_path={best(run_dir)}", "trainer=cpu",
        f"paths.cache_dir={folder}/cache", f"paths.run_dir={tmp_path}/out",
    ])  # fmt: skip
    asked = OmegaConf.load(tmp_path / "out" / "config.yaml")
    trained_with = read_checkpoint(best(run_dir))["hyper_parameters"]["config"]
    assert code == 0 and load_summary(tmp_path / "out")["algo"] == "bd3lm"
    assert (asked.mode.name, asked.algo.name) == (mode, "bd3lm")
    assert asked.block_size == trained_with["block_size"]
    assert asked.data.files == trained_with["data"]["files"]


def test_the_file_that_a_run_started_from_may_be_gone(folder, trained, tmp_path):
    start = tmp_path / "start.ckpt"
    start.write_bytes(best(trained("mdlm")[0]).read_bytes())
    fit(folder, tmp_path / "run", f"training.from_pretrained={start}", "trainer.max_steps=1")
    start.unlink()
    checkpoint = f"eval.checkpoint_path={tmp_path}/run/checkpoints/last.ckpt"
    assert call_main(["mode=ppl_eval", checkpoint, "trainer=cpu", f"paths.run_dir={tmp_path}/eval",
                      f"paths.cache_dir={folder}/cache"]) == 0  # fmt: skip
