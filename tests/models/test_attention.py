"""Attention patterns against the dense mask, each other, and finite differences of influence."""

import pytest
import torch

from models.attention import (
    BlockDiffusionAttention,
    CachedAttention,
    FullAttention,
    _flex_mask,
    attend,
    block_causal_mask,
    block_diffusion_mask,
    resolve_backend,
)
from models.dit import DiT

CPU = torch.device("cpu")
LENGTH, VOCABULARY = 12, 23


@pytest.fixture(scope="module")
def network():
    """A small network with no zero-initialised part, so that everything influences everything."""
    torch.manual_seed(0)
    net = DiT(
        vocab_size=VOCABULARY, hidden_size=32, n_blocks=3, n_heads=2, length=LENGTH, dropout=0.0
    ).eval()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net


def noisy_and_clean(batch=2):
    """x_t and x_0."""
    generator = torch.Generator().manual_seed(1)
    x0 = torch.randint(0, VOCABULARY - 1, (batch, LENGTH), generator=generator)
    masked = torch.rand(batch, LENGTH, generator=generator) < 0.5
    return x0.masked_fill(masked, VOCABULARY - 1), x0


def noisy_then_clean(xt, x0, pattern):
    """The input of a pass over both halves."""
    return torch.cat([xt, x0[:, : pattern.num_clean]], dim=1)


def test_block_diffusion_mask_by_definition():
    """The three parts of the published mask, spelled out entry by entry."""
    L, S = 6, 2
    mask = block_diffusion_mask(L, S)
    for query in range(2 * L):
        for key in range(2 * L):
            block_q, block_k = query % L // S, key % L // S
            noisy_q, noisy_k = query < L, key < L
            block_diagonal = noisy_q == noisy_k and block_q == block_k and noisy_q
            offset_causal = noisy_q and not noisy_k and block_q > block_k
            causal = not noisy_q and not noisy_k and block_q >= block_k
            assert bool(mask[query, key]) == (block_diagonal or offset_causal or causal)


