"""On a GPU: flex attention, bf16 and compiled blocks against the plain CPU-style computation."""

import pytest
import torch

from models.attention import BlockDiffusionAttention, FullAttention, attend, block_diffusion_mask
from models.dit import DiT
from objectives.keyed import keyed_bits
from objectives.likelihood import head_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
LENGTH = 256


@pytest.fixture
def device():
    return torch.device("cuda")


@pytest.mark.parametrize("block_size", [4, 16, 256])
@pytest.mark.parametrize("backend", ["flex", "sdpa", "math"])
@pytest.mark.parametrize("has_clean", [True, False])
def test_kernels_equal_the_dense_mask(device, block_size, backend, has_clean):
    """Values and gradients, in fp32 without TF32, the clean queries present or not."""
    torch.manual_seed(0)
    keys = 2 * LENGTH - block_size
    queries = keys if has_clean else LENGTH
    q = torch.randn(2, 4, queries, 64, device=device, requires_grad=True)
    k, v = (torch.randn(2, 4, keys, 64, device=device, requires_grad=True) for _ in range(2))
    dense_mask = block_diffusion_mask(LENGTH, block_size, device)[:queries, :keys]
    dense = attend(q, k, v, dense_mask, "math")
    ours = BlockDiffusionAttention(LENGTH, block_size, backend, device).at(0)(q, k, v)
    torch.testing.assert_close(ours, dense, atol=2e-5, rtol=1e-4)
    for a, b in zip(
        torch.autograd.grad(ours.square().sum(), (q, k, v)),
        torch.autograd.grad(dense.square().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


def make_network(device, **options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 999, "hidden_size": 128, "n_blocks": 3, "n_heads": 2, "length": LENGTH}
    network = DiT(**sizes, dropout=0.0, **options).to(device)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.08)
    return network


def loss_and_gradient(network, device, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 998, (2, 2 * LENGTH - 16), generator=generator).to(device)
    rows = torch.arange(0, 2 * LENGTH, 3, device=device)
    pattern = BlockDiffusionAttention(LENGTH, 16, network.attn_backend, device)
    head = network.output_layer.linear
    with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
        features = network(ids, pattern, rows_M=rows)
        weight = torch.rand(len(rows), generator=generator).to(device)
        target = torch.randint(0, 998, (len(rows),), generator=generator).to(device)
        loss, _ = head_cross_entropy(features, head.weight, head.bias, target, weight, 998)
    grads = torch.autograd.grad(loss, [network.blocks[0].attn_qkv.weight, head.weight])
    return loss.detach(), [grad.float() for grad in grads]


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
@pytest.mark.parametrize("compiled", [False, True])
def test_whole_step_equals_the_plain_one(device, backend, compiled):
    """Loss and gradients of flex, sdpa and compiled blocks, fp32."""
    expected = loss_and_gradient(make_network(device, attn_backend="math"), device)
    network = make_network(device, attn_backend=backend, compile=compiled)
    loss, grads = loss_and_gradient(network, device)
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=0)
    for ours, theirs in zip(grads, expected[1], strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 1e-4


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_bf16_stays_close(device, backend):
    """Autocast: loss to 1 %, gradient direction to 5 %."""
    loss, grads = loss_and_gradient(make_network(device, attn_backend=backend), device)
    low, low_grads = loss_and_gradient(
        make_network(device, attn_backend=backend), device, torch.bfloat16
    )
    torch.testing.assert_close(low, loss, rtol=1e-2, atol=0)
    for ours, theirs in zip(low_grads, grads, strict=True):
        assert (ours - theirs).norm() / theirs.norm() < 5e-2


def test_keyed_numbers_equal_those_of_the_host(device):
    """The hash is integer arithmetic: bit for bit the same on every device."""
    rows = torch.arange(1000)
    assert torch.equal(keyed_bits((3, 1), rows.to(device), 64).cpu(), keyed_bits((3, 1), rows, 64))


def test_full_attention_on_the_device(device):
    """MDLM and AR patterns, sdpa against math."""
    q, k, v = (torch.randn(2, 2, 64, 32, device=device) for _ in range(3))
    for causal in (False, True):
        sdpa = FullAttention(64, causal, "auto", device).at(0)(q, k, v)
        plain = FullAttention(64, causal, "math", device).at(0)(q, k, v)
        torch.testing.assert_close(sdpa, plain, atol=2e-5, rtol=1e-4)
