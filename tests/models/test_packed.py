"""Packed linear layers compute what the plain ones do."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.packed import PackedLinear, can_pack, packed_copy
from models.tiny_causal import tiny_causal

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("gelu", [True, False])
@torch.no_grad()
def test_packed_equals_plain(dtype, bias, gelu):
    """Any number of rows, leading dimensions, columns of a larger tensor; with and without GELU."""
    if not can_pack(CPU, dtype):
        pytest.skip(f"no packed operators for {dtype} on this CPU")
    torch.manual_seed(0)
    linear = nn.Linear(48, 80, bias=bias).to(dtype)
    packed = PackedLinear(linear, gelu)
    for x in (torch.randn(1, 48), torch.randn(3, 37, 48), torch.randn(5, 2, 96)[..., ::2]):
        exact = copy.deepcopy(linear).float()(x.to(dtype).float())
        exact = F.gelu(exact, approximate="tanh") if gelu else exact
        rounding = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
        found = packed(x.to(dtype))
        assert found.dtype == dtype and found.shape == (*x.shape[:-1], 80)
        torch.testing.assert_close(found.float(), exact, **rounding)


def test_what_cannot_be_packed():
    """Other devices and types keep the plain layer."""
    assert not can_pack(torch.device("cuda"), torch.float32)
    assert not can_pack(CPU, torch.float64)


@torch.no_grad()
def test_a_packed_copy_says_the_same_and_shares_the_weights():
    target = tiny_causal(num_hidden_layers=2)
    model, decoder = target.model, target.decoding_model
    if not can_pack(CPU, torch.float32):
        pytest.skip("no packed operators on this CPU")
    assert decoder is not model and decoder is target.decoding_model
    assert any(isinstance(module, PackedLinear) for module in decoder.modules())
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    kinds = [part.config._attn_implementation for part in (model, decoder)]
    assert kinds == ["sdpa", "grouped_sdpa"]
    shared = {held.data_ptr() for held in model.parameters()}
    assert {held.data_ptr() for held in decoder.parameters()} <= shared
    ids = torch.randint(0, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decoder(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    assert packed_copy(decoder) is decoder


def test_double_precision_stays_as_it_is():
    target = tiny_causal(num_hidden_layers=1, dtype="float64")
    assert target.decoding_model is target.model


def linear_and_packed():
    if not can_pack(CPU, torch.float32):
        pytest.skip("no packed operators on this CPU")
    linear = nn.Linear(8, 6)
    return linear, PackedLinear(linear)


@torch.no_grad()
def test_a_weight_that_changes_after_packing_is_told():
    linear, packed = linear_and_packed()
    x = torch.randn(2, 8)
    packed(x)
    linear.weight.mul_(2)
    with pytest.raises(RuntimeError, match="was changed: pack its network again"):
        packed(x)
    linear, packed = linear_and_packed()
    linear.double()
    with pytest.raises(RuntimeError, match="was changed"):
        packed(x)


@torch.no_grad()
@pytest.mark.parametrize("again", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_packed_layers_are_copied_and_pickled(again):
    _, packed = linear_and_packed()
    x = torch.randn(2, 8)
    copied = again(packed)
    assert torch.equal(copied(x), packed(x))
    assert copied.weight.data_ptr() != packed.weight.data_ptr()
    assert list(copied.state_dict()) == ["weight", "bias"]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.float32])
def test_packed_layers_follow_their_type(dtype):
    linear, packed = linear_and_packed()
    x = torch.randn(2, 8)
    expected = linear(x)
    found = packed.to(dtype)(x.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@torch.no_grad()
def test_packed_layers_under_autocast_keep_their_own_type():
    linear, packed = linear_and_packed()
    x = torch.randn(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        found = packed(x.bfloat16())
    torch.testing.assert_close(found, linear(x.bfloat16().float()), rtol=1e-4, atol=1e-4)


def test_a_target_that_is_not_needed_any_more_leaves_with_its_copy():
    target = tiny_causal(num_hidden_layers=1, seed=7)
    held = weakref.ref(target.model), weakref.ref(target.decoding_model)
    del target
    gc.collect()
    assert held[0]() is None and held[1]() is None
