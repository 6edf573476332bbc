"""The order of rows: pure functions of (seed, place), whatever the number of ranks or workers.

Global batch s takes the places [s G, (s + 1) G) of an endless stream of epochs, each a permutation
of the rows keyed by (seed, epoch); rows that do not fill a last global batch sit the epoch out.
Inside a global batch, micro-batch a of rank r takes the places (a W + r) B + b.

Legend: N rows; G rows of a global batch; W ranks; A micro-batches per step; B rows of a
micro-batch; G = W A B.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from data.errors import DataError


class MicroBatch(NamedTuple):
    """Rows that one rank processes at once.

    Attributes:
        rows: indices into the dataset [B].
        positions: places inside the global batch [B], 0..G-1; None outside training.
    """

    rows: np.ndarray
    positions: np.ndarray | None


@lru_cache(maxsize=1)
def global_order(seed: int, epoch: int, n: int) -> np.ndarray:
    """The permutation of n rows in an epoch [N]: Philox words of the key (seed, epoch), sorted.

    Sorting raw words keeps the order the same under every version of numpy, which shuffling by a
    `Generator` does not promise.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    order = np.argsort(np.random.Philox(key=key).random_raw(n), kind="stable")
    order.flags.writeable = False
    return order


class GlobalBatchSampler:
    """Micro-batches of one rank, from a start to the last step of the run.

    Args:
        n: rows of the dataset, N.
        global_batch_size: rows per optimiser step over all ranks, G.
        micro_batch_size: rows per forward pass of one rank, B.
        seed: key of the order.
        rank, world: this rank, and how many there are (W).
        accumulate: micro-batches per step and rank, A.
        start_sample: samples seen so far by all ranks together, a multiple of G.
        total_steps: optimiser steps of the whole run.

    Raises:
        DataError: G rows do not exist, G is not W A B, or `start_sample` is inside a global batch.
    """

    def __init__(
        self,
        n: int,
        global_batch_size: int,
        micro_batch_size: int,
        seed: int,
        total_steps: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        start_sample: int = 0,
    ) -> None:
        assert 0 <= rank < world
        check_batch_sizes(global_batch_size, micro_batch_size, world, accumulate)
        if n < global_batch_size:
            raise DataError(
                f"the training data has {n} rows, loader.global_batch_size={global_batch_size} "
                "needs at least as many; use more data or a smaller batch"
            )
        if start_sample % global_batch_size:
            raise DataError(
                f"cannot resume after {start_sample} samples: no multiple of "
                f"loader.global_batch_size={global_batch_size}"
            )
        self.n = n
        self.global_batch_size = global_batch_size
        self.micro_batch_size = micro_batch_size
        self.seed = seed
        self.total_steps = total_steps
        self.rank = rank
        self.world = world
        self.accumulate = accumulate
        self.start_step = start_sample // global_batch_size

    def __len__(self) -> int:
        return max(0, self.total_steps - self.start_step) * self.accumulate

    def __iter__(self) -> Iterator[MicroBatch]:
        places = rank_positions(self.micro_batch_size, self.rank, self.world, self.accumulate)
        for step in range(self.start_step, self.total_steps):
            rows = self.rows_of_step(step)
            for positions in places:
                yield MicroBatch(rows[positions], positions)

    def rows_of_step(self, step: int) -> np.ndarray:
        """The rows of global batch `step` [G]."""
        steps_per_epoch = self.n // self.global_batch_size
        epoch, place = divmod(step, steps_per_epoch)
        start = place * self.global_batch_size
        return global_order(self.seed, epoch, self.n)[start : start + self.global_batch_size]


class ShardedBatchSampler:
    """Evaluation: rank r of W takes rows r, r + W, r + 2 W, ... once, in order, without padding.

    Ranks may differ by one row, so by one batch.
    """

    def __init__(self, n: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        assert 0 <= rank < world and batch_size > 0
        self.rows = np.arange(rank, n, world)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.rows) // self.batch_size)

    def __iter__(self) -> Iterator[MicroBatch]:
        for start in range(0, len(self.rows), self.batch_size):
            yield MicroBatch(self.rows[start : start + self.batch_size], None)


def rank_positions(micro_batch_size: int, rank: int, world: int, accumulate: int) -> np.ndarray:
    """Places of one rank inside every global batch [A, B]: (a W + r) B + b."""
    first = (np.arange(accumulate) * world + rank) * micro_batch_size
    return first[:, None] + np.arange(micro_batch_size)


def check_batch_sizes(
    global_batch_size: int, micro_batch_size: int, world: int, accumulate: int
) -> None:
    """Raise DataError unless G = W A B."""
    if micro_batch_size * world * accumulate != global_batch_size:
        raise DataError(
            f"loader.global_batch_size={global_batch_size} is not {world} rank(s) x {accumulate} "
            f"accumulated batch(es) x loader.batch_size={micro_batch_size}"
        )
