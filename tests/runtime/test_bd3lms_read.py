"""Checkpoints of bd3lms open here: the same weights, averages, tokenizer and settings."""

import logging

import pytest
import torch
from transformers import BertTokenizer, GPT2TokenizerFast

from data.tokenization import (
    complete_special_tokens,
    same_ids,
    special_ids,
    tokenizer_from_state,
    tokenizer_state,
)
from diffusion import AR, BD3LM, MDLM, Diffusion
from models.attention import FullAttention
from runtime.bd3lms import read as module
from runtime.bd3lms.config import convert_config
from runtime.bd3lms.tree import resolve
from runtime.bd3lms.weights import parameter_order
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError
from tests import bd3lms_format as theirs
from tests.small import small_config, word_tokenizer

V = len(theirs.VOCABULARY)


@pytest.fixture(autouse=True)
def said(caplog, monkeypatch):
    """What is reported, for every test anew."""
    monkeypatch.setattr(module, "_reported", set())
    caplog.set_level(logging.WARNING)
    return caplog


def our_model(state, tokenizer, *overrides, kind=BD3LM):
    """A model of ours whose weights were set directly."""
    config = small_config("algo=bd3lm", "block_size=4", f"model.cond_dim={theirs.COND}", *overrides)
    model = kind(config, tokenizer)
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"backbone.rotary_emb.inv_freq"} and not unexpected
    return model.eval()


def logits(model):
    """Logits of fixed tokens under full attention."""
    ids = torch.arange(2 * theirs.LENGTH).view(2, -1) % model.special.vocab_size
    pattern = FullAttention(theirs.LENGTH, False, "math", torch.device("cpu"))
    with torch.no_grad():
        return model.backbone.logits(model.backbone(ids, pattern))


@pytest.mark.parametrize("prefix", ["backbone.", "backbone._orig_mod.", "_orig_mod.backbone."])
@pytest.mark.parametrize("slow", [True, False])
def test_the_same_logits_raw_and_averaged(tmp_path, prefix, slow):
    path = tmp_path / "last.ckpt"
    tokenizer = None if slow else word_tokenizer()
    size = V if slow else len(tokenizer)
    raw, average = theirs.weights(size, 1), theirs.weights(size, 2)
    content = theirs.checkpoint(tokenizer, raw, average, theirs.config(), prefix)
    if slow:
        theirs.save_with_slow_bert(path, content)
    else:
        torch.save(content, path)
    for weights, state in (("raw", raw), ("ema", average)):
        model = Diffusion.load_from_checkpoint(path, weights=weights)
        expected = our_model(state, model.tokenizer_state)
        assert type(model) is BD3LM and model.block_size == 4 and not model.training
        assert torch.equal(logits(model), logits(expected))
        again = Diffusion.load_from_checkpoint(path, config=expected.config, weights=weights)
        assert torch.equal(logits(again), logits(expected))
    assert model.ema.num_updates == 1234 and model.ema.decay == 0.9999


def test_what_is_read(tmp_path):
    content = theirs.checkpoint(None, theirs.weights(V, 1), theirs.weights(V, 2), theirs.config())
    theirs.save_with_slow_bert(tmp_path / "a.ckpt", content)
    found = read_checkpoint(tmp_path / "a.ckpt")
    assert found["origin"] == "bd3lms" and found["global_step"] == 1234
    assert found["sampling_interval"] == [0.45, 0.95]
    config = found["hyper_parameters"]["config"]
    assert config["algo"]["_target_"] == "diffusion.BD3LM" and config["algo"]["var_min"] is True
    assert config["masking"] == {"name": "none", "mix_alpha": 0.0, "depth_mode": "none"}
    assert config["noise"]["_target_"] == "objectives.noise.LogLinear"
    assert config["model"]["_target_"] == "models.dit.DiT"
    assert config["model"]["attn_backend"] == "auto"
    assert (config["block_size"], config["seed"], config["model"]["length"]) == (4, 7, 8)
    assert config["loader"]["eval_global_batch_size"] == 512  # a reference to another key
    assert config["training"]["resample"] is True
    assert config["training"]["from_pretrained"] is None
    assert config["data"]["name"] == "lm1b" and config["data"]["wrap"] is True
    assert "sampling_eps_min" not in found["state_dict"]
    plain = type(found["state_dict"]), type(found["hyper_parameters"]["config"])
    assert plain == (dict, dict)


