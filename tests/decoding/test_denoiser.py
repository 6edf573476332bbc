"""Networks behind the loop: the cache is exact, and so is the choice of rows."""

import pytest
import torch

from decoding.autoregressive import AutoregressiveDenoiser
from decoding.denoiser import BlockDenoiser, NetworkPass, WindowDenoiser
from models.attention import BlockDiffusionAttention, FullAttention
from tests.decoding.toy_models import VOCAB, random_dit

LENGTH, BLOCK, MASK = 16, 4, 10
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def backbone():
    return random_dit(LENGTH).eval()


@pytest.fixture(scope="module")
def tokens():
    return torch.randint(0, MASK, (2, LENGTH), generator=torch.Generator().manual_seed(0))


def noisy_copy(x0, start, end):
    """Finished before `start`, every second token masked in the segment, masked beyond it."""
    xt = x0.clone()
    xt[:, start:end:2] = MASK
    xt[:, end:] = MASK
    return xt


def without_mask(logits):
    logits = logits.clone()
    logits[..., MASK] = -torch.inf
    return logits


@torch.no_grad()
def training_logits(backbone, x0, xt):
    """The prediction of training: [x_t ; x_0] in one pass."""
    attention = BlockDiffusionAttention(LENGTH, BLOCK, "math", CPU)
    ids = torch.cat([xt, x0[:, :-BLOCK]], dim=1)
    return without_mask(backbone.logits(backbone(ids, attention)))


@torch.no_grad()
def decoded_logits(denoiser, x0, batch=2):
    """Logits of all rows of every segment, in two passes each: the second one finds its cache."""
    parts = []
    for start, end in denoiser.begin(batch, x0.shape[1]):
        xt, rows = noisy_copy(x0, start, end), torch.arange(batch * (end - start))
        first = denoiser.logits(xt, start, end, rows)
        again = denoiser.logits(xt, start, end, rows.flip(0)).flip(0)
        torch.testing.assert_close(first, again, rtol=0, atol=1e-5)
        parts.append(first.unflatten(0, (batch, -1)))
    return torch.cat(parts, dim=1)


@pytest.mark.parametrize("kv_cache", [True, False])
def test_decoding_blocks_predicts_what_training_showed(backbone, tokens, kv_cache):
    found = decoded_logits(BlockDenoiser(backbone, MASK, BLOCK, kv_cache), tokens)
    for start in range(0, LENGTH, BLOCK):
        xt = noisy_copy(tokens, start, start + BLOCK)
        expected = training_logits(backbone, tokens, xt)[:, start : start + BLOCK]
        torch.testing.assert_close(found[:, start : start + BLOCK], expected, rtol=0, atol=1e-5)


def test_the_past_matters(backbone, tokens):
    """A cache that was ignored would pass the test above only if this failed."""
    changed = tokens.clone()
    changed[:, :BLOCK] = (tokens[:, :BLOCK] + 1) % MASK
    denoiser = BlockDenoiser(backbone, MASK, BLOCK)
    first, second = (decoded_logits(denoiser, x0)[..., :MASK] for x0 in (tokens, changed))
    assert (first - second)[:, BLOCK:].abs().amax() > 0.1


def test_a_pass_computes_the_current_block_alone(backbone, tokens, monkeypatch):
    denoiser = BlockDenoiser(backbone, MASK, BLOCK)
    seen = []
    forward = type(backbone).forward
    monkeypatch.setattr(
        type(backbone),
        "forward",
        lambda self, ids, attention, **options: (
            seen.append((ids.shape[1], len(options["rows_M"])))
            or forward(self, ids, attention, **options)
        ),
    )
    denoiser.begin(2, LENGTH)
    for start in (0, 0, 4, 4, 8):
        denoiser.logits(tokens, start, start + 4, torch.tensor([1, 6]))
    # Block 0 twice; then blocks 0 and 1 enter the cache beside the first step of the next one.
    assert seen == [(4, 2), (4, 2), (8, 2), (4, 2), (8, 2)]


@pytest.mark.parametrize("kv_cache", [True, False])
def test_autoregressive_rows_equal_one_causal_pass(backbone, tokens, kv_cache):
    denoiser = AutoregressiveDenoiser(backbone, MASK, kv_cache)
    with torch.no_grad():
        attention = FullAttention(LENGTH, True, "math", CPU)
        expected = without_mask(backbone.logits(backbone(tokens, attention)))
        denoiser.begin(2, LENGTH)
        for place in range(3, LENGTH):  # a prompt of three tokens goes through at once
            found = denoiser.logits(tokens, place, place + 1, torch.arange(2))
            torch.testing.assert_close(found, expected[:, place - 1], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("length", "segments"),
    [
        (10, [(0, 10)]),
        (16, [(0, 16)]),
        (20, [(0, 16), (16, 20)]),
        (24, [(0, 16), (16, 24)]),
        (35, [(0, 16), (16, 24), (24, 32), (32, 35)]),
    ],
)
def test_windows_cover_every_length(backbone, length, segments):
    assert WindowDenoiser(backbone, MASK).begin(1, length) == segments


