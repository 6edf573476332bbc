"""`load_full_state`: model, optimiser, schedule, batches, generators and step from one folder."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from algorithm import Algorithm
from callbacks.exact_resume import restore_random_state
from checkpointing import load_full_state
from diffusion import MDLM
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError
from runtime.full_state import full_states, write_full_state
from runtime.parts import META
from tests.runs import call_main, fit, last, tiny
from tests.support import equal
from tests.test_hostile_checkpoints import ATTACKS, ERRORS

STATES = "checkpointing.full_state_every_n_steps=2"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("opened")
    with pytest.MonkeyPatch.context() as patch:
        saved = MDLM.on_save_checkpoint

        def with_batches(self: MDLM, checkpoint: dict) -> None:
            saved(self, checkpoint)
            checkpoint["eval_batches"] = [{"input_ids": torch.arange(8).view(2, 4)}]

        patch.setattr(MDLM, "on_save_checkpoint", with_batches)
        fit(folder, folder / "run", STATES, "trainer.max_steps=4", "trainer.val_check_interval=4")
    return folder


@pytest.fixture
def newest(folder) -> Path:
    return full_states(folder / "run" / "checkpoints")[-1]


def test_everything_that_training_goes_on_from(folder, newest):
    found, expected = load_full_state(str(newest)), last(folder / "run")
    assert isinstance(found.model, MDLM) and not found.model.training
    assert equal(dict(found.model.state_dict()), dict(expected["state_dict"]))
    assert found.model.ema.num_updates == 4
    optimizer = torch.optim.AdamW(found.model.parameters(), lr=1.0)
    optimizer.load_state_dict(found.optimizer)
    assert equal(optimizer.state_dict(), expected["optimizer_states"][0])
    assert found.scheduler == expected["lr_schedulers"][0]
    assert equal(found.eval_batches, [{"input_ids": torch.arange(8).view(2, 4)}])
    assert len(found.rng) == found.meta["world_size"] == 1
    restore_random_state(found.rng[0])
    assert torch.equal(torch.get_rng_state(), expected["random_states"][0]["torch"])
    assert found.step == found.meta["step"] == 4
    assert found.meta["provenance"] == expected["provenance"]
    assert json.loads((newest / META).read_text()) == found.meta


def test_opens_like_any_checkpoint_with_averages_or_raw(newest):
    raw, average = (Algorithm.load_from_checkpoint(newest, weights=w) for w in ("raw", "ema"))
    shadow = read_checkpoint(newest)["ema"]["shadow_params"]
    assert all(map(torch.equal, average.parameters(), shadow))
    assert not all(map(torch.equal, raw.parameters(), shadow))


def test_what_is_no_full_state(folder, newest, tmp_path):
    best = folder / "run" / "checkpoints" / "best.ckpt"
    for path in (best, tmp_path, tmp_path / "absent"):
        with pytest.raises(CheckpointError, match=f"{path}: no folder of a full state"):
            load_full_state(path)
    content = read_checkpoint(newest)
    write_full_state({**content, "optimizer_states": []}, tmp_path / "none")
    with pytest.raises(CheckpointError, match=r"none/optimizer\.pt: 0 states; allowed: 1"):
        load_full_state(tmp_path / "none")
    shutil.copytree(newest, tmp_path / newest.name)
    (tmp_path / newest.name / "scheduler.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"scheduler\.pt: truncated, has 0 bytes of"):
        load_full_state(tmp_path / newest.name)


@pytest.mark.parametrize("attack", ["pickle", "instantiator", "algo"])
def test_every_door_is_closed_to_hostile_folders(folder, newest, tmp_path, attack, capfd):
    """The doors and attacks of files, on folders whose meta.json vouches for them."""
    content, path = read_checkpoint(newest), tmp_path / newest.name
    ATTACKS[attack](content, tmp_path / "canary")
    write_full_state(content, path)
    for opened in (load_full_state, MDLM.load_from_checkpoint):
        with pytest.raises(ERRORS):
            opened(path)
    doors = [
        [*tiny(folder), f"checkpointing.resume_ckpt_path={path}"],
        [*tiny(folder), f"training.from_pretrained={path}"],
        ["mode=ppl_eval", f"eval.checkpoint_path={path}", "trainer=cpu"],
    ]
    for number, door in enumerate(doors):
        capfd.readouterr()
        code = call_main([*door, f"paths.run_dir={tmp_path}/{number}",
                          f"paths.cache_dir={folder}/cache", "trainer.max_steps=5"])  # fmt: skip
        # Nothing is built from what training starts from: it is only compared.
        expected = 0 if number == 1 and attack == "algo" else 2
        assert code == expected, door
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == (1 if expected else 0), lines
    assert not (tmp_path / "canary").exists()
