"""What reaches the client of trl, in which order; the package itself is not needed."""

import sys
from types import ModuleType
from typing import ClassVar

import pytest
import torch

from decoding.rollout_server import ServerRollouts, WeightSync
from decoding.weight_sync import TrlVllm


class FakeClient:
    """Notes what it is asked for."""

    calls: ClassVar[list[tuple]] = []

    def __init__(self, **options):
        self.calls.append(("open", options))

    def init_communicator(self, device):
        self.calls.append(("communicator", device))

    def update_named_param(self, name, weights):
        assert not isinstance(weights, torch.nn.Parameter)
        self.calls.append((name, weights.tolist()))

    def reset_prefix_cache(self):
        self.calls.append(("reset",))

    def close_communicator(self):
        self.calls.append(("close",))


@pytest.fixture
def calls(monkeypatch):
    for name in ("trl", "trl.extras"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    module = ModuleType("trl.extras.vllm_client")
    module.VLLMClient = FakeClient
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(FakeClient, "calls", [])
    return FakeClient.calls


def test_every_parameter_goes_by_its_name(calls):
    layer = torch.nn.Linear(2, 1)
    sync = TrlVllm("http://127.0.0.1:8000", group_port=5, timeout_s=3.0)
    assert isinstance(sync, WeightSync) and calls == [], "a run that never samples opens nothing"
    sampler = ServerRollouts("http://127.0.0.1:8000/v1", "toy", sync)
    sampler.follow(layer)
    with torch.no_grad():
        layer.bias += 1.0
    sampler.follow(layer)
    sampler.close()
    sampler.close()
    opened = {"base_url": "http://127.0.0.1:8000", "group_port": 5, "connection_timeout": 3.0}
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    before = (layer.bias - 1.0).tolist()
    assert calls[:2] == [("open", opened), ("communicator", torch.device("cpu"))]
    assert [name for name, *_ in calls[2:]] == ["weight", "bias", "reset"] * 2 + ["close"]
    assert calls[2][1] == calls[5][1] == weight and calls[6][1] == bias
    assert calls[3][1] == pytest.approx(before)


def test_without_trl_one_line_says_what_to_do(monkeypatch):
    for name in ("trl", "trl.extras.vllm_client", "trl.generation.vllm_client"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ValueError, match=r"algo\.sampler\.sync: needs the package trl; allowed"):
        TrlVllm("http://127.0.0.1:8000")
