"""algo.sampler: another engine samples in training."""

from inspect import signature

import pytest
import torch
from omegaconf import OmegaConf

from decoding.rollout_server import ServerRollouts
from modes import train
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.online_runs import configure, fit, table
from tests.plugins.remote_sampler import RemoteSampler
from tests.runs import last

CORRECTED = ("algo.correction={level:token,cap:2.0}", "trainer.max_steps=2")


def remote(folder, run_dir, *overrides, **options):
    cfg = configure(folder, run_dir, *overrides)
    sampler = {"_target_": "tests.plugins.remote_sampler.RemoteSampler", **options}
    OmegaConf.update(cfg, "algo.sampler", sampler, merge=False, force_add=True)
    return train.run(cfg)


SERVER = ("+algo/sampler=server", "algo.sampler.model=a", CORRECTED[0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("remote")


def test_an_engine_with_the_same_weights_gives_the_same_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(RemoteSampler, "calls", [])
    fit(folder, tmp_path / "local", *CORRECTED)
    remote(folder, tmp_path / "remote", *CORRECTED)
    assert RemoteSampler.calls == ["follow", "sample"] * 2 + ["close"]
    here, there = (last(tmp_path / name)["state_dict"] for name in ("local", "remote"))
    for name, weight in here.items():
        torch.testing.assert_close(there[name], weight, atol=1e-5, rtol=1e-4)


def test_samples_without_an_answer_count_as_invalid(folder, tmp_path):
    remote(folder, tmp_path, *CORRECTED, failing=1)
    rates = [row["train/invalid_judge_rate"] for row in table(tmp_path) if "train/loss" in row]
    assert rates == [0.25] * 2


def test_an_engine_needs_a_correction(folder, tmp_path):
    with pytest.raises(ConfigError, match=r"algo\.correction=null: .* when the generator is a"):
        remote(folder, tmp_path)


def test_adapters_are_not_sent_to_a_server_of_the_whole_model(folder, tmp_path):
    sync = {"_target_": "decoding.weight_sync.TrlVllm"}
    with pytest.raises(ConfigError, match=r"algo\.sampler\.sync: .* allowed: algo\.lora=null"):
        remote(folder, tmp_path, *CORRECTED, "algo.lora={r:2,target_modules:all-linear}", sync=sync)


@pytest.mark.parametrize("sync", ["algo.sampler.sync=none", "+algo/sampler/sync=trl_vllm"])
def test_the_configuration_of_a_server(folder, tmp_path, sync):
    cfg = configure(folder, tmp_path, *SERVER, sync)
    validate(cfg)
    node = OmegaConf.to_container(cfg.algo.sampler, resolve=True, throw_on_missing=True)
    assert node.keys() - {"_target_"} == signature(ServerRollouts).parameters.keys()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ("algo.sampler.sync=often",),
            r"algo\.sampler\.sync=often: .*sync=trl_vllm",
        ),
        (("algo.sampler.sync=none", "algo.sampler.max_failed=2"), r"algo\.sampler\.max_failed=2: "),
    ],
    ids=["sync", "share"],
)
def test_what_is_no_configuration_of_a_server(folder, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        validate(configure(folder, tmp_path, *SERVER, *overrides))
