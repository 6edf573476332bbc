"""A new sampler in one module: from left to right.

Legend: B sequences, S positions of the block.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoding.reveal import Planned
from objectives.noise import Schedule


class LeftToRight(Planned):
    """Reveals the leftmost masked positions first, whatever their clocks.

    Args:
        tokens_per_step: positions revealed by one forward pass.
    """

    def __init__(self, tokens_per_step: int = 1) -> None:
        if tokens_per_step < 1:
            raise ValueError(f"tokens_per_step={tokens_per_step}: allowed an integer >= 1")
        self.tokens_per_step = tokens_per_step

    def plan(
        self,
        clock_BS: Float[Tensor, "B S"],
        masked_BS: Bool[Tensor, "B S"],
        schedule: Schedule,
    ) -> Int[Tensor, "B S"]:
        """The number of masked positions to the left, in groups of `tokens_per_step`."""
        rank_BS = masked_BS.long().cumsum(-1) - 1
        return (rank_BS // self.tokens_per_step).masked_fill(~masked_BS, -1)
