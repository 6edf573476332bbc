"""The draft network against a slow reference, its own cached inference, and its mask's promises."""

import math

import pytest
import torch
from torch.nn.attention.flex_attention import flex_attention
from transformers import Qwen3Config
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
    repeat_kv,
)

from models import dflash_attention
from models.dflash import DFlashConfig, DFlashNetwork

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
BLOCK, WIDTH, TAPS = 4, 32, 2
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip


@pytest.fixture(autouse=True)
def flex_without_a_compiler(monkeypatch):
    """The mask function decides either way; the tiles have a test of their own."""
    monkeypatch.setattr(dflash_attention, "compiled_flex", lambda: flex_attention)


def config_of(**changes):
    values = {
        "hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48, "vocab_size": 100,
        "block_size": BLOCK, "mask_token_id": 99, "target_layer_ids": (1, 3),
        "num_target_layers": 6, "max_position_embeddings": 256,
    }  # fmt: skip
    return DFlashConfig(**values | changes)


def network_of(attn_backend="auto", **changes):
    """All weights large enough that everything influences everything."""
    torch.manual_seed(0)
    network = DFlashNetwork(config_of(**changes), attn_backend).eval()
    for name, parameter in network.named_parameters():
        mean = 1.0 if "norm" in name else 0.0
        torch.nn.init.normal_(parameter, mean=mean, std=0.25)
    return network


def packed_batch(network, seed=1):
    """Two rows of 20: documents of 12 and 6 tokens with two of padding, and one of 20."""
    generator = torch.Generator().manual_seed(seed)
    segment = torch.tensor([[0] * 12 + [1] * 6 + [-1] * 2, [0] * 20])
    position = torch.tensor([[*range(12), *range(6), 0, 0], [*range(20)]])
    anchors = torch.tensor([[0, 5, 11, 12, 16, 0], [3, 7, 8, 15, 18, 19]])
    valid = torch.tensor([[True] * 5 + [False], [True] * 6])
    config = network.config
    taps = torch.randn(2, 20, config.taps_size, generator=generator)
    embeds = torch.randn(2, 6, config.block_size, WIDTH, generator=generator)
    return taps, embeds, anchors, valid, segment, position


def forward(network, taps, embeds, *rest):
    with torch.no_grad():
        return network(taps, embeds, network.layout(*rest))


def rms_norm(x, weight, eps):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def slow_block(network, taps_CE, embeds_QD, context_position, position):
    """One block with its context as published, with the rotary functions of transformers."""
    config, weights = network.config, network.state_dict()
    rope = {**(config.rope_scaling or {}), "rope_theta": config.rope_theta}
    theirs = Qwen3Config(
        head_dim=config.head_dim, max_position_embeddings=config.max_position_embeddings,
        rope_parameters={"rope_type": "default", **rope},
    )  # fmt: skip
    cos, sin = Qwen3RotaryEmbedding(theirs)(taps_CE, torch.cat([context_position, position])[None])
    eps, size = config.rms_norm_eps, config.head_dim
    c = rms_norm(taps_CE @ weights["fc.weight"].T, weights["hidden_norm.weight"], eps)
    x = embeds_QD
    for layer in range(config.num_hidden_layers):
        w = {
            name.removeprefix(f"layers.{layer}.").removesuffix(".weight"): value
            for name, value in weights.items()
        }
        h = rms_norm(x, w["input_layernorm"], eps)
        both = torch.cat([c, h])

        def heads(rows, matrix):
            return (rows @ matrix.T).view(len(rows), -1, size).transpose(0, 1)[None]

        q = rms_norm(heads(h, w["self_attn.q_proj"]), w["self_attn.q_norm"], eps)
        k = rms_norm(heads(both, w["self_attn.k_proj"]), w["self_attn.k_norm"], eps)
        own = slice(len(c), None)
        q = apply_rotary_pos_emb(q, q, cos[:, own], sin[:, own])[0]
        k = apply_rotary_pos_emb(k, k, cos, sin)[1]
        groups = config.num_attention_heads // config.num_key_value_heads
        k, v = repeat_kv(k, groups), repeat_kv(heads(both, w["self_attn.v_proj"]), groups)
        out = ((q @ k.transpose(-1, -2)) / math.sqrt(size)).softmax(-1) @ v
        x = x + out[0].transpose(0, 1).flatten(1) @ w["self_attn.o_proj"].T
        h = rms_norm(x, w["post_attention_layernorm"], eps)
        gate = torch.nn.functional.silu(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)
        x = x + gate @ w["mlp.down_proj"].T
    return rms_norm(x, weights["norm.weight"], eps)


