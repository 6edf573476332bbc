"""Linear layers whose weights are laid out for the CPU's matrix kernels once, not in every call.

Decoding multiplies the same weights with a few rows again and again. oneDNN wants them in blocks of
its own; given a plain matrix it rearranges that first, which with 16 rows takes half (fp32) to
three quarters (bf16) as long as the product itself. The products are the same ones: without GELU
the result is equal to that of `nn.Linear`, bit for bit where that uses oneDNN too.
"""

import copy
from itertools import chain
from typing import TypeVar

import torch
from torch import Tensor, nn

Network = TypeVar("Network", bound=nn.Module)
_ROWS = 16  # what the layout is chosen for; any number of rows may follow


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this build of torch has the operators, for this device and type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    operators = torch.ops.mkldnn
    if not all(
        hasattr(operators, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    ):
        return False
    return dtype == torch.float32 or (
        dtype == torch.bfloat16 and operators._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Linear):
    """x W' + b without gradient, with a second, packed copy of W; optionally tanh-GELU behind it.

    Args:
        linear: the layer to stand in for; its weight must not change afterwards.
        gelu: apply GELU (tanh) to the sum before it is rounded.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw new weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _ROWS)
        self._after = ("gelu", (), "tanh") if gelu else ("none", (), "")

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(input, self._packed, self.bias, *self._after)


def packed_copy(network: Network) -> Network:
    """A copy whose linear layers are packed; where that cannot be, the network itself.

    All weights are shared with the original, and must not change afterwards. The packed layout of
    the linear ones comes on top: twice their memory.
    """
    weight = next(network.parameters())
    if not can_pack(weight.device, weight.dtype):
        return network
    copied = copy.deepcopy(
        network, {id(held): held for held in chain(network.parameters(), network.buffers())}
    )
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
    return copied


def packed_product(weight: Tensor) -> nn.Linear:
    """x W' as a layer, packed where that can be."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    return PackedLinear(layer) if can_pack(weight.device, weight.dtype) else layer
