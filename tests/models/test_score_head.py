"""The score head against a slow one, what it sees, its precision; and the scale that must move."""

import math

import pytest
import torch
import torch.nn.functional as F

from models.scorer import ScoreHead, ScoreScale

D, HEADS, GROUPS, K = 16, 4, 2, 6


def scale(mode="learnable", init=1.0, least=0.1, most=100.0, dtype="float32"):
    return ScoreScale(mode, init, least, most, dtype)


def head(layers=1, bounded=True, gamma=1.0, seed=0):
    torch.manual_seed(seed)
    made = ScoreHead(
        hidden_size=D, num_heads=HEADS, num_key_value_heads=GROUPS, head_dim=K,
        intermediate_size=24, layers=layers, bounded=bounded, scale=scale(init=gamma),
    )  # fmt: skip
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if "norm" in name:
                weight.copy_(1.0 + 0.3 * torch.randn(weight.shape))
    return made.eval()


def inputs(seed=1, blocks=6, size=4):
    draw = torch.Generator().manual_seed(seed)
    hidden, token = torch.randn(2, blocks, size, D, generator=draw)
    written = torch.rand(blocks, size, generator=draw) < 0.6
    written[:, -1] = True
    return hidden, token, written


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x_SK):
    """Rotary embeddings of transformers: halves of a head are pairs."""
    half = K // 2
    angle = torch.arange(len(x_SK))[:, None] / 10000.0 ** (torch.arange(half) * 2 / K)
    first, second = x_SK[:, :half], x_SK[:, half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1)


def slow_block(layer, z_SD):
    """A decoder block of Qwen3 in which every place sees every place."""
    attention = layer.self_attn
    x = rms(z_SD, layer.input_layernorm.weight)
    q, k, v = (
        project(x).view(len(x), -1, K)
        for project in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    out = []
    for number in range(HEADS):
        group = number // (HEADS // GROUPS)
        q_SK = rotated(rms(q[:, number], attention.q_norm.weight))
        k_SK = rotated(rms(k[:, group], attention.k_norm.weight))
        out.append((q_SK @ k_SK.T / math.sqrt(K)).softmax(-1) @ v[:, group])
    z_SD = z_SD + attention.o_proj(torch.cat(out, -1))
    x, mlp = rms(z_SD, layer.post_attention_layernorm.weight), layer.mlp
    return z_SD + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))


@torch.no_grad()
def slow_score(made, hidden_SD, token_SD, written_S):
    both = rms(hidden_SD, made.norm_hidden.weight), rms(token_SD, made.norm_token.weight)
    z_SD = torch.cat(both, -1) @ made.fuse.weight.T
    for layer in made.layers:
        z_SD = slow_block(layer, z_SD)
    pooled = rms(z_SD, made.norm.weight)[written_S].mean(0)
    first, _, second = made.mlp
    found = second(F.gelu(first(pooled)))[0]
    return made.scale() * (found.tanh() if made.bounded else found)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("bounded", [True, False])
def test_equals_the_definition(layers, bounded):
    made, (hidden, token, written) = head(layers, bounded, gamma=2.5), inputs()
    with torch.no_grad():
        found = made(hidden, token, written)
    wanted = [slow_score(made, *block) for block in zip(hidden, token, written, strict=True)]
    torch.testing.assert_close(found, torch.stack(wanted), rtol=1e-4, atol=1e-5)
    assert found.std() > 0.1


@torch.no_grad()
def test_bounded_scores_stay_below_gamma():
    hidden, token, written = inputs()
    for gamma in (0.5, 3.0):
        made = head(gamma=gamma)
        made.mlp[2].weight.mul_(100)
        found = made(hidden, token, written)
        assert found.abs().max() <= gamma * (1 + 1e-6) and found.abs().max() > 0.9 * gamma
        made.bounded = False
        assert made(hidden, token, written).abs().max() > 5 * gamma


@torch.no_grad()
def test_given_places_are_seen_but_not_pooled():
    hidden, token, written = inputs()
    other, words = hidden.clone(), token.clone()
    other[~written] += 1.0
    words[~written] -= 1.0
    without = head(layers=0)
    torch.testing.assert_close(without(other, words, written), without(hidden, token, written))
    made, some = head(layers=1), (~written).any(-1)
    changed = (made(other, words, written) - made(hidden, token, written)).abs() > 1e-4
    assert torch.equal(changed, some) and some.any()


@torch.no_grad()
def test_every_place_sees_every_place():
    """Pooled is the first one alone: the last one must reach it, which no causal block allows."""
    made, (hidden, token, _) = head(), inputs()
    first = torch.zeros(6, 4, dtype=torch.bool)
    first[:, 0] = True
    other = hidden.clone()
    other[:, -1] += 1.0
    assert ((made(other, token, first) - made(hidden, token, first)).abs() > 1e-4).all()