def contexts(anchors, valid, segment, position):
    """For every valid block: row, number, places of its context, and its positions."""
    for row, number in valid.nonzero().tolist():
        anchor = int(anchors[row, number])
        places = [s for s in range(anchor) if segment[row, s] == segment[row, anchor]]
        yield row, number, places, position[row, anchor] + torch.arange(BLOCK)


@pytest.mark.parametrize("backend", ["math", "sdpa", "flex"])
@pytest.mark.parametrize("scaling", [None, YARN, LLAMA3], ids=["plain", "yarn", "llama3"])
def test_training_equals_the_slow_reference(backend, scaling):
    """Every valid block of a packed, ragged batch, by loops over its own tokens alone."""
    network = network_of(backend, rope_scaling=scaling)
    taps, embeds, *rest = packed_batch(network)
    hidden = forward(network, taps, embeds, *rest)
    for row, number, places, positions in contexts(*rest):
        alone = slow_block(
            network, taps[row, places], embeds[row, number], rest[3][row, places], positions
        )
        torch.testing.assert_close(hidden[row, number], alone, atol=2e-5, rtol=1e-5)
    assert hidden.isfinite().all()


@pytest.mark.parametrize("sample_from_anchor", [False, True])
def test_training_equals_cached_inference(sample_from_anchor):
    """The same slots from a cache that grew by single tokens, by pieces, or at once."""
    network = network_of(sample_from_anchor=sample_from_anchor)
    taps, embeds, *rest = packed_batch(network)
    hidden = forward(network, taps, embeds, *rest)
    for row, number, places, positions in contexts(*rest):
        for step in (1, 5, 100):
            cache = network.new_cache(batch=1)
            for piece in torch.tensor(places, dtype=torch.long).split(step):
                if len(piece):
                    network.extend(cache, taps[row : row + 1, piece], rest[3][row : row + 1, piece])
            drafted = network.draft(cache, embeds[row, number][None], positions[None])
            torch.testing.assert_close(drafted[0], hidden[row, number], atol=1e-5, rtol=1e-5)
            again = network.draft(cache, embeds[row, number][None], positions[None])
            assert torch.equal(drafted, again), "drafting changed the cache"


def test_ragged_rows_equal_rows_alone():
    """Three sequences that accept different numbers of tokens, then two of them on their own."""
    network = network_of()
    taps, embeds = torch.randn(3, 12, TAPS * WIDTH), torch.randn(3, BLOCK, WIDTH)
    accepted = [[3, 0, 2], [1, 4, 4], [4, 2, 0]]  # per row, in three cycles of up to four
    together = network.new_cache(batch=3, capacity=2)
    alone = [network.new_cache(batch=1) for _ in range(3)]
    done = [0, 0, 0]
    for cycle in range(3):
        counts = [accepted[row][cycle] for row in range(3)]
        valid = torch.arange(4) < torch.tensor(counts)[:, None]
        place = torch.tensor(done)[:, None] + torch.arange(4)
        new = taps.gather(1, place.clamp(max=11)[..., None].expand(-1, -1, TAPS * WIDTH))
        network.extend(together, new, place, valid)
        for row, count in enumerate(counts):
            if count:
                network.extend(alone[row], new[row : row + 1, :count], place[row : row + 1, :count])
            done[row] += count
        position = torch.tensor(done)[:, None] + torch.arange(BLOCK)
        drafted = network.draft(together, embeds, position)
        for row in range(3):
            one = network.draft(alone[row], embeds[row : row + 1], position[row : row + 1])
            torch.testing.assert_close(drafted[row], one[0], atol=1e-5, rtol=1e-5)
    assert together.length_B.tolist() == [5, 9, 6] and together.longest == 9
    rows = torch.tensor([2, 0])
    fewer = network.draft(together.select(rows), embeds[rows], position[rows])
    torch.testing.assert_close(fewer, drafted[rows], atol=1e-5, rtol=1e-5)


