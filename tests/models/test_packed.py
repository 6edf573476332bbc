"""Packed linear layers compute what the plain ones do."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.packed import PackedLinear, can_pack

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
