"""Which matrix kernels may be used for fp32: the fastest that is still fp32."""

from functools import cache

import torch


def relative_error(precision: str) -> float:
    """Largest error of a 256 x 768 x 256 product against float64, relative to its largest entry."""
    kept = torch.get_float32_matmul_precision()
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(256, 768, generator=generator)
    b = torch.randn(768, 256, generator=generator)
    exact = a.double() @ b.double()
    try:
        torch.set_float32_matmul_precision(precision)
        return float(((a @ b).double() - exact).abs().max() / exact.abs().max())
    finally:
        torch.set_float32_matmul_precision(kept)


@cache
def use_fastest_exact_matmul(tolerance: float = 1e-5) -> str:
    """Choose the CPU's fp32 matmul precision once per process and return its name.

    "medium" permits bf16 products. On CPUs without bf16 matrix tiles it selects another library
    whose fp32 product is as exact and twice as fast; with such tiles it would really round to bf16
    (relative error 4e-3). So the error is measured, and the permission withdrawn if it is used.
    With a GPU present nothing is changed: there the name has another meaning.
    """
    precision = "highest"
    if not torch.cuda.is_available() and relative_error("medium") < tolerance:
        precision = "medium"
    torch.set_float32_matmul_precision(precision)
    return precision