def test_no_average_and_no_interval(tmp_path):
    content = theirs.checkpoint(
        word_tokenizer(), theirs.weights(11, 1), {}, theirs.config("training.ema=0")
    )
    for key in ("ema", "sampling_eps_min", "sampling_eps_max"):
        del content[key]
    content["state_dict"] = {
        name: value for name, value in content["state_dict"].items() if "eps" not in name
    }
    torch.save(content, tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["sampling_interval"] is None
    model = Diffusion.load_from_checkpoint(tmp_path / "a.ckpt")
    assert model.ema is None
    expected = our_model(theirs.weights(11, 1), model.tokenizer_state)
    assert torch.equal(logits(model), logits(expected))


def test_every_difference_is_said_once(tmp_path, said):
    overrides = "algo.name=mdlm", "algo.ignore_bos=false", "algo.mdlm_loss_scale=true"
    content = theirs.checkpoint(
        word_tokenizer(), theirs.weights(11, 1), theirs.weights(11, 2), theirs.config(*overrides)
    )
    torch.save(content, tmp_path / "a.ckpt")
    assert type(Diffusion.load_from_checkpoint(tmp_path / "a.ckpt")) is MDLM
    Diffusion.load_from_checkpoint(tmp_path / "a.ckpt")
    lines = [record.getMessage() for record in said.records]
    assert all(line.startswith(f"{tmp_path}/a.ckpt: ") for line in lines)
    for part in (
        "algo.ignore_bos=false (default here: true)",
        "algo.mdlm_loss_scale=true (default here: false)",
        "one t in [1e-3, 1] per block",
        "logits and loss in bf16",
        "sampling.nucleus_p=0.9: bd3lms drops the token that crosses",
        "masking.mix_alpha=0.0625, masking.depth_mode=dependency: not taken over, their formula",
    ):
        assert sum(part in line for line in lines) == 1, part


def test_autoregressive_networks_have_no_conditioning(tmp_path):
    """Scale 1, shift 0 and gate 1 are what a network without modulation does."""
    raw = theirs.weights(11, 1, conditioned=False)
    average = theirs.weights(11, 2, conditioned=False)
    cfg = theirs.config("algo.name=ar", "algo.parameterization=ar", "algo.cross_attn=false")
    torch.save(theirs.checkpoint(word_tokenizer(), raw, average, cfg), tmp_path / "a.ckpt")
    for weights, state in (("raw", raw), ("ema", average)):
        model = Diffusion.load_from_checkpoint(tmp_path / "a.ckpt", weights=weights)
        assert type(model) is AR
        ids = torch.arange(theirs.LENGTH)[None]
        with torch.no_grad():
            found = model.backbone.logits(model.backbone(ids, model.attention()))
        assert torch.allclose(found[0], plain_transformer(state, ids[0]), atol=1e-5)


def plain_transformer(state, ids_L):
    """A causal transformer without any modulation, written out."""
    f, heads, size = torch.nn.functional, theirs.HEADS, theirs.HIDDEN // theirs.HEADS
    w = {name.removeprefix("backbone."): value for name, value in state.items()}
    angle = torch.outer(torch.arange(len(ids_L)).float(), theirs.inv_freq()).repeat(1, 2)

    def turned(x):
        first, second = x.chunk(2, dim=-1)
        return x * angle.cos() + torch.cat([-second, first], dim=-1) * angle.sin()

    def norm(x, name):
        return f.layer_norm(x, (theirs.HIDDEN,)) * w[name]

    x = w["vocab_embed.embedding"][ids_L]
    for n in range(theirs.BLOCKS):
        qkv = norm(x, f"blocks.{n}.norm1.weight") @ w[f"blocks.{n}.attn_qkv.weight"].T
        q, k, v = qkv.view(len(ids_L), 3, heads, size).permute(1, 2, 0, 3)
        score = turned(q) @ turned(k).transpose(-1, -2) / size**0.5
        future = torch.ones(score.shape[-2:], dtype=torch.bool).triu(1)
        mixed = score.masked_fill(future, -torch.inf).softmax(-1) @ v
        x = x + mixed.transpose(0, 1).flatten(1) @ w[f"blocks.{n}.attn_out.weight"].T
        h = norm(x, f"blocks.{n}.norm2.weight")
        h = f.linear(h, w[f"blocks.{n}.mlp.0.weight"], w[f"blocks.{n}.mlp.0.bias"])
        h = f.gelu(h, approximate="tanh")
        x = x + f.linear(h, w[f"blocks.{n}.mlp.2.weight"], w[f"blocks.{n}.mlp.2.bias"])
    x = norm(x, "output_layer.norm_final.weight")
    return f.linear(x, w["output_layer.linear.weight"], w["output_layer.linear.bias"])


# Tokenizers --------------------------------------------------------------------------------------


def test_slow_bert_becomes_the_fast_one(tmp_path):
    content = theirs.checkpoint(None, theirs.weights(V, 1), theirs.weights(V, 2), theirs.config())
    theirs.save_with_slow_bert(tmp_path / "a.ckpt", content)
    found = read_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]["tokenizer"]
    tokenizer = tokenizer_from_state(found)
    ids = {token: index for index, token in enumerate(theirs.VOCABULARY)}
    words = "the", "cat", "##s", ",", "un", "##like", "##ly", "[UNK]", "[MASK]"
    text = "The CATS, unlikely dogs [MASK]"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == [ids[word] for word in words]
    special = special_ids(tokenizer)
    assert (special.bos, special.eos, special.mask, special.pad) == (2, 3, 4, 0)
    assert special.vocab_size == V
    # What the library itself makes of the same vocabulary, and what the data here would.
    published = complete_special_tokens(BertTokenizer(vocab=ids))
    assert same_ids(tokenizer, published) and found == tokenizer_state(published)


