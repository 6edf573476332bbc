"""The order of rows does not depend on how they are shared out, nor on where a run resumes."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.ordering import GlobalBatchSampler, ShardedBatchSampler, global_order


@st.composite
def runs(draw):
    world, accumulate, micro = (draw(st.integers(1, 3)) for _ in range(3))
    size = world * accumulate * micro
    rows = draw(st.integers(size, 5 * size))
    return world, accumulate, micro, rows, draw(st.integers(0, 2**64))


def sampler(run, rank=0, steps=7, start_step=0):
    world, accumulate, micro, rows, seed = run
    size = world * accumulate * micro
    return GlobalBatchSampler(
        rows, size, micro, seed, steps, rank, world, accumulate, start_step * size
    )


def global_batches(run, steps=7, start_step=0):
    """Rows of every step in order of position, gathered from all ranks."""
    world, accumulate, micro, *_ = run
    per_rank = [list(sampler(run, rank, steps, start_step)) for rank in range(world)]
    gathered = []
    for step in range(steps - start_step):
        mine = slice(step * accumulate, (step + 1) * accumulate)
        parts = [part for rank in per_rank for part in rank[mine]]
        batch = np.full(world * accumulate * micro, -1)
        batch[np.concatenate([part.positions for part in parts])] = np.concatenate(
            [part.rows for part in parts]
        )
        gathered.append(batch.tolist())
    return gathered


@given(runs())
def test_sharing_out_does_not_change_global_batches(run):
    world, accumulate, micro, rows, seed = run
    alone = (1, 1, world * accumulate * micro, rows, seed)
    assert global_batches(run) == global_batches(alone)


@given(runs())
def test_formula_of_places(run):
    world, accumulate, micro, rows, seed = run
    size = world * accumulate * micro
    order = global_order(seed, 0, rows)
    for rank in range(world):
        for a, part in zip(range(accumulate), sampler(run, rank, steps=1), strict=True):
            places = [(a * world + rank) * micro + b for b in range(micro)]
            assert part.positions.tolist() == places
            assert part.rows.tolist() == order[:size][places].tolist()


@given(runs(), st.integers(0, 7))
def test_resume_is_the_tail(run, start_step):
    assert global_batches(run, start_step=start_step) == global_batches(run)[start_step:]
    accumulate = run[1]
    assert len(sampler(run, start_step=start_step)) == (7 - start_step) * accumulate


@given(runs())
def test_an_epoch_has_each_row_at_most_once(run):
    world, accumulate, micro, rows, _ = run
    steps_per_epoch = rows // (world * accumulate * micro)
    batches = global_batches(run, steps=2 * steps_per_epoch)
    for epoch in (batches[:steps_per_epoch], batches[steps_per_epoch:]):
        seen = [row for batch in epoch for row in batch]
        assert len(seen) == len(set(seen)) == rows - rows % (world * accumulate * micro)


@given(st.integers(0, 2**64 - 1), st.integers(0, 1000), st.integers(0, 50))
def test_global_order_is_a_pure_permutation(seed, epoch, n):
    order = global_order(seed, epoch, n)
    assert sorted(order) == list(range(n))
    global_order.cache_clear()
    assert np.array_equal(global_order(seed, epoch, n), order)


def test_order_is_pinned():
    golden = [3, 5, 2, 7, 0, 6, 1, 4]
    assert global_order(1, 0, 8).tolist() == golden
    assert global_order(1, 1, 8).tolist() != golden
    assert global_order(2, 0, 8).tolist() != golden


def test_first_place_is_uniform():
    first = [int(global_order(0, epoch, 4)[0]) for epoch in range(2000)]
    # Each count is binomial(2000, 1/4): mean 500, standard deviation 19.4.
    assert all(abs(count - 500) < 5 * 19.4 for count in np.bincount(first, minlength=4))


@given(st.integers(0, 30), st.integers(1, 4), st.integers(1, 5))
def test_evaluation_covers_every_row_once(n, world, batch_size):
    samplers = [ShardedBatchSampler(n, batch_size, rank, world) for rank in range(world)]
    for rank, shard in enumerate(samplers):
        rows = [row for part in shard for row in part.rows.tolist()]
        assert rows == list(range(n))[rank::world]
        assert len(list(shard)) == len(shard)
    assert all(part.positions is None for shard in samplers for part in shard)


def test_bad_sizes_are_named():
    with pytest.raises(DataError, match=r"has 3 rows, loader\.global_batch_size=4 needs"):
        GlobalBatchSampler(3, 4, 4, 0, 1)
    with pytest.raises(DataError, match=r"cannot resume after 6 samples: no multiple of .*=4"):
        GlobalBatchSampler(9, 4, 4, 0, 1, start_sample=6)
    with pytest.raises(DataError, match=r"global_batch_size=8 is not 2 rank\(s\) x 1 accum"):
        GlobalBatchSampler(9, 8, 3, 0, 1, world=2)
