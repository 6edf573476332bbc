"""What draft blocks see: intervals, tiles and chunks against a mask made entry by entry."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.dflash_attention import BlockAttention, TrainingLayout, flex_tiles


def intervals(length, num_blocks, seed):
    """Random intervals, some empty."""
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randint(0, length + 1, (2, num_blocks, 2), generator=generator)
    start, stop = pair.amin(-1), pair.amax(-1)
    empty = torch.rand(2, num_blocks, generator=generator) < 0.2
    return start.masked_fill(empty, 0), stop.masked_fill(empty, 0)


def dense_mask(start_BN, stop_BN, length, block_size):
    """Entry by entry: what flex and the chunks have to compute."""
    (B, N), Q = start_BN.shape, block_size
    mask = torch.zeros(B, N * Q, length + N * Q, dtype=torch.bool)
    for row in range(B):
        for query in range(N * Q):
            block = query // Q
            mask[row, query, int(start_BN[row, block]) : int(stop_BN[row, block])] = True
            mask[row, query, length + block * Q : length + (block + 1) * Q] = True
    return mask


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(1, 300),
    num_blocks=st.integers(1, 20),
    block_size=st.integers(1, 20),
    seed=st.integers(0, 2**16),
)
def test_flex_tiles_equal_the_dense_mask(length, num_blocks, block_size, seed):
    """No tile with an allowed pair is left out, full tiles are full, and the formula is right."""
    start, stop = intervals(length, num_blocks, seed)
    for found, expected in tiles_beside_mask(start, stop, length, block_size):
        assert torch.equal(found, expected)


@pytest.mark.parametrize(("first", "last"), [(0, 127), (0, 128), (1, 128), (127, 129), (128, 256)])
def test_flex_tiles_at_their_edges(first, last):
    """Two tiles of queries that all see the same interval, one place more or less than a tile."""
    start, stop = torch.full((1, 32), first), torch.full((1, 32), last)
    for found, expected in tiles_beside_mask(start, stop, length=300, block_size=8):
        assert torch.equal(found, expected)


def tiles_beside_mask(start, stop, length, block_size):
    """What flex is told, and the same of the dense mask: the formula, row by row, the tiles with
    any allowed pair, those with nothing else, and none that is both full and partial."""
    mask = dense_mask(start, stop, length, block_size)
    tiles = flex_tiles(start, stop, length, block_size)
    B, queries, keys = mask.shape
    query, key = torch.arange(queries)[:, None], torch.arange(keys)[None]
    for row in range(B):
        yield tiles.mask_mod(torch.tensor(row), 0, query, key), mask[row]
    padded = torch.nn.functional.pad(mask, (0, -keys % 128, 0, -queries % 128))
    by_tile = padded.unflatten(2, (-1, 128)).unflatten(1, (-1, 128))  # [B, q, 128, T, 128]
    some, every = by_tile.any(4).any(2), by_tile.all(4).all(2)
    listed = {"part": torch.zeros_like(some), "full": torch.zeros_like(some)}
    for name, count, index in (
        ("part", tiles.kv_num_blocks, tiles.kv_indices),
        ("full", tiles.full_kv_num_blocks, tiles.full_kv_indices),
    ):
        for row in range(B):
            for tile in range(some.shape[1]):
                listed[name][row, tile, index[row, 0, tile, : count[row, 0, tile]].long()] = True
    yield listed["part"] | listed["full"], some
    yield listed["full"], every
    yield listed["part"], some & ~every


@pytest.mark.parametrize("backend", ["math", "sdpa"])
@pytest.mark.parametrize(
    ("length", "num_blocks", "block_size"), [(70, 40, 8), (30, 5, 16), (9, 3, 1)]
)
def test_chunks_equal_dense_attention(backend, length, num_blocks, block_size):
    """Values and gradients against one masked softmax over all keys, in fp64."""
    start, stop = intervals(length, num_blocks, seed=7)
    generator = torch.Generator().manual_seed(2)

    def leaf(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator, requires_grad=True)

    q = leaf(2, num_blocks, block_size, 4, 8)
    context = (leaf(2, length, 2, 8), leaf(2, length, 2, 8))
    block = (leaf(2, num_blocks, block_size, 2, 8), leaf(2, num_blocks, block_size, 2, 8))
    ours = BlockAttention.build(start, stop, length, block_size, backend)(q, context, block)
    k, v = (
        torch.cat([seen, own.flatten(1, 2)], 1).transpose(1, 2).repeat_interleave(2, dim=1)
        for seen, own in zip(context, block, strict=True)
    )
    score = q.flatten(1, 2).transpose(1, 2) @ k.transpose(-1, -2) / math.sqrt(8)
    mask = dense_mask(start, stop, length, block_size)[:, None]
    dense = score.masked_fill(~mask, -torch.inf).softmax(-1) @ v
    torch.testing.assert_close(ours.flatten(1, 2).transpose(1, 2), dense, atol=1e-6, rtol=1e-6)
    leaves = (q, *context, *block)
    weight = torch.randn(dense.shape, dtype=torch.float64, generator=generator)
    expected = torch.autograd.grad((dense * weight).sum(), leaves)
    ours = ours.flatten(1, 2).transpose(1, 2)
    for a, b in zip(torch.autograd.grad((ours * weight).sum(), leaves), expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_flex_equals_the_products():
    """The kernel that the compiler makes for the CPU walks over the tiles alone."""
    for num_blocks, block_size in ((40, 16), (23, 7)):
        start, stop = (x.sort(dim=1).values for x in intervals(300, num_blocks, seed=3))
        generator = torch.Generator().manual_seed(4)
        q = torch.randn(2, num_blocks, block_size, 4, 16, generator=generator)
        context = torch.randn(2, 2, 300, 2, 16, generator=generator).unbind()
        block = torch.randn(2, 2, num_blocks, block_size, 2, 16, generator=generator).unbind()
        flex, math_ = (
            BlockAttention.build(start, stop, 300, block_size, backend)(q, context, block)
            for backend in ("flex", "math")
        )
        torch.testing.assert_close(flex, math_, atol=1e-5, rtol=1e-5)


def test_layout_by_hand():
    """Two documents and padding: intervals begin with the document and end before the anchor."""
    segment = torch.tensor([[4, 4, 4, 7, 7, 7, 7, -1]])
    position = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0]])
    anchors, valid = torch.tensor([[1, 3, 6, 900]]), torch.tensor([[True, True, True, False]])
    layout = TrainingLayout.build(anchors, valid, segment, position, block_size=3)
    assert layout.attention.start_BN.tolist() == [[0, 3, 3, 0]]
    assert layout.attention.stop_BN.tolist() == [[1, 3, 6, 0]]
    assert layout.position_BNQ.tolist() == [[[1, 2, 3], [0, 1, 2], [3, 4, 5], [0, 1, 2]]]
