"""From rows to the batches that algorithms receive.

Legend: B rows of a micro-batch; L tokens of a row.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count, islice
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from data.arrow import Rows, regroup
from data.blocks import IDS, LENGTH, Block
from data.errors import DataError
from data.ordering import GlobalBatchSampler, MicroBatch, ShardedBatchSampler, rank_positions

Batch = dict[str, Tensor]
BatchSampler = GlobalBatchSampler | ShardedBatchSampler | Sequence[MicroBatch]


def make_batch(
    block: Block, index: np.ndarray, positions: np.ndarray | None, score_padding: bool
) -> Batch:
    """Tensors of a micro-batch.

    Returns:
        `input_ids` int64 [B, L]; `token_mask` bool [B, L], true where a row has tokens and false on
        padding; `loss_mask` bool [B, L], what an objective scores: `token_mask`, or everything if
        `score_padding`; `index` int64 [B], row in the dataset; every feature, int64 [B, L];
        `origin`, if rows have it, int64 [B, documents of a row]; and while training `position`
        int64 [B], place inside the global batch.
    """
    ids = block[IDS]
    length = block.get(LENGTH)
    if length is None:
        is_token = np.ones(ids.shape, dtype=bool)
    else:
        is_token = np.arange(ids.shape[1]) < length.astype(np.int64)[:, None]
    is_scored = np.ones_like(is_token) if score_padding else is_token
    batch = {
        name: torch.from_numpy(column.astype(np.int64))
        for name, column in block.items()
        if name != LENGTH
    }
    batch["token_mask"] = torch.from_numpy(is_token)
    batch["loss_mask"] = torch.from_numpy(is_scored.copy())
    batch["index"] = torch.from_numpy(np.array(index, dtype=np.int64))
    if positions is not None:
        batch["position"] = torch.from_numpy(np.array(positions, dtype=np.int64))
    return batch


class RowDataset(Dataset):
    """Rows of the token cache, fetched a whole micro-batch at a time."""

    def __init__(self, rows: Rows, score_padding: bool = False) -> None:
        self.rows = rows
        self.score_padding = score_padding

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """One row, as a batch of one."""
        return self.__getitems__(MicroBatch(np.array([index]), None))

    def __getitems__(self, micro: MicroBatch) -> Batch:
        """The micro-batch that a sampler of `data.ordering` asks for."""
        return make_batch(
            self.rows.take(micro.rows), micro.rows, micro.positions, self.score_padding
        )


class RowStream(IterableDataset):
    """Micro-batches of one rank, packed while training from documents in the source's own order.

    All ranks tokenize the whole stream and keep their places of each global batch, so the result
    does not depend on the number of ranks; the stream begins anew when it ends. Resuming skips the
    rows seen so far, which means tokenizing them again. There is no shuffling: shuffle the files.

    Args:
        blocks: begins a pass over the packed rows.
        global_batch_size, micro_batch_size, rank, world, accumulate: see `data.ordering`.
        start_step, total_steps: steps to skip, and of the whole run.
        score_padding: see `make_batch`.
    """

    def __init__(
        self,
        blocks: Callable[[], Iterable[Block]],
        global_batch_size: int,
        micro_batch_size: int,
        total_steps: int,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
        start_step: int = 0,
        score_padding: bool = False,
    ) -> None:
        self.blocks = blocks
        self.global_batch_size = global_batch_size
        self.places = rank_positions(micro_batch_size, rank, world, accumulate)
        self.steps = (start_step, total_steps)
        self.score_padding = score_padding

    def __iter__(self) -> Iterator[Batch]:
        steps = regroup(self._endless(), self.global_batch_size)
        for step, block in enumerate(islice(steps, *self.steps), start=self.steps[0]):
            for positions in self.places:
                mine = {name: column[positions] for name, column in block.items()}
                index = step * self.global_batch_size + positions
                yield make_batch(mine, index, positions, self.score_padding)

    def _endless(self) -> Iterator[Block]:
        for _ in count():
            rows = 0
            for block in self.blocks():
                rows += len(block[IDS])
                yield block
            if rows == 0:
                raise DataError("the streamed training data does not fill a single row")


class ShardedLoader:
    """A DataLoader that already holds its rank's share and its place in the run.

    Lightning puts a distributed sampler of its own into every torch `DataLoader`, which would
    shard the rows twice; it takes other iterables as they are.

    Args:
        loader: what is iterated.
        length: number of batches reported; for training that of the whole run, because Lightning
            counts the batches before a resumed checkpoint as fetched.
    """

    def __init__(self, loader: DataLoader, length: int) -> None:
        self.loader = loader
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.loader)

    def state_dict(self) -> dict[str, Any]:
        """Empty: the place in the run follows from the trainer's step. Marks it as resumable."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def row_loader(
    rows: Rows, sampler: BatchSampler, *, score_padding: bool, num_workers: int
) -> DataLoader:
    """Batches of rows in the order of a sampler.

    Args:
        rows: of a token cache.
        sampler: gives the places of every batch's rows.
        score_padding: whether padding counts as text.
        num_workers: processes that read ahead.
    """
    dataset = RowDataset(rows, score_padding)
    # torch expects samplers of lists; these give what RowDataset reads in one go.
    batching: dict[str, Any] = {"batch_sampler": sampler, "collate_fn": _identity}
    return DataLoader(dataset, **batching, **_options(num_workers))


def stream_loader(
    blocks: Callable[[], Iterator[Block]],
    global_batch_size: int,
    micro_batch_size: int,
    total_steps: int,
    *,
    score_padding: bool,
    num_workers: int,
    **place: int,
) -> DataLoader:
    """Batches of rows as they are packed; see `RowStream` for the arguments.

    Raises:
        DataError: more than one worker, between which nothing divides the stream.
    """
    if num_workers > 1:
        raise DataError(f"loader.num_workers={num_workers}: streamed data takes 0 or 1")
    stream = RowStream(
        blocks, global_batch_size, micro_batch_size, total_steps, score_padding=score_padding,
        **place,
    )  # fmt: skip
    return DataLoader(stream, batch_size=None, **_options(num_workers))


def _options(num_workers: int) -> dict[str, Any]:
    # Workers end with their pass: the training loader makes one, and workers that outlive the run
    # would hold up whoever collects it (a sweep, a notebook).
    return {
        "num_workers": num_workers,
        "pin_memory": torch.cuda.is_available(),
        # Opening a loader draws a seed for its workers, which need none. From the global generator
        # it would shift dropout, by an amount that depends on their number.
        "generator": torch.Generator(),
    }


def _identity(batch: Batch) -> Batch:
    """Collation of what is a batch already."""
    return batch
