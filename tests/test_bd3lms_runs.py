"""The commands of a user with a checkpoint of bd3lms: evaluate it, start from it, not resume it."""

import pytest
import torch

from diffusion import Diffusion
from runtime.bd3lms.write import write_bd3lms
from runtime.checkpoint import read_checkpoint
from runtime.run import load_summary
from tests.runs import best, call_main, fit, last, tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny run of ours, and its best checkpoint as bd3lms would have written it."""
    folder = tmp_path_factory.mktemp("bd3lms")
    options = ("algo=bd3lm", "block_size=4", "trainer.max_steps=4")
    fit(folder, folder / "run", *options)
    model = Diffusion.load_from_checkpoint(best(folder / "run"), weights="raw")
    write_bd3lms(model, folder / "theirs.ckpt", global_step=4)
    return folder


def test_likelihood_is_that_of_our_own_checkpoint(folder, tmp_path):
    results = []
    for number, path in enumerate((best(folder / "run"), folder / "theirs.ckpt")):
        run_dir = tmp_path / str(number)
        data = [text for text in tiny(folder) if text.startswith(("data", "paths", "trainer=cpu"))]
        code = call_main(["mode=ppl_eval", f"eval.checkpoint_path={path}", *data,
                          f"paths.run_dir={run_dir}", "eval.num_draws=2"])  # fmt: skip
        assert code == 0
        results.append(load_summary(run_dir)["metrics"]["nll"])
    # The masks are those of the seed, which is in the file.
    assert results[0] == results[1]


def test_start_from_its_weights(folder, tmp_path):
    path = folder / "theirs.ckpt"
    fit(folder, tmp_path / "run", "algo=bd3lm", "block_size=8",
        f"training.from_pretrained={path}", "trainer.max_steps=1", "optim.lr=1e-12")  # fmt: skip
    started, theirs = last(tmp_path / "run"), read_checkpoint(path)
    for name, value in theirs["state_dict"].items():
        assert torch.allclose(started["state_dict"][name], value, atol=1e-6), name
    assert started["global_step"] == 1


def test_it_is_not_resumed_from(folder, tmp_path, capfd):
    path = folder / "theirs.ckpt"
    capfd.readouterr()
    code = call_main([*tiny(folder), "algo=bd3lm", "block_size=4", f"paths.run_dir={tmp_path}/run",
                      f"checkpointing.resume_ckpt_path={path}"])  # fmt: skip
    lines = capfd.readouterr().err.strip().splitlines()
    said = [line for line in lines if line.startswith("CheckpointError: ")]
    assert code == 2 and len(said) == 1 and lines[-1] == said[0]
    assert f"checkpointing.resume_ckpt_path={path}: written by bd3lms" in said[0]
    assert f"training.from_pretrained={path}" in said[0]
