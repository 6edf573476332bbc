"""Counter-based random numbers: the same key and counter give the same number, on any device.

A stateful generator hands its numbers out in order, so what a row receives depends on how many
rows came before it: on the batch size, the number of ranks, the workers, the resume point. Here a
number is a hash of what it is *for* (seed, optimiser step, row, column), and nothing else.

Legend: B rows, N columns.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

_WORD = 1 << 64
# Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators": SplitMix64.
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIER_1 = 0xBF58476D1CE4E5B9
_MULTIPLIER_2 = 0x94D049BB133111EB


def _signed(value: int) -> int:
    """The int64 with the same bits as `value` modulo 2^64: torch has no unsigned arithmetic."""
    value %= _WORD
    return value - _WORD if value >= _WORD // 2 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift: torch's `>>` copies the sign bit, so the copies are masked off."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser, a bijection of 64-bit words in which every bit affects every bit."""
    x = (x ^ _shift_right(x, 30)) * _signed(_MULTIPLIER_1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MULTIPLIER_2)
    return x ^ _shift_right(x, 31)


def fold_key(key: Sequence[int]) -> int:
    """Hash a tuple of integers (seed, stream, step, ...) into one 64-bit word."""
    word = torch.zeros((), dtype=torch.int64)
    for part in key:
        word = _mix(word + _signed((part + 1) * _GAMMA))
    return int(word)


def keyed_bits(key: Sequence[int], rows_B: Int[Tensor, " B"], columns: int) -> Int[Tensor, "B N"]:
    """64 random bits for every (row, column): `mix(mix(key + gamma row) + gamma (column + 1))`."""
    gamma = _signed(_GAMMA)
    row_word_B = _mix(rows_B.long() * gamma + fold_key(key))
    column_N = torch.arange(1, columns + 1, device=rows_B.device) * gamma
    return _mix(row_word_B[:, None] + column_N)


def keyed_uniform(
    key: Sequence[int], rows_B: Int[Tensor, " B"], columns: int
) -> Float[Tensor, "B N"]:
    """Uniform float32 in [0, 1) on a grid of 2^-24, one for every (row, column).

    Args:
        key: what the numbers are for, e.g. (seed, stream, optimiser step).
        rows_B: counter of every row, e.g. its position in the global batch.
        columns: N, how many numbers each row needs.
    """
    return _shift_right(keyed_bits(key, rows_B, columns), 40).float() * 2.0**-24


def keyed_phase(key: Sequence[int]) -> float:
    """One uniform number in [0, 1) for the key alone, in double precision."""
    bits = keyed_bits(key, torch.zeros(1, dtype=torch.int64), 1)
    return float(_shift_right(bits, 11).double().item() * 2.0**-53)