@torch.no_grad()
def test_a_window_is_the_last_positions_bidirectionally(backbone):
    x0 = torch.randint(0, MASK, (2, 24), generator=torch.Generator().manual_seed(1))
    xt = noisy_copy(x0, 16, 24)
    found = WindowDenoiser(backbone, MASK).logits(xt, 16, 24, torch.tensor([0, 3, 8, 15]))
    attention = FullAttention(LENGTH, False, "math", CPU)
    full = without_mask(backbone.logits(backbone(xt[:, 8:], attention)))
    expected = torch.stack([full[0, 8], full[0, 11], full[1, 8], full[1, 15]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@torch.no_grad()
def test_beyond_the_models_length_the_oldest_blocks_are_dropped():
    """With one layer, keys depend on their own token: the cached window equals a fresh one."""
    backbone = random_dit(LENGTH).eval()
    backbone.blocks = backbone.blocks[-1:]
    x0 = torch.randint(0, MASK, (2, 3 * LENGTH), generator=torch.Generator().manual_seed(2))
    cached = decoded_logits(BlockDenoiser(backbone, MASK, BLOCK, True), x0)
    fresh = decoded_logits(BlockDenoiser(backbone, MASK, BLOCK, False), x0)
    torch.testing.assert_close(cached, fresh, rtol=0, atol=1e-5)
    shifted = decoded_logits(BlockDenoiser(backbone, MASK, BLOCK, False), x0[:, BLOCK:])
    # Rotary attention is relative: the same window at other positions says the same.
    torch.testing.assert_close(fresh[:, -BLOCK:], shifted[:, -BLOCK:], rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_prompt_longer_than_the_model_is_cut_from_the_left(backbone):
    x0 = torch.randint(0, MASK, (2, 2 * LENGTH), generator=torch.Generator().manual_seed(3))
    rows, start = torch.arange(2 * BLOCK), 2 * LENGTH - BLOCK
    xt = noisy_copy(x0, start, start + BLOCK)
    both = []
    for keep in (True, False):
        denoiser = BlockDenoiser(backbone, MASK, BLOCK, keep)
        denoiser.begin(2, 2 * LENGTH)
        both.append(denoiser.logits(xt, start, start + BLOCK, rows))
    torch.testing.assert_close(*both, rtol=0, atol=1e-5)


def test_lengths_that_are_no_whole_blocks_are_refused(backbone):
    with pytest.raises(ValueError, match=r"sampling\.length=18: allowed multiples of block_size=4"):
        BlockDenoiser(backbone, MASK, BLOCK).begin(1, 18)


@torch.no_grad()
def test_time_conditioned_networks_get_the_realised_masking_rate(tokens):
    backbone = random_dit(LENGTH, time_conditioning=True).eval()
    xt = noisy_copy(tokens, 4, 8)
    denoiser = BlockDenoiser(backbone, MASK, BLOCK)
    denoiser.begin(2, LENGTH)
    found = denoiser.logits(xt, 4, 8, torch.arange(8)).unflatten(0, (2, 4))
    sigma = torch.zeros(2, 2 * LENGTH - BLOCK)
    sigma[:, 4:8] = -torch.log1p(torch.tensor(-0.5 * (1 - 1e-3)))
    attention = BlockDiffusionAttention(LENGTH, BLOCK, "math", CPU)
    features = backbone(torch.cat([xt, tokens[:, :-BLOCK]], dim=1), attention, sigma_BS=sigma)
    expected = without_mask(backbone.logits(features))[:, 4:8]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_inference_copies_share_or_cast_and_leave_the_model_alone(backbone):
    trained = random_dit(LENGTH)
    shared, cast = trained.for_inference(torch.float32), trained.for_inference(torch.bfloat16)
    assert trained.training and not shared.training
    weight = trained.blocks[0].attn_qkv.weight
    assert shared.blocks[0].attn_qkv.weight.data_ptr() == weight.data_ptr()
    assert cast.blocks[0].attn_qkv.weight.dtype == torch.bfloat16
    assert cast.rotary_emb.inv_freq.dtype == torch.float32
    assert cast.output_layer.adaLN_modulation.weight.dtype == torch.float32
    assert weight.dtype == torch.float32 and weight.requires_grad
    assert backbone.vocab_size == VOCAB


@pytest.mark.parametrize("make", [BlockDenoiser, WindowDenoiser])
@torch.no_grad()
def test_sequences_that_wait_are_not_computed_and_change_nothing(backbone, make, monkeypatch):
    """Rows of two of four sequences: as in the pass over all of them, at half the input."""
    x0 = torch.randint(0, MASK, (4, LENGTH), generator=torch.Generator().manual_seed(5))
    options = (BLOCK,) if make is BlockDenoiser else ()
    denoiser = make(backbone, MASK, *options)
    run, batches = NetworkPass.__call__, []

    def counted(self, ids, *others):
        batches.append(len(ids))
        return run(self, ids, *others)

    monkeypatch.setattr(NetworkPass, "__call__", counted)
    for start, end in denoiser.begin(4, LENGTH):
        xt, size = noisy_copy(x0, start, end), end - start
        whole = denoiser.logits(xt, start, end, torch.arange(4 * size)).unflatten(0, (4, size))
        asked = torch.cat([size * 3 + torch.arange(size), size * 1 + torch.arange(size)])
        part = denoiser.logits(xt, start, end, asked).unflatten(0, (2, size))
        assert batches[-2:] == [4, 2]
        torch.testing.assert_close(part, whole[[3, 1]], rtol=0, atol=1e-5)
