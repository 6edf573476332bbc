"""The network: published names and counts, row selection, initial state, conditioning."""

import pytest
import torch

from models.attention import BlockDiffusionAttention, FullAttention
from models.dit import DiT, RotaryEmbedding, rotate

CPU = torch.device("cpu")


def small(**options):
    """A network of two blocks."""
    sizes = dict(vocab_size=11, hidden_size=16, n_blocks=2, n_heads=2, length=6, dropout=0.0)
    torch.manual_seed(0)
    return DiT(**{**sizes, **options}).eval()


def shaken(**options):
    """The same with all weights random: at initialisation the output is constant."""
    net = small(**options)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return net


def test_state_dict_has_the_published_names():
    """Names and shapes by which public checkpoints are mapped."""
    shapes = {name: tuple(value.shape) for name, value in small().state_dict().items()}
    block = {
        "norm1.weight": (16,), "attn_qkv.weight": (48, 16), "attn_out.weight": (16, 16),
        "norm2.weight": (16,), "mlp.0.weight": (64, 16), "mlp.0.bias": (64,),
        "mlp.2.weight": (16, 64), "mlp.2.bias": (16,),
        "adaLN_modulation.weight": (96, 128), "adaLN_modulation.bias": (96,),
    }  # fmt: skip
    expected = {
        "vocab_embed.embedding": (11, 16), "rotary_emb.inv_freq": (4,),
        "sigma_map.mlp.0.weight": (128, 256), "sigma_map.mlp.0.bias": (128,),
        "sigma_map.mlp.2.weight": (128, 128), "sigma_map.mlp.2.bias": (128,),
        "output_layer.norm_final.weight": (16,), "output_layer.linear.weight": (11, 16),
        "output_layer.linear.bias": (11,), "output_layer.adaLN_modulation.weight": (32, 128),
        "output_layer.adaLN_modulation.bias": (32,),
    }  # fmt: skip
    for layer in range(2):
        expected |= {f"blocks.{layer}.{name}": shape for name, shape in block.items()}
    assert shapes == expected


def test_small_has_the_published_number_of_parameters():
    """12 x 768 with BERT's vocabulary: 139.3 M."""
    with torch.device("meta"):
        net = DiT(vocab_size=30522, hidden_size=768, n_blocks=12, n_heads=12, length=128)
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(139.3, abs=0.05)


def test_starts_uniform():
    """Zero-initialised head: every token has the same probability."""
    net = small()
    logits = net.logits(net(torch.randint(0, 11, (2, 6)), FullAttention(6, False, "math", CPU)))
    assert not logits.any()


@pytest.mark.parametrize("time_conditioning", [False, True])
@pytest.mark.parametrize("block_diffusion", [False, True])
def test_rows_equal_the_full_output(time_conditioning, block_diffusion):
    """Asking for some rows returns those rows of the full result."""
    net = shaken(time_conditioning=time_conditioning)
    ids = torch.randint(0, 11, (3, 10 if block_diffusion else 6))
    pattern = (
        BlockDiffusionAttention(6, 2, "math", CPU)
        if block_diffusion
        else FullAttention(6, False, "math", CPU)
    )
    sigma = torch.rand(ids.shape)
    full = net(ids, pattern, sigma_BS=sigma).flatten(0, 1)
    rows = torch.tensor([17, 0, 5, 6])
    torch.testing.assert_close(net(ids, pattern, rows_M=rows, sigma_BS=sigma), full[rows])


def test_time_conditioning_is_per_token():
    """A block's noise level moves that block (and who sees it), as a constant moves everything."""
    net = shaken(time_conditioning=True)
    ids, pattern = torch.randint(0, 11, (1, 10)), BlockDiffusionAttention(6, 2, "math", CPU)
    sigma = torch.full((1, 10), 0.5)
    before = net(ids, pattern, sigma_BS=sigma)
    sigma[:, 2:4] = 2.0  # the second noisy block
    moved = (net(ids, pattern, sigma_BS=sigma) - before).abs().amax(-1)[0] > 1e-6
    assert moved.tolist() == [False, False, True, True, False, False]
    with pytest.raises(ValueError, match="time_conditioning=true: the noise level"):
        net(ids, pattern)


def test_rotary_depends_on_distance_only():
    """q.k after rotation is a function of the difference of positions."""
    rotary = RotaryEmbedding(8)
    q, k = torch.randn(8), torch.randn(8)

    def score(i, j):
        cos, sin = rotary(torch.tensor([i, j]))
        first = rotate(q[None, None, None], (cos[:1], sin[:1]))
        second = rotate(k[None, None, None], (cos[1:], sin[1:]))
        return float((first * second).sum())

    assert score(3, 1) == pytest.approx(score(103, 101), abs=1e-4)
    assert score(3, 1) != pytest.approx(score(3, 2), abs=1e-4)


def test_dropout_only_while_training():
    """Two training passes differ, two evaluation passes do not."""
    net = shaken(dropout=0.5)
    ids, pattern = torch.randint(0, 11, (2, 6)), FullAttention(6, False, "math", CPU)
    assert torch.equal(net(ids, pattern), net(ids, pattern))
    net.train()
    assert not torch.equal(net(ids, pattern), net(ids, pattern))


def test_odd_heads_are_refused():
    """Rotary pairs need an even head dimension."""
    with pytest.raises(ValueError, match=r"model\.hidden_size=15: allowed multiples of"):
        small(hidden_size=15)
