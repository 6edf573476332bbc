"""On a GPU: the draft network with flex attention against the plain products, and no waiting."""

import pytest
import torch

from models.dflash import DFlashConfig, DFlashNetwork

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICE = torch.device("cuda")


@pytest.fixture
def network():
    torch.manual_seed(0)
    config = DFlashConfig(
        hidden_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=64, intermediate_size=256, vocab_size=100, block_size=16, mask_token_id=99,
        target_layer_ids=(1, 3), num_target_layers=6,
    )  # fmt: skip
    return DFlashNetwork(config).to(DEVICE)


def batch(seed):
    """Two rows of 300 with three documents; 40 sorted anchors, some of them invalid."""
    generator = torch.Generator().manual_seed(seed)
    segment = torch.tensor([[0] * 100 + [1] * 180 + [-1] * 20, [2] * 300])
    position = torch.tensor([[*range(100), *range(180), *[0] * 20], [*range(300)]])
    anchors = torch.stack([torch.randperm(280, generator=generator)[:40] for _ in range(2)])
    valid = torch.rand(2, 40, generator=generator) < 0.9
    taps = torch.randn(2, 300, 256, generator=generator)
    embeds = torch.randn(2, 40, 16, 128, generator=generator)
    return [x.to(DEVICE) for x in (taps, embeds, anchors.sort().values, valid, segment, position)]


def outputs(network, backend, seed=0):
    """Hidden states, and gradients under a random linear loss."""
    network.attn_backend = backend
    network.zero_grad()
    taps, embeds, *rest = batch(seed)
    hidden = network(taps, embeds, network.layout(*rest))
    weight = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(5)).to(DEVICE)
    (hidden.float() * weight).sum().backward()
    return [hidden.detach().float(), *(p.grad.clone() for p in network.parameters())]


@pytest.mark.parametrize("backend", ["flex", "sdpa"])
def test_kernels_equal_the_products(network, backend):
    """Values and gradients in fp32."""
    expected = outputs(network, "math")
    for ours, exact in zip(outputs(network, backend), expected, strict=True):
        assert (ours - exact).norm() < 1e-3 * exact.norm()


def test_autocast_stays_near_fp32(network):
    expected = outputs(network, "math")
    with torch.autocast("cuda", torch.bfloat16):
        mixed = outputs(network, "flex")
    for ours, exact in zip(mixed, expected, strict=True):
        assert (ours - exact).norm() < 0.05 * exact.norm()


def test_a_step_does_not_wait_for_the_device(network):
    """Layout, forward and backward without a synchronisation, once everything is compiled."""
    network.attn_backend = "flex"
    outputs(network, "flex")
    taps, embeds, *rest = batch(seed=1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        network(taps, embeds, network.layout(*rest)).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(parameter.grad is not None for parameter in network.parameters())
