"""A file made to run code is refused at every door, and nothing of it runs."""

import os
from pathlib import Path

import pytest
import torch

from diffusion import MDLM
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError, ConfigError
from tests.runs import best, call_main, fit, tiny

ERRORS = (CheckpointError, ConfigError)


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    fit(folder, folder / "run", "trainer.max_steps=2", "trainer.val_check_interval=2")
    return folder


def pickled(content: dict, canary: Path) -> None:
    content["extra"] = Payload(canary)


def instantiator(content: dict, canary: Path) -> None:
    content["hyper_parameters"] = {"_instantiator": "os.system", "command": f"touch {canary}"}


def target_of(section: str, content: dict, canary: Path) -> None:
    stored = content["hyper_parameters"]["config"]
    options = {"_target_": "os.system", "command": f"touch {canary}"}
    stored[section] = {**stored[section], **options}


ATTACKS = {
    "pickle": pickled,
    "instantiator": instantiator,
    "algo": lambda content, canary: target_of("algo", content, canary),
    "model": lambda content, canary: target_of("model", content, canary),
    "noise": lambda content, canary: target_of("noise", content, canary),
}


@pytest.fixture(params=ATTACKS)
def hostile(request, folder, tmp_path):
    content = read_checkpoint(best(folder / "run"))
    ATTACKS[request.param](content, tmp_path / "canary")
    torch.save(content, tmp_path / "hostile.ckpt")
    return request.param, tmp_path / "hostile.ckpt"


def test_every_door_is_closed(folder, tmp_path, hostile, capfd):
    attack, path = hostile
    with pytest.raises(ERRORS):
        MDLM.load_from_checkpoint(path)

    doors = [
        [*tiny(folder), f"checkpointing.resume_ckpt_path={path}"],
        [*tiny(folder), f"training.from_pretrained={path}"],
        ["mode=ppl_eval", f"eval.checkpoint_path={path}", "trainer=cpu"],
        ["mode=sample_eval", f"eval.checkpoint_path={path}", "trainer=cpu"],
    ]
    for number, door in enumerate(doors):
        capfd.readouterr()
        evaluates = number > 1
        code = call_main([*door, f"paths.run_dir={tmp_path}/{number}",
                          f"paths.cache_dir={folder}/cache", "trainer.max_steps=3"])  # fmt: skip
        # Training builds nothing from the configuration in the file: it only compares, and what
        # resumes must have been trained with the same algorithm and noise.
        resumes = number == 0 and attack in ("algo", "noise")
        expected = 2 if evaluates or resumes or attack in ("pickle", "instantiator") else 0
        assert code == expected, door
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == (1 if expected else 0), lines
    assert not (tmp_path / "canary").exists()


def test_the_canary_would_sing(tmp_path):
    torch.save({"extra": Payload(tmp_path / "canary")}, tmp_path / "a.ckpt")
    torch.load(tmp_path / "a.ckpt", weights_only=False)
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("wrong", [None, [], {}, {"config": {}}, {"config": {"algo": 5}}])
def test_hyper_parameters_of_another_program(folder, tmp_path, wrong):
    content = {**read_checkpoint(best(folder / "run")), "hyper_parameters": wrong}
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(CheckpointError, match=r"no config\.algo or no tokenizer"):
        MDLM.load_from_checkpoint(tmp_path / "other.ckpt")
