"""Checkpoints are read as data; hostile ones leave no trace."""

import os
import pickle
import subprocess
import zipfile
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from runtime import checkpoint as module
from runtime.checkpoint import (
    changed_on_resume,
    config_hash,
    provenance,
    read_checkpoint,
)
from runtime.errors import CheckpointError
from tests.support import compose_config


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self):
        return os.system, (f"touch {self.canary}",)


def content(**more):
    return {
        "state_dict": {"w": torch.arange(3.0)},
        "hyper_parameters": {"config": {"algo": {"name": "mdlm"}}},
        "global_step": 7,
        "provenance": {},
        **more,
    }


@pytest.mark.parametrize("zipped", [True, False])
def test_reads_what_was_saved(tmp_path, zipped):
    torch.save(content(), tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert found["global_step"] == 7
    assert torch.equal(found["state_dict"]["w"], torch.arange(3.0))


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    return message


@pytest.mark.parametrize("zipped", [True, False, 2, 5])
def test_a_hostile_pickle_is_refused_and_does_not_run(tmp_path, zipped):
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    evil = content(extra=Payload(canary))
    if not isinstance(zipped, bool):
        path.write_bytes(pickle.dumps({"extra": evil["extra"]}, protocol=zipped))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=zipped)
    message = refused(path)
    assert not canary.exists()
    assert "nothing was executed" in message
    assert "system" in message or zipped == 5  # protocol 5 is not even parsed


def test_the_canary_works(tmp_path):
    pickle.loads(pickle.dumps(Payload(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


def test_a_foreign_class_is_named(tmp_path):
    torch.save(content(hyper=Path("x")), tmp_path / "a.ckpt")
    assert "pathlib" in refused(tmp_path / "a.ckpt")


def test_instantiator_is_refused(tmp_path):
    evil = content(hyper_parameters={"_instantiator": "os.system", "command": "true"})
    torch.save(evil, tmp_path / "a.ckpt")
    assert "_instantiator" in refused(tmp_path / "a.ckpt")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.9])
def test_truncated(tmp_path, keep):
    path = tmp_path / "a.ckpt"
    torch.save(content(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * keep)])
    assert "damaged" in refused(path)


