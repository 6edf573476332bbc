"""Tapped layers against transformers' own `hidden_states`, and the hooks' manners."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.gpt2 import GPT2Config, GPT2LMHeadModel

from models.taps import TargetTaps

WIDTH, LAYERS = 32, 4


@pytest.fixture(scope="module", params=["qwen3", "llama"])
def model(request):
    """A random target of four layers."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 50, "hidden_size": WIDTH, "intermediate_size": 48, "head_dim": 8,
        "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
    }  # fmt: skip
    if request.param == "qwen3":
        return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, 9), generator=torch.Generator().manual_seed(1))


def hooks(model):
    return [len(layer._forward_hooks) for layer in model.model.layers]


@pytest.mark.parametrize("last_hidden", [True, False])
def test_layer_i_is_hidden_state_i_plus_one(model, ids, last_hidden):
    """For every layer but the last, bit for bit and in the order asked for."""
    theirs = model(ids, output_hidden_states=True).hidden_states
    output = TargetTaps(model, (2, 0, 1)).run(ids, last_hidden=last_hidden)
    expected = torch.cat([theirs[3], theirs[1], theirs[2]], dim=-1)
    assert torch.equal(output.taps_BSE, expected)
    assert not output.taps_BSE.requires_grad
    if last_hidden:
        assert torch.equal(output.last_hidden_BSD, theirs[-1])
        logits = model.get_output_embeddings()(output.last_hidden_BSD)
        torch.testing.assert_close(logits, model(ids).logits)
    else:
        assert output.last_hidden_BSD is None


@pytest.mark.parametrize("last_hidden", [True, False])
def test_the_last_layer_is_tapped_before_the_final_norm(model, ids, last_hidden):
    """transformers' list has the norm's output there."""
    theirs = model(ids, output_hidden_states=True).hidden_states[-1]
    taps = TargetTaps(model, (LAYERS - 1,)).run(ids, last_hidden=last_hidden).taps_BSE
    assert not torch.allclose(taps, theirs)
    torch.testing.assert_close(model.model.norm(taps), theirs)


def test_layers_behind_the_last_tap_do_not_run(model, ids):
    """Seen by a hook on each of them; the target itself keeps all its layers."""
    ran = []
    handles = [
        layer.register_forward_hook(lambda *_, place=place: ran.append(place))
        for place, layer in enumerate(model.model.layers)
    ]
    taps = TargetTaps(model, (0, 1))
    taps.run(ids, last_hidden=False)
    assert ran == [0, 1]
    taps.run(ids)
    assert ran == [0, 1, *range(LAYERS)]
    for handle in handles:
        handle.remove()


def test_new_weights_are_seen(model, ids):
    """The shortened target shares its layers with the whole one, wherever they are moved."""
    taps = TargetTaps(model, (1,))
    before = taps.run(ids, last_hidden=False).taps_BSE
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2.0)
        model.model.layers[1].mlp.down_proj.weight.mul_(3.0)
    theirs = model(ids, output_hidden_states=True).hidden_states[2]
    after = taps.run(ids, last_hidden=False).taps_BSE
    assert torch.equal(after, theirs) and not torch.allclose(after, before)


@pytest.mark.parametrize("last_hidden", [True, False])
def test_a_cache_passes_through(model, ids, last_hidden):
    """Token by token equals the whole text at once."""
    taps = TargetTaps(model, (0, 2))
    whole = taps.run(ids, last_hidden=last_hidden)
    assert whole.past is None
    parts, past = [], None
    for piece in ids.split(2, dim=1):
        output = taps.run(piece, past=past, use_cache=True, last_hidden=last_hidden)
        past = output.past
        parts.append(output.taps_BSE)
    assert past.get_seq_length() == ids.shape[1]
    torch.testing.assert_close(torch.cat(parts, dim=1), whole.taps_BSE, atol=1e-5, rtol=1e-5)


def test_packed_documents_do_not_see_each_other(model, ids):
    """Positions that begin again are enough, for transformers makes the mask of them."""
    taps = TargetTaps(model, (0, 2))
    position = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]] * 2)
    packed = taps.run(ids, position_ids=position, last_hidden=False).taps_BSE
    alone = [taps.run(part, last_hidden=False).taps_BSE for part in (ids[:, :4], ids[:, 4:])]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), atol=1e-6, rtol=1e-5)


def test_padding_is_ignored(model, ids):
    taps = TargetTaps(model, (1,))
    mask = torch.ones_like(ids)
    mask[:, 6:] = 0
    padded = taps.run(ids, attention_mask=mask, last_hidden=False).taps_BSE[:, :6]
    alone = taps.run(ids[:, :6], last_hidden=False).taps_BSE
    torch.testing.assert_close(padded, alone, atol=1e-6, rtol=1e-5)


def test_recording_around_a_plain_call(model, ids):
    """Logits and taps of one pass; the latest pass counts."""
    taps = TargetTaps(model, (0, 2))
    with taps.recording() as recording:
        model(ids[:, :3])
        logits = model(ids).logits
    assert torch.equal(recording.taps_BSE, taps.run(ids).taps_BSE)
    assert torch.equal(logits, model(ids).logits)


def test_hooks_go_even_after_an_error(model, ids):
    before = hooks(model)
    taps = TargetTaps(model, (0, 2))
    with pytest.raises(RuntimeError, match="stop"), taps.recording():
        assert hooks(model) == [count + (place in (0, 2)) for place, count in enumerate(before)]
        raise RuntimeError("stop")
    with pytest.raises(IndexError):
        taps.run(ids + 1000)
    taps.run(ids)
    assert hooks(model) == before


def test_compiled_layers_are_tapped(model, ids):
    """Hooks stand outside a layer that is compiled in place."""
    expected = TargetTaps(model, (0, 2)).run(ids, last_hidden=False).taps_BSE
    for layer in model.model.layers:
        layer.compile(backend="eager")
    try:
        taps = TargetTaps(model, (0, 2)).run(ids, last_hidden=False).taps_BSE
    finally:
        for layer in model.model.layers:
            layer._compiled_call_impl = None
    torch.testing.assert_close(taps, expected)


@pytest.mark.parametrize("layer_ids", [(), (0, 0), (-1,), (LAYERS,)])
def test_layers_that_are_not_there(model, layer_ids):
    with pytest.raises(ValueError, match=r"target_layer_ids=\[.*\]: allowed .* 0 to 3"):
        TargetTaps(model, layer_ids)


def test_other_models_are_refused():
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9))
    with pytest.raises(ValueError, match="GPT2LMHeadModel: has no list of decoder layers"):
        TargetTaps(other, (0,))