def test_lower_casing_is_as_recorded(tmp_path):
    content = theirs.checkpoint(None, theirs.weights(V, 1), theirs.weights(V, 2), theirs.config())
    theirs.save_with_slow_bert(tmp_path / "a.ckpt", content, lower=False)
    found = read_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]["tokenizer"]
    encode = tokenizer_from_state(found)
    assert encode("The the", add_special_tokens=False)["input_ids"] == [1, 5]


def test_gpt2_gets_a_mask_after_its_vocabulary(tmp_path):
    """Where bd3lms gives [PAD] the id of the mask, the mask has it alone."""
    content = theirs.checkpoint(
        theirs.gpt2_like(), theirs.weights(6, 1), theirs.weights(6, 2), theirs.config()
    )
    torch.save(content, tmp_path / "a.ckpt")
    model = Diffusion.load_from_checkpoint(tmp_path / "a.ckpt")
    special = model.special
    assert (special.mask, special.vocab_size, special.pad, special.bos) == (5, 6, 4, 4)
    assert model.tokenizer("abb", add_special_tokens=False)["input_ids"] == [2, 1]
    assert "[PAD]" not in model.tokenizer.get_vocab()
    # What the data here would have: the published tokenizer with a mask as its last id.
    vocabulary = {token: index for token, index in model.tokenizer.get_vocab().items() if index < 5}
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|end|>")
    published = GPT2TokenizerFast(vocab=vocabulary, merges=[("a", "b")], **end)
    assert same_ids(model.tokenizer, complete_special_tokens(published))


@pytest.mark.parametrize(
    ("module_name", "name"),
    [
        ("transformers.tokenization_utils_fast", "PreTrainedTokenizerFast"),
        ("transformers.models.bert.tokenization_bert_fast", "BertTokenizerFast"),
        ("transformers.models.gpt2.tokenization_gpt2_fast", "GPT2TokenizerFast"),
    ],
)
def test_fast_tokenizers_of_older_versions(tmp_path, module_name, name):
    tokenizer = word_tokenizer()
    content = theirs.checkpoint(None, theirs.weights(11, 1), theirs.weights(11, 2), theirs.config())
    with theirs.fake_class(module_name, name) as kind:
        content["hyper_parameters"]["tokenizer"] = theirs.filled(
            kind,
            _tokenizer=tokenizer.backend_tokenizer,
            # The form before there was a map of the special tokens.
            _bos_token="[BOS]", _eos_token="[EOS]", _pad_token="[PAD]", _mask_token="[MASK]",
            _unk_token="[UNK]",
        )  # fmt: skip
        torch.save(content, tmp_path / "a.ckpt")
    model = Diffusion.load_from_checkpoint(tmp_path / "a.ckpt")
    assert model.tokenizer_state == tokenizer_state(tokenizer)


# What does not fit -------------------------------------------------------------------------------


def spoil_average(content):
    content["ema"]["shadow_params"][3] = torch.zeros(4)


def shorten_average(content):
    content["ema"]["shadow_params"].pop()