def test_valid_tokens_need_not_come_first():
    """Left padding: what is not valid leaves no trace."""
    network = network_of()
    taps, position = (
        torch.randn(2, 5, TAPS * WIDTH),
        torch.tensor([[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]),
    )
    valid = torch.tensor([[False, False, True, True, True], [True] * 5])
    cache, plain = network.new_cache(2), network.new_cache(1)
    network.extend(cache, taps, position, valid)
    network.extend(plain, taps[:1, 2:], position[:1, 2:])
    embeds, places = torch.randn(2, BLOCK, WIDTH), torch.arange(3, 3 + BLOCK).expand(2, -1)
    padded = network.draft(cache, embeds, places)
    torch.testing.assert_close(padded[:1], network.draft(plain, embeds[:1], places[:1]))


@pytest.mark.parametrize("backend", ["math", "sdpa", "flex"])
def test_nothing_else_is_seen(backend):
    """Bit for bit: the anchor's own features, later ones, other documents, rows and blocks."""
    network = network_of(backend)
    taps, embeds, *rest = packed_batch(network)
    before = forward(network, taps, embeds, *rest)
    for row, number, places, _ in contexts(*rest):
        others = torch.ones(2, 20, dtype=torch.bool)
        others[row, places] = False
        changed_taps = torch.where(others[..., None], taps + 3.0, taps)
        changed_embeds = embeds + 3.0
        changed_embeds[row, number] = embeds[row, number]
        after = forward(network, changed_taps, changed_embeds, *rest)
        assert torch.equal(after[row, number], before[row, number])


@pytest.mark.parametrize("backend", ["math", "sdpa", "flex"])
def test_everything_before_the_anchor_is_seen(backend):
    """Each single context token and each slot of its own block moves every slot of a block."""
    network = network_of(backend)
    taps, embeds, *rest = packed_batch(network)
    before = forward(network, taps, embeds, *rest)
    for place in (12, 13, 14, 15):  # block 4 of row 0 is anchored at 16, in a document from 12
        changed = taps.clone()
        changed[0, place] += 1.0
        moved = (forward(network, changed, embeds, *rest)[0, 4] - before[0, 4]).abs().amax(-1)
        assert (moved > 1e-4).all()
    for slot in range(BLOCK):
        changed = embeds.clone()
        changed[0, 4, slot] += torch.randn(WIDTH)
        moved = (forward(network, taps, changed, *rest)[0, 4] - before[0, 4]).abs().amax(-1)
        assert (moved > 1e-4).all()


def test_positions_are_absolute_in_their_document():
    """A document gives the same hidden states wherever in a row it lies."""
    network = network_of()
    taps, embeds = torch.randn(1, 6, TAPS * WIDTH), torch.randn(1, 1, BLOCK, WIDTH)
    anchor, valid = torch.tensor([[4]]), torch.tensor([[True]])
    alone = forward(
        network,
        taps,
        embeds,
        anchor,
        valid,
        torch.zeros(1, 6, dtype=torch.long),
        torch.arange(6)[None],
    )
    before = torch.randn(1, 5, TAPS * WIDTH)
    packed = forward(
        network, torch.cat([before, taps], 1), embeds, anchor + 5, valid,
        torch.tensor([[0] * 5 + [1] * 6]), torch.tensor([[*range(5), *range(6)]]),
    )  # fmt: skip
    torch.testing.assert_close(packed, alone, atol=1e-6, rtol=1e-5)


def test_every_weight_learns():
    network = network_of()
    taps, embeds, *rest = packed_batch(network)
    network(taps, embeds, network.layout(*rest)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in network.parameters())


def test_bfloat16_stays_near_float32():
    """Weights in bf16, and autocast; rotary frequencies keep fp32 through both."""
    network = network_of()
    taps, embeds, *rest = packed_batch(network)
    exact = forward(network, taps, embeds, *rest)
    frequency = network.rotary.frequency.clone()
    with torch.autocast("cpu", torch.bfloat16):
        mixed = forward(network, taps, embeds, *rest)
    network.to(torch.bfloat16)
    assert network.rotary.frequency.dtype == torch.float32
    assert torch.equal(network.rotary.frequency, frequency)
    half = forward(network, taps.bfloat16(), embeds.bfloat16(), *rest)
    assert half.dtype == torch.bfloat16
    for rounded in (mixed.float(), half.float()):
        error = (rounded - exact)[rest[1]].norm() / exact[rest[1]].norm()
        assert 1e-4 < error < 0.05
    cache = network.new_cache(1)
    network.extend(cache, taps[:1, 12:16].bfloat16(), torch.arange(4)[None])
    drafted = network.draft(cache, embeds[:1, 4].bfloat16(), torch.arange(4, 8)[None])
    torch.testing.assert_close(drafted[0], half[0, 4], atol=0.15, rtol=0.05)


def test_layers_compile_once():
    """One graph without breaks, the same one for other anchors of the same shape."""
    network = network_of("flex")
    taps, embeds, anchors, *rest = packed_batch(network)
    expected = [forward(network, taps, embeds, a, *rest) for a in (anchors, anchors.clamp(max=9))]
    counter = torch._dynamo.testing.CompileCounter()
    for layer in network.layers:
        layer.compile(backend=counter, fullgraph=True)
    for places, plain in zip((anchors, anchors.clamp(max=9)), expected, strict=True):
        torch.testing.assert_close(forward(network, taps, embeds, places, *rest), plain)
    assert counter.frame_count == 1