def test_not_a_checkpoint(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello\n" * 50)
    assert "damaged or not a checkpoint" in refused(tmp_path / "text.ckpt")
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as file:
        file.writestr("a.txt", "hello")
    assert "damaged or not a checkpoint" in refused(tmp_path / "zip.ckpt")
    assert "no such checkpoint" in refused(tmp_path / "absent.ckpt")


def test_missing_keys(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "a.ckpt")
    message = refused(tmp_path / "a.ckpt")
    assert "not a Palimpsest checkpoint" in message and "global_step" in message
    torch.save([1, 2], tmp_path / "b.ckpt")
    assert "not a Palimpsest checkpoint" in refused(tmp_path / "b.ckpt")


def test_config_hash_knows_the_experiment_only():
    base = {"optim": {"lr": 1.0, "eps": 0.1}, "seed": 1, "paths": {"run_dir": "a"}}
    turned = {"paths": {"run_dir": "b"}, "seed": 2, "optim": {"eps": 0.1, "lr": 1.0}}
    other = {**base, "optim": {"lr": 2.0, "eps": 0.1}}
    assert config_hash(base) == config_hash(OmegaConf.create(turned))
    assert config_hash(base) != config_hash(other)


def test_config_hash_does_not_know_where_the_run_was_written():
    def at(place: str, *more: str) -> str:
        return config_hash(compose_config(f"paths.cache_dir={place}/cache", *more, run_dir=place))

    assert at("/a/one") == at("/b/two") == at("/c", "checkpointing.save_dir=/d", "seed=7")
    assert at("/a/one") != at("/a/one", "optim.lr=1")


def test_provenance_with_and_without_git(tmp_path, monkeypatch):
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
        command = ["git", *identity, *arguments]
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(module, "ROOT", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    module._git_version.cache_clear()
    facts = provenance({"a": 1}, "abc")
    assert facts["git"] is None and facts["data_fingerprint"] == "abc"
    assert facts["versions"]["torch"] == torch.__version__ and facts["versions"]["python"]

    git("init")
    (tmp_path / "file").write_text("1")
    git("add", "file")
    git("commit", "-m", "first")
    module._git_version.cache_clear()
    clean = provenance({"a": 1})["git"]
    assert len(clean) == 40
    (tmp_path / "file").write_text("2")
    module._git_version.cache_clear()
    assert provenance({"a": 1})["git"] == clean + "-dirty"
    module._git_version.cache_clear()


def test_what_may_change_on_resume():
    """Length, devices and paths may; what the steps are made of may not; new options may come."""
    stored = {
        "seed": 1, "optim": {"lr": 1e-3, "beta1": 0.9}, "noise": {"_target_": "a", "eps": 1e-3},
        "training": {"ema": 0.9, "from_pretrained": None}, "trainer": {"max_steps": 5},
    }  # fmt: skip
    assert changed_on_resume(stored, stored) is None
    longer = {**stored, "trainer": {"max_steps": 9}, "algo": {"new_option": True}}
    assert changed_on_resume(stored, longer) is None
    started = {**stored, "training": {"ema": 0.9, "from_pretrained": "a.ckpt"}}
    assert changed_on_resume(stored, started) is None
    other = {**stored, "optim": {"lr": 1e-4, "beta1": 0.9}}
    change = "optim.lr=0.0001: the checkpoint was trained with 0.001"
    assert changed_on_resume(stored, other) == change
    assert "noise._target_=b" in changed_on_resume(stored, {**stored, "noise": {"_target_": "b"}})


def nce(score_agg: str = "lastround", **changes) -> dict:
    """A configuration of a scorer's run."""
    bon = {"score_agg": score_agg, "alpha": 0.1, "form": "additive", "pick": "argmax",
           "gumbel_temperature": 1.0, "rounds": 1, "seed": 0}  # fmt: skip
    backbone = {
        "model_type": "qwen3", "num_attention_heads": 4, "use_cache": True, "id2label": {"0": "A"},
        "rope_parameters": {"rope_theta": 1e4},
    }  # fmt: skip
    return {"bon": bon | changes, "algo": {"name": "nce", "backbone": backbone}}


def test_what_only_decoding_reads_may_change_on_resume():
    decoded = {"alpha": 0.3, "form": "convex", "pick": "gumbel", "gumbel_temperature": 0.5}
    assert changed_on_resume(nce(), nce(**decoded)) is None
    for key, value in {"rounds": 2, "seed": 1}.items():
        assert f"bon.{key}={value}" in changed_on_resume(nce(), nce(**{key: value}))
    # Where the chain of training goes on from what wins they decide about it.
    for key, value in decoded.items():
        change = changed_on_resume(nce("select_each"), nce("select_each", **{key: value}))
        assert f"bon.{key}={value}: the checkpoint was trained with" in change


def test_defaults_of_another_version_of_transformers_may_change_on_resume():
    upgraded = nce()
    upgraded["algo"]["backbone"] |= {"use_cache": False, "id2label": {"0": "B"}}
    assert changed_on_resume(nce(), upgraded) is None
    other = nce()
    other["algo"]["backbone"]["num_attention_heads"] = 2
    assert "algo.backbone.num_attention_heads=2" in changed_on_resume(nce(), other)
    turned = nce()
    turned["algo"]["backbone"]["rope_parameters"] = {"rope_theta": 1e6}
    assert "algo.backbone.rope_parameters.rope_theta" in changed_on_resume(nce(), turned)
    heads = ({"model": {"n_heads": n, "attn_backend": str(n)}} for n in (2, 4))
    assert changed_on_resume(*heads) == "model.n_heads=4: the checkpoint was trained with 2"
