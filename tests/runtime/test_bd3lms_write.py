"""What is written for bd3lms has its objects, names and order, and comes back as it was."""

import json
import pickletools
import zipfile

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from data.tokenization import complete_special_tokens, tokenizer_state
from diffusion import Diffusion
from runtime.bd3lms.config import convert_config, their_config
from runtime.bd3lms.write import write_bd3lms
from runtime.checkpoint import read_checkpoint
from runtime.config import locate
from runtime.errors import CheckpointError
from tests import bd3lms_format as theirs
from tests.small import small_config, small_model, word_tokenizer
from tests.support import equal

# The keys that `Diffusion` of bd3lms and its `DIT` read while they are built and loaded.
READ = """
algo.name algo.backbone algo.parameterization algo.sampler algo.cross_attn algo.ignore_bos algo.T
algo.mdlm_loss_scale algo.var_min algo.time_conditioning algo.clip_search_delta algo.fix_clipping
algo.clip_search_widths model.length model.hidden_size model.cond_dim model.n_heads model.n_blocks
model.dropout model.tie_word_embeddings model.attn_backend training.ema training.sampling_eps
training.antithetic_sampling training.sampling_eps_min training.sampling_eps_max training.resample
training.from_pretrained training.eval_nll sampling.kv_cache sampling.first_hitting
sampling.nucleus_p sampling.var_length loader.eval_batch_size loader.batch_size noise.type mode
block_size seed optim.lr eval.checkpoint_path data.train data.tokenizer_name_or_path lr_scheduler
"""


def averaged(model):
    """The model with a moving average that is not its weights."""
    model.create_ema()
    for number, shadow in enumerate(model.ema.shadow):
        shadow.add_(0.01 * (number + 1))
    model.ema.num_updates = 5
    return model


def opened(path):
    """As bd3lms opens a checkpoint: the objects themselves."""
    return torch.load(path, weights_only=False)


@pytest.mark.parametrize("algo", ["mdlm", "bd3lm"])
def test_layout(tmp_path, algo):
    overrides = ("algo=bd3lm", "block_size=4") if algo == "bd3lm" else ("algo=mdlm",)
    model = averaged(small_model(*overrides))
    write_bd3lms(model, tmp_path / "a.ckpt", global_step=9)
    content = opened(tmp_path / "a.ckpt")
    by_hand = theirs.checkpoint(word_tokenizer(), {}, {}, theirs.config())
    optional = {"sampling_eps_min", "sampling_eps_max"}
    assert set(content) == set(by_hand) - optional
    names = [f"backbone.{name}" for name, _ in model.backbone.named_parameters()]
    assert set(content["state_dict"]) == {*names, "backbone.rotary_emb.inv_freq"}
    shadows = content["ema"]["shadow_params"]
    assert [tuple(s.shape) for s in shadows] == [tuple(p.shape) for p in model.parameters()]
    assert all(equal(a, b) for a, b in zip(shadows, model.ema.shadow, strict=True))
    assert (content["global_step"], content["hparams_name"]) == (9, "kwargs")
    counters = content["loops"]["fit_loop"]
    assert counters["epoch_progress"]["current"]["completed"] == 0
    assert counters["epoch_loop.batch_progress"]["current"]["completed"] == 9
    config = content["hyper_parameters"]["config"]
    assert isinstance(config, DictConfig)
    absent = object()
    assert all(OmegaConf.select(config, key, default=absent) is not absent
               for key in READ.split() if key not in ("training.from_pretrained",))  # fmt: skip
    assert config.algo.cross_attn is (algo == "bd3lm") and config.algo.parameterization == "subs"