@torch.no_grad()
def test_places_have_an_order_and_candidates_none():
    made, (hidden, token, written) = head(), inputs()
    found = made(hidden, token, written)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    torch.testing.assert_close(made(hidden[order], token[order], written[order]), found[order])
    turned = made(hidden.flip(1), token.flip(1), written.flip(1))
    assert (turned - found).abs().max() > 1e-3
    without = head(layers=0)
    torch.testing.assert_close(
        without(hidden.flip(1), token.flip(1), written.flip(1)), without(hidden, token, written)
    )


def test_fp32_whatever_surrounds_it():
    made, (hidden, token, written) = head(), inputs()
    plain = made(hidden, token, written)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = made(hidden, token, written)
    assert inside.dtype == torch.float32 and torch.equal(inside, plain)
    half = hidden.bfloat16(), token.bfloat16()
    rounded = made(half[0].float(), half[1].float(), written)
    assert torch.equal(made(*half, written), rounded)
    inside.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in made.parameters())


def test_a_block_without_a_written_place_has_a_finite_score():
    hidden, token, written = inputs()
    found = head()(hidden, token, torch.zeros_like(written))
    found.sum().backward()
    assert torch.isfinite(found).all()


def trained(made, steps=1371, rate=5e-5, beta2=0.999, gradients=None):
    """gamma after AdamW under a steady gradient."""
    optimizer = torch.optim.AdamW(
        made.parameters(), lr=rate, betas=(0.9, beta2), eps=1e-8, weight_decay=0.0, fused=True
    )
    for step in range(steps):
        value = -1.0 if gradients is None else gradients(step)
        made.log_scale.grad = torch.full_like(made.log_scale, value)
        optimizer.step()
    return made().item(), optimizer.state[made.log_scale]


def test_an_update_below_half_a_spacing_is_lost_in_bfloat16():
    """At gamma = 2.7 the numbers around log gamma are 2^-7 apart, a step is 5e-5."""
    for gamma in (2.66, 10.0):
        stalled, _ = trained(scale(init=gamma, dtype="bfloat16"))
        assert stalled == scale(init=gamma, dtype="bfloat16")().item()
        moved, _ = trained(scale(init=gamma))
        assert moved / gamma == pytest.approx(math.exp(1371 * 5e-5), rel=1e-3)


def test_a_scale_held_as_such_stalls_too():
    """exp(0) moves in bfloat16, since numbers are dense at 0; a plain multiplier of 1 would not."""
    multiplier = torch.nn.Parameter(torch.ones((), dtype=torch.bfloat16))
    optimizer = torch.optim.AdamW([multiplier], lr=5e-5, weight_decay=0.0, fused=True)
    exact = torch.nn.Parameter(torch.ones(()))
    precise = torch.optim.AdamW([exact], lr=5e-5, weight_decay=0.0, fused=True)
    for _ in range(1371):
        for parameter, one in ((multiplier, optimizer), (exact, precise)):
            parameter.grad = torch.full_like(parameter, -1.0)
            one.step()
    assert multiplier.item() == 1.0 and exact.item() == pytest.approx(1.068, abs=1e-3)


def test_a_second_moment_in_bfloat16_cannot_decay():
    """After gradients fall a hundredfold: 0.999 v rounds back to v, 0.95 v does not."""
    kept = {}
    for dtype, beta2 in (("bfloat16", 0.999), ("bfloat16", 0.95), ("float32", 0.999)):
        before, after = (
            trained(scale(dtype=dtype), 500 + more, 0.0, beta2, lambda n: 0.5 if n < 500 else 5e-3)
            for more in (0, 500)
        )
        kept[dtype, beta2] = float(after[1]["exp_avg_sq"] / before[1]["exp_avg_sq"])
    assert kept["bfloat16", 0.999] == 1.0
    assert kept["float32", 0.999] == pytest.approx(0.999**500, abs=0.01)
    assert kept["bfloat16", 0.95] < 0.01


def test_the_bounds_hold():
    made = scale(init=0.5, least=0.2, most=4.0)
    for value, kept in ((9.0, 4.0), (-9.0, 0.2), (math.log(3.0), 3.0)):
        with torch.no_grad():
            made.log_scale.fill_(value)
        made.clamp()
        assert made().item() == pytest.approx(kept)


def test_modes_and_types():
    assert scale("fixed").log_scale.requires_grad is False
    assert scale("learnable").log_scale.requires_grad is True
    assert scale(dtype="bfloat16").log_scale.dtype == torch.bfloat16
    assert scale(init=2.0)().item() == pytest.approx(2.0)
    assert scale(dtype="bfloat16")().dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "free"}, r"scorer\.scale\.mode=free: allowed fixed, learnable"),
        ({"dtype": "float16"}, r"scorer\.scale\.dtype=float16: allowed float32, bfloat16"),
        ({"init": 0.05}, r"scorer\.scale\.init=0\.05: allowed scorer\.scale\.min=0\.1"),
        ({"init": 200.0}, r"scorer\.scale\.init=200\.0"),
        ({"least": 0.0}, r"scorer\.scale\.min=0\.0 \.\. max=100\.0, above 0"),
    ],
)  # fmt: skip
def test_wrong_options(options, message):
    with pytest.raises(ValueError, match=message):
        scale(**options)