@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("chunk", [None, 12])
@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_chunks_equal_the_dense_mask(block_size, chunk, backend):
    """Values and gradients of every chunked kernel against one dense masked softmax."""
    S = 2 * LENGTH - block_size
    q, k, v = (torch.randn(2, 2, S, 8, requires_grad=True) for _ in range(3))
    dense = attend(q, k, v, block_diffusion_mask(LENGTH, block_size)[:S, :S], "math")
    pattern = BlockDiffusionAttention(LENGTH, block_size, backend, CPU, chunk or block_size)
    ours = pattern.at(0)(q, k, v)
    torch.testing.assert_close(ours, dense, atol=1e-5, rtol=1e-4)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (q, k, v)),
        torch.autograd.grad(dense.square().sum(), (q, k, v)), strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)
    noisy_only = pattern.at(0)(q[:, :, :LENGTH], k, v)
    torch.testing.assert_close(noisy_only, dense[:, :, :LENGTH], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("num_queries", [LENGTH, 2 * LENGTH - 4])
def test_flex_mask_equals_the_dense_mask(num_queries):
    """The mask function given to flex_attention, evaluated without compiling anything."""
    S = 2 * LENGTH - 4
    block_mask = _flex_mask(LENGTH, 4, num_queries, S, "cpu")
    index = torch.arange(S)
    grid = block_mask.mask_mod(0, 0, index[:num_queries, None], index[None, :])
    assert torch.equal(grid, block_diffusion_mask(LENGTH, 4)[:num_queries, :S])


class DensePattern:
    """The published input [x_t ; x_0] in full, under one dense mask."""

    positions, num_outputs = torch.arange(LENGTH).repeat(2), LENGTH

    def __init__(self, block_size):
        self.mask = block_diffusion_mask(LENGTH, block_size)

    def at(self, layer):
        return lambda q, k, v: attend(q, k, v, self.mask[: q.shape[2]], "math")


@pytest.mark.parametrize("block_size", [1, 4, 12])
def test_the_last_clean_block_is_not_needed(network, block_size):
    """Logits without it equal those of the whole [x_t ; x_0]."""
    xt, x0 = noisy_and_clean()
    pattern = BlockDiffusionAttention(LENGTH, block_size, "math", CPU)
    assert pattern.num_clean == LENGTH - block_size
    whole = network.logits(network(torch.cat([xt, x0], 1), DensePattern(block_size)))
    ours = network.logits(network(noisy_then_clean(xt, x0, pattern), pattern))
    torch.testing.assert_close(ours, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("block_size", [1, 3, 4, 12])
def test_training_pass_equals_cached_decoding(network, block_size):
    """Noisy-block logits from [x_t ; x_0] in one pass, and block by block against the cache."""
    xt, x0 = noisy_and_clean()
    pattern = BlockDiffusionAttention(LENGTH, block_size, "math", CPU)
    trained = network.logits(network(noisy_then_clean(xt, x0, pattern), pattern))
    for fused in (False, True):
        cache = network.new_cache(2, LENGTH, torch.float32)
        for start in range(0, LENGTH, block_size):
            here = slice(start, start + block_size)
            ids, clean = xt[:, here], 0
            if fused and start:
                ids, clean = torch.cat([x0[:, start - block_size : start], ids], 1), block_size
            pattern = CachedAttention(cache, start - clean, clean, block_size, block_size, "auto")
            logits = network.logits(network(ids, pattern))[:, clean:]
            cache.length += clean
            torch.testing.assert_close(logits, trained[:, here], atol=2e-5, rtol=1e-4)
            if not fused:
                pattern = CachedAttention(cache, start, block_size, 0, block_size, "auto")
                network(x0[:, here], pattern)
                cache.length += block_size


def test_influence_follows_the_mask(network):
    """Changing a clean token moves the noisy logits of later blocks, and nothing else."""
    xt, x0 = noisy_and_clean(1)
    pattern = BlockDiffusionAttention(LENGTH, 4, "math", CPU)
    before = network.logits(network(noisy_then_clean(xt, x0, pattern), pattern))
    changed = x0.clone()
    changed[0, 5] = (changed[0, 5] + 1) % (VOCABULARY - 1)
    after = network.logits(network(noisy_then_clean(xt, changed, pattern), pattern))
    moved = (after - before).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False] * 8 + [True] * 4


def test_block_size_of_the_length_is_plain_bidirectional(network):
    """BD3-LM with one block is MDLM: there is no clean half."""
    xt, _ = noisy_and_clean()
    block = BlockDiffusionAttention(LENGTH, LENGTH, "math", CPU)
    full = FullAttention(LENGTH, False, "math", CPU)
    torch.testing.assert_close(network(xt, block), network(xt, full), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("causal", [False, True])
def test_full_attention_backends_agree(causal):
    """math and sdpa, with and without causality."""
    q, k, v = (torch.randn(2, 2, LENGTH, 8) for _ in range(3))
    math = FullAttention(LENGTH, causal, "math", CPU).at(0)(q, k, v)
    sdpa = FullAttention(LENGTH, causal, "sdpa", CPU).at(0)(q, k, v)
    torch.testing.assert_close(math, sdpa, atol=1e-5, rtol=1e-4)


def test_block_causal_mask_of_one_is_causal():
    """Blocks of one token are the usual triangle."""
    assert torch.equal(block_causal_mask(5, 1), torch.ones(5, 5).tril().bool())


def test_errors_name_the_key():
    """Unknown backend, block size that does not divide, full cache."""
    with pytest.raises(ValueError, match=r"model\.attn_backend=fast: allowed auto, sdpa"):
        resolve_backend("fast", CPU)
    with pytest.raises(ValueError, match=r"block_size=5: does not divide model\.length=12"):
        BlockDiffusionAttention(12, 5, "math", CPU)
    net = DiT(vocab_size=5, hidden_size=8, n_blocks=1, n_heads=1, length=4)
    with pytest.raises(ValueError, match="cache holds 0 of 4 tokens: no room for 5 more"):
        CachedAttention(net.new_cache(1, 4, torch.float32), 0, 0, 5, 5, "auto")
