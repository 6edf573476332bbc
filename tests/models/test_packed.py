"""Packed linear layers compute what the plain ones do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.packed import PackedLinear, can_pack, packed_product
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
        exact = linear.float()(x.to(dtype).float())
        exact = F.gelu(exact, approximate="tanh") if gelu else exact
        rounding = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {}
        found = packed(x.to(dtype))
        assert found.dtype == dtype and found.shape == (*x.shape[:-1], 80)
        torch.testing.assert_close(found.float(), exact, **rounding)
        linear.to(dtype)


def test_what_cannot_be_packed():
    """Other devices and types keep the plain layer."""
    assert not can_pack(torch.device("cuda"), torch.float32)
    assert not can_pack(CPU, torch.float64)


@torch.no_grad()
def test_a_packed_copy_says_the_same_and_shares_the_weights():
    target = tiny_causal(num_hidden_layers=2)
    model, decoder = target.model, target.decoder
    if not can_pack(CPU, torch.float32):
        pytest.skip("no packed operators on this CPU")
    assert decoder is not model and decoder is target.decoder
    assert any(isinstance(module, PackedLinear) for module in decoder.modules())
    assert not any(isinstance(module, PackedLinear) for module in model.modules())
    kinds = [part.config._attn_implementation for part in (model, decoder)]
    assert kinds == ["sdpa", "grouped_sdpa"]
    shared = {held.data_ptr() for held in model.parameters()}
    assert {held.data_ptr() for held in decoder.parameters()} <= shared
    ids = torch.randint(0, 260, (2, 9), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(decoder(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
    product = packed_product(target.head_VD)
    x = torch.randn(2, 3, 64)
    torch.testing.assert_close(product(x), x @ target.head_VD.T, rtol=1e-4, atol=1e-4)


def test_double_precision_stays_as_it_is():
    target = tiny_causal(num_hidden_layers=1, dtype="float64")
    assert target.decoder is target.model
