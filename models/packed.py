"""Linear layers whose weights are laid out for the CPU's matrix kernels once, not in every call.

Decoding multiplies the same weights with a few rows again and again. oneDNN wants them in blocks of
its own; given a plain matrix it rearranges that first, which with 16 rows takes half (fp32) to
three quarters (bf16) as long as the product itself. The products are the same ones: without GELU
the result is equal to that of `nn.Linear`, bit for bit where that uses oneDNN too.
"""

import copy
from collections.abc import Callable
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
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

    Copied, unpickled, moved or cast it packs anew; where that cannot be it is the plain layer.

    Args:
        linear: the layer to stand in for; its weight must not change afterwards.
        gelu: apply GELU (tanh) to the sum before it is rounded.
    """

    def __init__(self, linear: nn.Linear, gelu: bool = False) -> None:
        nn.Module.__init__(self)  # nn.Linear's own would draw new weights
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias, self.gelu = linear.weight, linear.bias, gelu
        self._pack()

    def forward(self, input: Tensor) -> Tensor:
        """[..., in] -> [..., out].

        Raises:
            RuntimeError: the weight has changed since it was packed.
        """
        if self._packed is None:
            output = F.linear(input, self.weight, self.bias)
            return F.gelu(output, approximate="tanh") if self.gelu else output
        if _state(self.weight) != self._packed_state:
            raise RuntimeError("the weight of a packed layer was changed: pack its network again")
        after = ("gelu", (), "tanh") if self.gelu else ("none", (), "")
        # Under autocast the layer before may have given another type.
        same = input.to(self.weight.dtype)
        return torch.ops.mkldnn._linear_pointwise(same, self._packed, self.bias, *after)

    def _pack(self) -> None:
        weight, self._packed = self.weight.detach(), None
        if can_pack(weight.device, weight.dtype):
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, _ROWS)
            self._packed_state = _state(self.weight)

    def _apply(self, fn: Callable, recurse: bool = True) -> "PackedLinear":
        super()._apply(fn, recurse)
        if self._packed is None or _state(self.weight) != self._packed_state:
            self._pack()
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {key: held for key, held in self.__dict__.items() if key != "_packed"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._pack()


def _state(weight: Tensor) -> tuple[int, int]:
    """Where the numbers lie and how often they were changed (uncounted in inference mode)."""
    return weight.data_ptr(), 0 if weight.is_inference() else weight._version


def packed_copy(network: Network) -> Network:
    """A copy whose linear layers are packed; where that cannot be, or has been, the network itself.

    All weights are shared with the original, and must not change afterwards. The packed layout of
    the linear ones comes on top: twice their memory.
    """
    weight = next(network.parameters())
    packed = any(isinstance(module, PackedLinear) for module in network.modules())
    if packed or not can_pack(weight.device, weight.dtype):
        return network
    copied = copy.deepcopy(
        network, {id(held): held for held in chain(network.parameters(), network.buffers())}
    )
    for module in list(copied.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, PackedLinear(child))
    return copied
