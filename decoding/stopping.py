"""When a sequence ends before its full length.

Legend: B sequences, L length.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

LENGTH, END_OF_TEXT, LOW_ENTROPY = "length", "eos", "entropy"


def unigram_entropy(ids_BN: Int[Tensor, "B N"]) -> Float[Tensor, " B"]:
    """Entropy in nats of the token frequencies of each row: at most log N."""
    sorted_BN, _ = ids_BN.sort(dim=-1)
    starts_BN = torch.ones_like(sorted_BN, dtype=torch.bool)
    starts_BN[:, 1:] = sorted_BN[:, 1:] != sorted_BN[:, :-1]
    run_BN = starts_BN.long().cumsum(-1) - 1
    count_BN = torch.zeros_like(sorted_BN).scatter_add_(1, run_BN, torch.ones_like(sorted_BN))
    return torch.special.entr(count_BN.double() / ids_BN.shape[1]).sum(-1)


class StopRules:
    """Ends sequences at their first generated EOS, or when they repeat themselves.

    A sequence whose last `entropy_window` tokens have a unigram entropy below `min_entropy` has
    degenerated, and that window is cut off (arXiv 2503.09573, sec. 6.2).

    Attributes:
        active_B: sequences still running.
        length_B: tokens of each sequence that count.
        reasons: why each one ended: length, eos or entropy.
    """

    def __init__(
        self, given_BL: Bool[Tensor, "B L"], eos_id: int, entropy_window: int, min_entropy: float
    ) -> None:
        batch, length = given_BL.shape
        self._given_BL, self._eos_id = given_BL, eos_id
        self._window, self._min_entropy = entropy_window, min_entropy
        self.active_B = torch.ones(batch, dtype=torch.bool)
        self.length_B = torch.full((batch,), length)
        self.reasons = [LENGTH] * batch

    def update(self, x_BL: Int[Tensor, "B L"], start: int, end: int) -> None:
        """Look at the segment start..end, which has just been finished (host tensors)."""
        is_eos_BS = (x_BL[:, start:end] == self._eos_id) & ~self._given_BL[:, start:end]
        if start == 0:  # what begins a sequence does not end it: BOS and EOS may be one token
            is_eos_BS[:, 0] = False
        first_B = is_eos_BS.int().argmax(-1) + start + 1
        self._stop(is_eos_BS.any(-1), first_B, END_OF_TEXT)
        # The window must hold nothing that was given: a prompt may repeat itself.
        is_full_B = end - self._given_BL.sum(-1) >= self._window
        if is_full_B.any():
            entropy_B = unigram_entropy(x_BL[:, end - self._window : end])
            cut_B = torch.full_like(self.length_B, end - self._window)
            self._stop(is_full_B & (entropy_B < self._min_entropy), cut_B, LOW_ENTROPY)

    def _stop(self, ends_B: Tensor, length_B: Tensor, reason: str) -> None:
        ends_B = ends_B & self.active_B
        self.length_B = torch.where(ends_B, length_B, self.length_B)
        self.active_B = self.active_B & ~ends_B
        for row in ends_B.nonzero()[:, 0].tolist():
            self.reasons[row] = reason


def check_entropy_rule(window: int, min_entropy: float) -> None:
    """Refuse a rule that would stop everything: no window of n tokens has more than log n nats."""
    if window < 1 or min_entropy >= math.log(window):
        raise ValueError(
            f"sampling.min_entropy={min_entropy}: allowed below log(entropy_window={window})"
        )
