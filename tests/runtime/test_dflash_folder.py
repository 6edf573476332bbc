"""Draft folders: z-lab's documented layout in and out, and what is refused by name."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from models.dflash import DFlashConfig, DFlashNetwork
from models.dflash_config import rotary_frequencies
from runtime.dflash.config_json import parse_config
from runtime.dflash.folder import load_draft, read_config, write_draft
from runtime.errors import CheckpointError, ConfigError

LAYERS, WIDTH, HEADS, GROUPS, HEAD, INNER, TAPS = 5, 32, 4, 2, 8, 48, 3
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# The documented names and shapes, written out here and not derived from the network.
PER_LAYER = {
    "input_layernorm": [WIDTH], "post_attention_layernorm": [WIDTH],
    "self_attn.q_proj": [HEADS * HEAD, WIDTH], "self_attn.k_proj": [GROUPS * HEAD, WIDTH],
    "self_attn.v_proj": [GROUPS * HEAD, WIDTH], "self_attn.o_proj": [WIDTH, HEADS * HEAD],
    "self_attn.q_norm": [HEAD], "self_attn.k_norm": [HEAD], "mlp.gate_proj": [INNER, WIDTH],
    "mlp.up_proj": [INNER, WIDTH], "mlp.down_proj": [WIDTH, INNER],
}  # fmt: skip
SHAPES = {
    "fc.weight": [WIDTH, TAPS * WIDTH], "hidden_norm.weight": [WIDTH], "norm.weight": [WIDTH],
} | {
    f"layers.{layer}.{name}.weight": shape
    for layer in range(LAYERS) for name, shape in PER_LAYER.items()
}  # fmt: skip
# A published config.json with other numbers.
ZLAB = {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "block_size": 16,
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "dflash_config": {"mask_token_id": 99, "target_layer_ids": [1, 3, 4]},
    "num_target_layers": 8, "num_hidden_layers": LAYERS, "layer_types": ["full_attention"] * LAYERS,
    "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS,
    "head_dim": HEAD, "intermediate_size": INNER, "vocab_size": 100, "rms_norm_eps": 1e-6,
    "max_position_embeddings": 256, "rope_theta": 1000000, "rope_scaling": None,
    "sliding_window": None, "use_sliding_window": False, "max_window_layers": 5,
    "tie_word_embeddings": False, "dtype": "bfloat16", "attention_bias": False,
    "hidden_act": "silu", "bos_token_id": 7, "eos_token_id": 8, "use_cache": True,
    "initializer_range": 0.02, "attention_dropout": 0.0, "transformers_version": "4.57.1",
}  # fmt: skip


def tensors(prefix="", dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)
    return {
        prefix + name: torch.randn(shape, generator=generator).to(dtype)
        for name, shape in SHAPES.items()
    }


def zlab_folder(path, changes=None, without=(), state=None):
    """A folder as z-lab publishes it, written without our exporter."""
    content = {k: v for k, v in (ZLAB | (changes or {})).items() if k not in without}
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(content))
    save_file(tensors() if state is None else state, path / "model.safetensors")
    return path


def dflash_config(**changes):
    return {"dflash_config": ZLAB["dflash_config"] | changes}


def our_config(**changes):
    values = {
        "hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS, "head_dim": HEAD, "intermediate_size": INNER,
        "vocab_size": 100, "block_size": 16, "mask_token_id": 99, "target_layer_ids": (1, 3, 4),
        "num_target_layers": 8, "rms_norm_eps": 1e-6, "rope_theta": 1e6,
        "max_position_embeddings": 256, "bos_token_id": 7, "eos_token_id": 8,
    }  # fmt: skip
    return DFlashConfig(**values | changes)


def test_the_published_layout_loads(tmp_path):
    """Fifty-eight tensors, every number in its place, bf16 weights exactly."""
    assert len(SHAPES) == 58
    network = load_draft(zlab_folder(tmp_path))
    assert network.config == our_config()
    state = network.state_dict()
    assert state.keys() == SHAPES.keys()
    for name, stored in tensors().items():
        assert state[name].dtype == torch.float32 and torch.equal(state[name], stored.float())
    assert all(p.requires_grad for p in network.parameters())
    assert network.rotary.frequency.device.type == "cpu"
    half = load_draft(tmp_path, dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(half[name], stored) for name, stored in tensors().items())


def test_loaded_network_drafts(tmp_path):
    """Built without storage and filled later, it computes what a network built in full does."""
    loaded = load_draft(zlab_folder(tmp_path))
    built = DFlashNetwork(our_config())
    built.load_state_dict(loaded.state_dict())
    taps, embeds = torch.randn(1, 6, TAPS * WIDTH), torch.randn(1, 16, WIDTH)
    hidden = []
    for network in (loaded, built):
        cache = network.new_cache(1)
        network.extend(cache, taps, torch.arange(6)[None])
        hidden.append(network.draft(cache, embeds, torch.arange(6, 22)[None]))
    assert torch.equal(*hidden) and hidden[0].isfinite().all()


@pytest.mark.parametrize(
    "changes",
    [
        {"rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        {"rope_parameters": {"rope_type": "default"}},
        {"block_size": None} | dflash_config(block_size=16),
        dflash_config(block_size=16),
        {"dflash_config": {}, "mask_token_id": 99, "target_layer_ids": [1, 3, 4]},
        dflash_config(mask_token="<|mask|>", causal=False, sliding_window=None),
        {"layer_types": None, "attention_bias": None},
    ],
    ids=str,
)
def test_other_spellings_say_the_same(tmp_path, changes):
    assert read_config(zlab_folder(tmp_path, changes)) == our_config()


def test_rope_scaling_in_either_spelling(tmp_path):
    old = {"rope_scaling": {"type": "yarn", **{k: v for k, v in YARN.items() if k != "rope_type"}}}
    new = {"rope_theta": None, "rope_parameters": YARN | {"rope_theta": 1e6}}
    for changes in (old, new, old | new | {"rope_theta": 1e6}):
        config = read_config(zlab_folder(tmp_path, changes))
        assert config == our_config(rope_scaling=YARN)


def test_the_prefix_of_some_exports(tmp_path):
    network = load_draft(zlab_folder(tmp_path, state=tensors("model.")))
    assert network.state_dict().keys() == SHAPES.keys()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_write_then_load(tmp_path, dtype, scaling):
    """Configuration and weights come back, bit for bit where the dtype can hold them."""
    network = DFlashNetwork(our_config(rope_scaling=scaling, eos_token_id=(8, 9)))
    write_draft(tmp_path / "draft", network.config, network.state_dict(), dtype)
    again = load_draft(tmp_path / "draft")
    assert again.config == network.config
    stored = load_file(tmp_path / "draft" / "model.safetensors")
    assert {name: list(value.shape) for name, value in stored.items()} == SHAPES
    for name, value in network.state_dict().items():
        rounded = value.to(getattr(torch, dtype))
        assert torch.equal(stored[name], rounded)
        assert torch.equal(again.state_dict()[name], rounded.float())
    write_draft(tmp_path / "draft", again.config, again.state_dict(), dtype)
    assert all(
        torch.equal(value, stored[name])
        for name, value in load_file(tmp_path / "draft" / "model.safetensors").items()
    )


def test_what_is_written(tmp_path):
    """Every documented key, in all the places where loaders look."""
    write_draft(tmp_path, our_config(), tensors(dtype=torch.float32))
    content = json.loads((tmp_path / "config.json").read_text())
    absent = {"auto_map", "transformers_version"}
    for key, value in ZLAB.items():
        if key not in absent | {"dflash_config"}:
            assert content[key] == value, key
    assert absent.isdisjoint(content)
    assert content["dflash_config"] == ZLAB["dflash_config"] | {"block_size": 16}
    assert content["rope_parameters"] == {"rope_type": "default", "rope_theta": 1000000}
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert {file.get_slice(name).get_dtype() for name in SHAPES} == {"BF16"}


@pytest.mark.parametrize("scaling", [None, YARN], ids=["plain", "yarn"])
def test_transformers_reads_the_same_frequencies(tmp_path, scaling):
    """Its own configuration class, given both spellings, rotates as we do."""
    config = our_config(rope_scaling=scaling)
    write_draft(tmp_path, config, tensors())
    rotary = Qwen3RotaryEmbedding(AutoConfig.from_pretrained(tmp_path))
    ours, factor = rotary_frequencies(config)
    assert torch.equal(rotary.inv_freq, ours) and rotary.attention_scaling == factor


def test_the_layout_that_others_do_not_know(tmp_path):
    """It comes back here, and is called something that no other loader takes for a z-lab draft."""
    config = our_config(sample_from_anchor=True, block_size=7)
    write_draft(tmp_path, config, tensors())
    assert read_config(tmp_path) == config
    content = json.loads((tmp_path / "config.json").read_text())
    assert content["architectures"] == ["DFlashFromAnchorDraftModel"]
    zlab_folder(tmp_path, dflash_config(sample_from_anchor=True))
    with pytest.raises(CheckpointError, match="sample_from_anchor=True: allowed False"):
        read_config(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["DFlash2DraftModel"]}, "architectures=DFlash2DraftModel: allowed"),
        ({"architectures": None}, "architectures=None"),
        ({"model_type": "llama"}, "model_type=llama: allowed qwen3"),
        ({"hidden_act": "gelu"}, "hidden_act=gelu: allowed silu"),
        ({"attention_bias": True}, "attention_bias=True: allowed False"),
        ({"use_sliding_window": True}, "use_sliding_window=True"),
        ({"layer_types": ["full_attention"] * 4}, "layer_types=4 entries: allowed"),
        ({"layer_types": ["full_attention"] * 4 + ["sliding_attention"]}, r"layer_types\[4\]=sl"),
        ({"block_size": 8} | dflash_config(block_size=16), "block_size=8 and dflash_config.block"),
        ({"block_size": None}, "block_size=None: allowed a value here or in dflash_config"),
        ({"block_size": True}, "block_size=True: allowed a whole number"),
        ({"block_size": 16.0}, "block_size=16.0: allowed a whole number"),
        ({"hidden_size": "32"}, "hidden_size=32: allowed a whole number"),
        ({"hidden_size": 10**12}, "hidden_size=1000000000000: allowed .* to 65536"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers=1000000000: allowed"),
        ({"head_dim": -8}, "head_dim=-8: allowed"),
        ({"head_dim": None}, "head_dim=None: allowed"),
        ({"num_target_layers": None}, "num_target_layers=None"),
        ({"rms_norm_eps": 0}, "rms_norm_eps=0: allowed a positive number"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps=nan: allowed"),
        ({"eos_token_id": [8, "9"]}, r"eos_token_id\[1\]=9: allowed"),
        (dflash_config(mask_token_id=100), "mask_token_id=100: allowed 0 to 99"),
        (dflash_config(target_layer_ids=[1, 3, 8]), r"target_layer_ids=\[1, 3, 8\]: allowed"),
        (dflash_config(target_layer_ids="1, 3"), "target_layer_ids=1, 3: allowed a list"),
        (dflash_config(target_layer_ids=[1, [3]]), r"target_layer_ids\[1\]=list: allowed"),
        (dflash_config(selector_rank=256), "dflash_config.selector_rank=256: allowed block_size"),
        ({"dflash_config": [1]}, "dflash_config=list: allowed an object"),
        ({"rope_theta": None}, "rope_theta=None: allowed a value here or in rope_parameters"),
        ({"rope_theta": -1}, "rope_theta=-1: allowed a positive number"),
        ({"rope_parameters": {"rope_theta": 5.0}}, "rope_parameters=.*5.0.* and rope_theta"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_type=longrope: allowed default, lin"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_scaling: not usable as linear"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": [4]}}, "factor=list: allowed"),
        ({"rope_scaling": YARN | {"shell": 1}}, "rope_scaling.shell=1: allowed rope_theta, "),
        ({"rope_scaling": {"rope_type": "linear", "partial_rotary_factor": 0.5}}, "0.5: allowed 1"),
    ],
    ids=str,
)  # fmt: skip
def test_bad_values_are_named(tmp_path, changes, message):
    """One line with the file, the key, the value and what is allowed."""
    with pytest.raises(CheckpointError, match=message) as error:
        load_draft(zlab_folder(tmp_path, changes))
    assert str(error.value).startswith(str(tmp_path / "config.json"))
    assert "\n" not in str(error.value) and len(str(error.value)) < 700


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
    | st.sampled_from([0, -1, 2**63, 1e308, 1e-300, 5e-324, "yarn", "llama3", "linear"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.sampled_from([*YARN, "type", "low_freq_factor", "x"]), inner, max_size=4),
    max_leaves=6,
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(
    key=st.sampled_from([*ZLAB, "rope_parameters", "partial_rotary_factor"]),
    inner=st.sampled_from([None, "block_size", "mask_token_id", "target_layer_ids", "causal"]),
    value=JSON,
)
def test_any_value_is_taken_or_named(key, inner, value):
    """Nothing else than a configuration or a ValueError comes of a config.json."""
    changes = {key: value} if inner is None else dflash_config(**{inner: value})
    content = json.loads(json.dumps(ZLAB | changes))
    try:
        config = parse_config(content)
    except ValueError as error:
        assert "allowed" in str(error) or "rope" in str(error)
    else:
        assert all(f.isfinite().all() for f in rotary_frequencies(config)[:1])


def test_hostile_texts_do_not_reach_the_terminal(tmp_path):
    changes = {"hidden_act": "\x1b[2J" + "x" * 10_000} | dflash_config(**{"\x1b[2J": 1})
    with pytest.raises(CheckpointError) as error:
        read_config(zlab_folder(tmp_path, changes))
    assert "\x1b" not in str(error.value) and len(str(error.value)) < 700


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "[" * 100_000, '{"hidden_size": ' + "9" * 5000 + "}", '"' + "x" * 2**20 + '"'],
    ids=["empty", "list", "cut off", "deep", "digits", "long"],
)
def test_no_json_of_ours(tmp_path, text):
    folder = zlab_folder(tmp_path)
    (folder / "config.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"config\.json") as error:
        read_config(folder)
    assert len(str(error.value)) < 700


def test_tensors_that_do_not_fit_are_all_named(tmp_path):
    state = tensors()
    del state["fc.weight"], state["layers.4.mlp.up_proj.weight"]
    state |= {"embed_tokens.weight": torch.zeros(1), "lm_head.weight": torch.zeros(1)}
    state["norm.weight"] = torch.zeros(WIDTH + 1)
    with pytest.raises(CheckpointError) as error:
        load_draft(zlab_folder(tmp_path, state=state))
    message = str(error.value)
    assert "missing: fc.weight, layers.4.mlp.up_proj.weight;" in message
    assert "unexpected: embed_tokens.weight, lm_head.weight;" in message
    assert "of another shape: norm.weight [33] in place of [32]" in message


def test_more_layers_than_the_configuration_has(tmp_path):
    changes = {"num_hidden_layers": 4, "layer_types": ["full_attention"] * 4}
    with pytest.raises(CheckpointError, match=r"unexpected: layers\.4\.input_lay"):
        load_draft(zlab_folder(tmp_path, changes))


def test_a_prefix_beside_none(tmp_path):
    state = tensors() | {"model.norm.weight": torch.zeros(WIDTH)}
    with pytest.raises(CheckpointError, match=r"norm.weight both with and without 'model\.'"):
        load_draft(zlab_folder(tmp_path, state=state))


def test_whole_numbers_are_no_weights(tmp_path):
    state = tensors() | {"norm.weight": torch.zeros(WIDTH, dtype=torch.int8)}
    with pytest.raises(CheckpointError, match=r"norm\.weight is I8; allowed BF16, F16, F32"):
        load_draft(zlab_folder(tmp_path, state=state))


@pytest.mark.parametrize("damage", ["missing", "garbage", "cut"])
def test_damaged_weights(tmp_path, damage):
    path = zlab_folder(tmp_path) / "model.safetensors"
    data = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(b"\x80\x04garbage" if damage == "garbage" else data[:-8])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: cannot be read"):
        load_draft(tmp_path)


def test_writing_refuses(tmp_path):
    """Another dtype, the last layer, weights that do not fit, and another model's folder."""
    state = tensors()
    with pytest.raises(ConfigError, match="dtype=int8: allowed bfloat16, float16, float32"):
        write_draft(tmp_path / "a", our_config(), state, "int8")
    with pytest.raises(ConfigError, match=r"target_layer_ids=\[1, 3, 7\]: the last layer cannot"):
        write_draft(tmp_path / "a", our_config(target_layer_ids=(1, 3, 7)), state)
    with pytest.raises(CheckpointError, match=r"missing: norm\.weight"):
        lacking = {k: v for k, v in state.items() if k != "norm.weight"}
        write_draft(tmp_path / "a", our_config(), lacking)
    assert not (tmp_path / "a").exists()
    other = zlab_folder(tmp_path / "b", {"architectures": ["Qwen3ForCausalLM"]})
    before = (other / "config.json").read_bytes()
    with pytest.raises(CheckpointError, match=r"holds another model \(Qwen3ForCausalLM\)"):
        write_draft(other, our_config(), state)
    assert (other / "config.json").read_bytes() == before
    (other / "config.json").unlink()
    with pytest.raises(
        CheckpointError, match=r"holds something else \(model\.safetensors\); allowed: a new folder"
    ):
        write_draft(other, our_config(), state)