def test_the_tokenizer_is_an_object_that_every_version_can_name(tmp_path):
    model = small_model()
    write_bd3lms(model, tmp_path / "a.ckpt")
    tokenizer = opened(tmp_path / "a.ckpt")["hyper_parameters"]["tokenizer"]
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    assert tokenizer.vocab_size == 11 and tokenizer.mask_token_id == 3
    assert tokenizer("a b [MASK] zz")["input_ids"] == [5, 6, 3, 4]
    with zipfile.ZipFile(tmp_path / "a.ckpt") as archive:
        [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
        operations = list(pickletools.genops(archive.read(name)))
    named = {text for op, text, _ in operations if op.name == "GLOBAL"}
    assert {text for text in named if text.startswith("transformers")} == {
        "transformers PreTrainedTokenizerFast"
    }


@pytest.mark.parametrize("weights", ["raw", "ema"])
@pytest.mark.parametrize("in_use", ["raw", "ema"])
def test_round_trip(tmp_path, weights, in_use):
    """Whichever weights are in use when it is written, both come back."""
    model = averaged(small_model("algo=bd3lm", "block_size=4"))
    expected = {
        "raw": {name: value.clone() for name, value in model.state_dict().items()},
        "ema": None,
    }
    with model.ema_weights():
        expected["ema"] = {name: value.clone() for name, value in model.state_dict().items()}
        if in_use == "ema":
            write_bd3lms(model, tmp_path / "a.ckpt")
            assert equal(dict(model.state_dict()), expected["ema"])
    if in_use == "raw":
        write_bd3lms(model, tmp_path / "a.ckpt")
    assert equal(dict(model.state_dict()), expected["raw"])
    found = Diffusion.load_from_checkpoint(tmp_path / "a.ckpt", weights=weights)
    assert equal(dict(found.state_dict()), expected[weights])
    assert found.tokenizer_state == model.tokenizer_state
    assert found.ema.num_updates == 5 and type(found) is type(model)


def test_the_configuration_comes_back():
    ours = small_config("algo=bd3lm", "block_size=4", "training.resample=true", "seed=5",
                        "optim.lr=2e-4", "noise=cosine", "data=lm1b_wrap")  # fmt: skip
    again, _ = convert_config(their_config(ours))
    for key in ("algo", "block_size", "seed", "training", "noise", "optim"):
        assert again[key] == ours[key], key
    size = "hidden_size", "n_blocks", "n_heads", "cond_dim", "length", "dropout"
    assert all(again["model"][key] == ours["model"][key] for key in size)
    assert again["data"]["name"] == "lm1b" and again["data"]["wrap"] is True


def test_a_mask_beyond_the_vocabulary_is_theirs_to_add(tmp_path):
    """bd3lms numbers the mask itself where the tokenizer has none, after the vocabulary proper."""
    state = tokenizer_state(complete_special_tokens(gpt2_with_mask()))
    config = small_config("algo=mdlm")
    model = locate(config["algo"]["_target_"])(config, state)
    write_bd3lms(model, tmp_path / "a.ckpt")
    tokenizer = opened(tmp_path / "a.ckpt")["hyper_parameters"]["tokenizer"]
    assert tokenizer.mask_token is None and tokenizer.vocab_size == 5
    assert model.special.vocab_size == 6
    again = Diffusion.load_from_checkpoint(tmp_path / "a.ckpt")
    assert again.special == model.special


def gpt2_with_mask():
    tokenizer = theirs.gpt2_like()
    tokenizer.pad_token = None
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["added_tokens"] = [t for t in content["added_tokens"] if t["content"] != "[PAD]"]
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(content)),
        bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>",
    )  # fmt: skip


def test_autoregressive_only_without_conditioning(tmp_path):
    model = small_model("algo=ar")
    with pytest.raises(CheckpointError, match=r"algo\.name=ar: .*adaLN_modulation.* is in use"):
        write_bd3lms(model, tmp_path / "a.ckpt")
    cfg = theirs.config("algo.name=ar", "algo.parameterization=ar", "training.ema=0.9")
    raw, average = (theirs.weights(11, seed, conditioned=False) for seed in (1, 2))
    torch.save(theirs.checkpoint(word_tokenizer(), raw, average, cfg), tmp_path / "theirs.ckpt")
    back = Diffusion.load_from_checkpoint(tmp_path / "theirs.ckpt")
    write_bd3lms(back, tmp_path / "a.ckpt")
    content = opened(tmp_path / "a.ckpt")
    buffer = {"backbone.rotary_emb.inv_freq": content["state_dict"]["backbone.rotary_emb.inv_freq"]}
    assert equal(dict(content["state_dict"]), {**raw, **buffer})
    assert equal(content["ema"]["shadow_params"], list(average.values()))


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("algo", "name", "tempered"),
        ("model", "_target_", "models.mine.Net"),
        ("noise", "name", "x"),
    ],
)
def test_what_bd3lms_does_not_have(tmp_path, section, key, value):
    model = small_model()
    model.config[section] = {**model.config[section], key: value}
    with pytest.raises(CheckpointError, match=f"{section}.{key}={value}: allowed"):
        write_bd3lms(model, tmp_path / "a.ckpt")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="cannot be written"):
        write_bd3lms(small_model(), tmp_path / "absent" / "a.ckpt")


def test_no_moving_average(tmp_path):
    write_bd3lms(small_model("training.ema=0"), tmp_path / "a.ckpt")
    assert read_checkpoint(tmp_path / "a.ckpt")["ema"] is None