def swap_average(content):
    shadows = content["ema"]["shadow_params"]
    shadows[5], shadows[6] = shadows[6], shadows[5]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (spoil_average, r"ema\.shadow_params\[3\]: shape \(4,\), .*mlp\.2\.weight has \(8, 8\)"),
        (swap_average, r"ema\.shadow_params\[5\]: shape \(48, 16\), .*norm1\.weight has \(16,\)"),
        (shorten_average, r"ema\.shadow_params: 29 tensors for 30 parameters"),
        (lambda c: c.update(ema=[1, 2]), r"ema: allowed"),
        (lambda c: c["state_dict"].update({"backbone.rotary_emb.inv_freq": torch.ones(4)}),
         r"rotary_emb\.inv_freq: other frequencies"),
        (lambda c: c["state_dict"].pop("backbone.vocab_embed.embedding"), r"has no .*embedding"),
        (lambda c: c["state_dict"].update(extra=5), r"state_dict\.extra: no tensor"),
        (lambda c: c["state_dict"].update(
            {"_orig_mod.backbone.blocks.0.norm1.weight": torch.ones(16)}), r"as well"),
        (lambda c: c.update(global_step="many"), r"global_step=many: allowed is a count"),
    ],
)  # fmt: skip
def test_a_file_that_does_not_fit(tmp_path, change, message):
    content = theirs.checkpoint(
        word_tokenizer(), theirs.weights(11, 1), theirs.weights(11, 2), theirs.config()
    )
    change(content)
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message) as error:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value) and str(tmp_path / "a.ckpt") in str(error.value)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("algo.name=sedd", r"config\.algo\.name=sedd: allowed ar, bd3lm, mdlm"),
        ("algo.backbone=hf_dit", r"config\.algo\.backbone=hf_dit: allowed dit"),
        ("algo.parameterization=d3pm", r"parameterization=d3pm: allowed subs"),
        ("noise.type=other", r"config\.noise\.type=other: allowed cosine"),
        ("block_size=3", r"config\.block_size=3: allowed are divisors of 8"),
        ("model.hidden_size=wide", r"config\.model\.hidden_size=wide: allowed an integer"),
        ("model.hidden_size=${eval:1}", r"config\.model\.hidden_size=.*: a value is needed"),
        ("training.ema=yes_please", r"config\.training\.ema=yes_please: allowed a number"),
        ("algo.ignore_bos=1", r"config\.algo\.ignore_bos=1: allowed true, false"),
    ],
)
def test_a_configuration_that_does_not_fit(tmp_path, override, message):
    content = theirs.checkpoint(
        word_tokenizer(), theirs.weights(11, 1), theirs.weights(11, 2), theirs.config(override)
    )
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "a.ckpt")


def test_a_vocabulary_that_does_not_fit(tmp_path):
    content = theirs.checkpoint(
        word_tokenizer(), theirs.weights(20, 1), theirs.weights(20, 2), theirs.config()
    )
    torch.save(content, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="has 11 ids, the network 20"):
        read_checkpoint(tmp_path / "a.ckpt")


# Pure parts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("conditioned", [True, False])
def test_the_order_of_the_parameters(conditioned):
    assert parameter_order(2, conditioned) == list(theirs.shapes(V, conditioned))


def test_our_order_is_theirs():
    model = our_model(theirs.weights(11, 1), tokenizer_state(word_tokenizer()))
    assert parameter_order(2) == [name for name, _ in model.named_parameters()]


def test_references_are_followed_and_resolvers_are_not():
    tree = {
        "a": {"b": 3, "c": "${.b}", "d": "${..e}", "f": "x${a.b}y${eval:1+1}"},
        "e": "${a.c}", "loop": "${pool}", "pool": "${loop}", "env": "${oc.env:HOME}",
        "list": ["${e}", "${nowhere}"], "whole": "${a}",
    }  # fmt: skip
    found = resolve(tree)
    assert found["a"] == {"b": 3, "c": 3, "d": 3, "f": "x3y${eval:1+1}"}
    assert found["e"] == 3 and found["list"] == [3, "${nowhere}"] and found["whole"] == found["a"]
    assert found["env"] == "${oc.env:HOME}" and "${" in found["loop"]


def test_references_that_unfold_without_end_are_stopped():
    tree = {f"k{n}": f"${{k{n + 1}}} ${{k{n + 1}}}" for n in range(40)} | {"k40": "x"}
    with pytest.raises(ValueError, match="more than"):
        resolve(tree)


def test_the_data_set_that_is_not_here_is_said():
    plain = resolve(theirs.OmegaConf.to_container(theirs.config("data.train=text8")))
    ours, remarks = convert_config(plain)
    assert "data" not in ours
    assert any("data.train=text8: no such data set here" in line for line in remarks)
