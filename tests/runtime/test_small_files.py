"""A small file stays small when it is read, and whatever it says, what comes back is one line."""

import codecs
import json
import time
import tracemalloc

import pytest
import torch

from data.errors import DataError
from data.tokenization import tokenizer_from_state, tokenizer_state
from diffusion import Diffusion
from runtime.bd3lms.records import DICT_CONFIG, STAND_INS
from runtime.bd3lms.tree import plain_tree, resolve
from runtime.bounded import no_larger_than
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError
from runtime.excerpt import shown
from runtime.export import write_export
from runtime.safe_load import Refused, load_data
from tests import bd3lms_format as theirs
from tests.small import small_model, word_tokenizer


def their_file(path, *overrides, conditioned=True, change=None):
    """A checkpoint of bd3lms with eleven ids."""
    raw, average = (theirs.weights(11, seed, conditioned) for seed in (1, 2))
    content = theirs.checkpoint(word_tokenizer(), raw, average, theirs.config(*overrides))
    if change is not None:
        change(content)
    torch.save(content, path)
    return path


def our_file(path, change=None):
    """A checkpoint of ours."""
    model = small_model("algo=mdlm")
    model.create_ema()
    content = {"state_dict": dict(model.state_dict()), "global_step": 3}
    model.on_save_checkpoint(content)
    if change is not None:
        change(content)
    torch.save(content, path)
    return path


def refusal(path, read=Diffusion.load_from_checkpoint):
    """The message, after a look at the memory that Python took."""
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 2e7
    finally:
        tracemalloc.stop()
    text = str(error.value)
    assert text.startswith(str(path)) and text.isprintable()
    assert len(text.removeprefix(str(path))) < 400
    return text


AUTOREGRESSIVE = ("algo.name=ar", "algo.parameterization=ar", "algo.cross_attn=false")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.n_blocks=50000"], "config.model.n_blocks=50000: the weights have 2"),
        (["model.hidden_size=65536"], "config.model.hidden_size=65536: the weights have 16"),
        (["model.hidden_size=8589934592"], "hidden_size=8589934592: the weights have 16"),
        (["model.hidden_size=-64"], "config.model.hidden_size=-64: allowed an integer >= 1"),
        (["model.n_heads=0"], "config.model.n_heads=0: allowed an integer >= 1"),
        (["model.cond_dim=4096"], "config.model.cond_dim=4096: the weights have (8,)"),
        (["model.cond_dim=4096", *AUTOREGRESSIVE], "model.cond_dim=4096: allowed up to 1024"),
        (["model.length=8589934592"], "config.model.length=8589934592: allowed an integer in [1, "),
        (["model.dropout=5.0"], "config.model.dropout=5.0: allowed a number in [0, 1)"),
        (["algo.name=" + "x" * 90_000], f"config.algo.name={'x' * 77}...: allowed ar"),
        (['algo.name="\\e[31mred"'], "config.algo.name=\\x1b[31mred: allowed ar"),
    ],
)  # fmt: skip
def test_sizes_of_bd3lms(tmp_path, overrides, message):
    conditioned = overrides[-1] != AUTOREGRESSIVE[-1]
    path = their_file(tmp_path / "a.ckpt", *overrides, conditioned=conditioned)
    assert message in refusal(path)


def test_blocks_that_are_names_only(tmp_path):
    """As many blocks as the configuration says, but without the weights of any."""

    def add(content):
        for block in range(2, 50):
            content["state_dict"][f"backbone.blocks.{block}.norm1.weight"] = torch.ones(16)

    path = their_file(tmp_path / "a.ckpt", "model.n_blocks=50", change=add)
    assert "state_dict has no backbone.blocks.2.attn_qkv.weight" in refusal(path)


OURS = [
    ("model.hidden_size", 4096, "far larger than its"),
    ("model.hidden_size", 2**40, "network of its configuration"),
    ("model.hidden_size", -64, "model.hidden_size=-64: allowed an integer >= 1"),
    ("model.n_blocks", 50_000, "far larger than its"),
    ("model.cond_dim", 2**18, "far larger than its"),
    ("model.dropout", 5.0, "model.dropout=5.0: allowed a number in [0, 1)"),
    ("model.length", 2**40, "model.length=1099511627776: allowed up to 1048576"),
    ("algo.ignore_bos", None, "no network of its configuration (KeyError: 'ignore_bos')"),
]


@pytest.mark.parametrize(("key", "value", "message"), OURS)
@pytest.mark.parametrize("exported", [False, True])
def test_sizes_of_ours(tmp_path, key, value, message, exported):
    section, name = key.split(".")
    if not exported:
        path = our_file(
            tmp_path / "a.ckpt",
            lambda c: change_key(c["hyper_parameters"]["config"], section, name, value),
        )
    else:
        path = tmp_path / "folder"
        path.mkdir()
        model = small_model("algo=mdlm")
        facts = {"global_step": 1, "provenance": {}, "weights": "raw", "origin": None}
        state = tokenizer_state(model.tokenizer)
        write_export(path, model.state_dict(), model.config, model.tokenizer, state, facts)
        content = json.loads((path / "config.json").read_text())
        change_key(content["config"], section, name, value)
        (path / "config.json").write_text(json.dumps(content))
    assert message in refusal(path)


def change_key(config, section, name, value):
    if value is None:
        del config[section][name]
    else:
        config[section][name] = value


def test_good_files_open_as_before(tmp_path):
    """Also the stream of random numbers is where it was."""
    original = small_model("algo=mdlm")
    model = Diffusion.load_from_checkpoint(our_file(tmp_path / "a.ckpt"), weights="raw")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in original.state_dict().items())
    torch.manual_seed(5)
    again = type(original)(original.config, original.tokenizer_state)
    state = torch.get_rng_state()
    torch.manual_seed(5)
    with no_larger_than("here", original.state_dict()):
        bounded = type(original)(original.config, original.tokenizer_state)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, again.state_dict()[k]) for k, v in bounded.state_dict().items())


def test_the_bound_ends_with_the_block():
    with no_larger_than("here", {}):
        torch.nn.Linear(8, 8)
    message = r"here: .* far larger than its 0 tensors of 0 bytes"
    with pytest.raises(CheckpointError, match=message), no_larger_than("here", {}):
        torch.nn.Linear(8192, 8192)
    torch.nn.Linear(8192, 8192, device="meta")


# Tensors -----------------------------------------------------------------------------------------

WEIGHT = "backbone.blocks.0.norm1.weight"
TENSORS = {
    "meta": (torch.ones(16, device="meta"), "a tensor without values"),
    "sparse": (torch.ones(16).to_sparse(), "layout torch.sparse_coo"),
    "complex": (torch.ones(16, dtype=torch.complex64), "a tensor of torch.complex64"),
    "repeated": (torch.ones(1).expand(16), "shape (16,) with 4 bytes behind it"),
    "none": ("text", "no tensor"),
}


@pytest.mark.parametrize("kind", TENSORS)
@pytest.mark.parametrize("place", ["weights", "average"])
@pytest.mark.parametrize("make", [our_file, their_file])
def test_odd_tensors(tmp_path, make, place, kind):
    value, message = TENSORS[kind]

    def change(content):
        if place == "weights":
            content["state_dict"][WEIGHT] = value
        else:
            content["ema"]["shadow_params"][5] = value

    text = refusal(make(tmp_path / "a.ckpt", change=change))
    assert message in text or (kind == "none" and "shape ()" in text)


@pytest.mark.parametrize("decay", [float("nan"), 7, -0.1, 1.0, "much", None])
@pytest.mark.parametrize("make", [our_file, their_file])
def test_odd_decay(tmp_path, make, decay):
    path = make(tmp_path / "a.ckpt", change=lambda content: content["ema"].update(decay=decay))
    assert f"ema.decay={decay}: allowed 0 <= decay < 1" in refusal(path)


@pytest.mark.parametrize("interval", [[0.5], [0.9, 0.1], [float("nan"), 1.0], 3, ["a", "b"]])
def test_odd_interval(tmp_path, interval):
    path = our_file(tmp_path / "a.ckpt", lambda content: content.update(sampling_interval=interval))
    assert "sampling_interval: allowed [low, high]" in refusal(path)


# Tokenizers --------------------------------------------------------------------------------------


def broken_backend():
    """The library panics on it, which is no Exception."""
    backend = json.loads(word_tokenizer().backend_tokenizer.to_str())
    backend["normalizer"] = {"type": "Precompiled", "precompiled_charsmap": ""}
    return json.dumps(backend)


def test_a_tokenizer_that_panics(tmp_path):
    def ours(content):
        content["hyper_parameters"]["tokenizer"]["backend"] = broken_backend()

    def of_theirs(content):
        with theirs.fake_class("tokenizers", "Tokenizer") as fake:
            fake.__getstate__ = lambda self: broken_backend().encode()
            tokenizer = content["hyper_parameters"]["tokenizer"]
            whole = tokenizer.__dict__["_tokenizer"]
            tokenizer.__dict__["_tokenizer"] = theirs.filled(fake)
            torch.save(content, tmp_path / "b.ckpt")
            tokenizer.__dict__["_tokenizer"] = whole

    assert "PanicException" in refusal(our_file(tmp_path / "a.ckpt", ours))
    their_file(tmp_path / "c.ckpt", change=of_theirs)
    assert "Precompiled" in refusal(tmp_path / "b.ckpt")


def test_options_of_a_tokenizer_are_known_ones(tmp_path):
    state = tokenizer_state(word_tokenizer())
    with pytest.raises(DataError, match="allowed beside the backend"):
        tokenizer_from_state(state | {"tokenizer_file": "/etc/hostname"})


# References --------------------------------------------------------------------------------------


def test_a_text_of_references_is_counted_while_it_grows():
    tree = {"long": "x" * 50_000, "many": "${long}" * 14_000}
    tracemalloc.start()
    with pytest.raises(ValueError, match="texts of more than 100000 characters in all"):
        resolve(tree)
    assert tracemalloc.get_traced_memory()[1] < 5e6
    tracemalloc.stop()
    with pytest.raises(ValueError, match="a text of more than"):
        resolve({"long": "x" * 100_001})


@pytest.mark.parametrize("text", ["${" + "." * 99_000, "${" * 49_000, "${" + " " * 99_000])
def test_almost_references_take_no_time(text):
    start = time.process_time()
    assert resolve({"a": text}) == {"a": text}
    assert time.process_time() - start < 0.5


def doubled(levels):
    value: list = []
    for _ in range(levels):
        value = [value, value]
    return value


@pytest.mark.parametrize("key", ["global_step", "pytorch-lightning_version"])
def test_nested_values_are_not_printed(tmp_path, key):
    """As text this one has four million characters."""
    path = their_file(
        tmp_path / "a.ckpt", change=lambda content: content.update({key: doubled(20)})
    )
    if key == "global_step":
        assert "global_step=list: allowed is a count" in refusal(path)
    else:
        assert read_checkpoint(path)["provenance"]["versions"] == {"lightning": "list"}


def test_nested_keys_and_paths_are_not_printed():
    kinds = {name: made for made, name in STAND_INS}
    for content in (
        {("a",): 1},
        {"a": kinds["pathlib.PosixPath"](doubled(20))},
    ):
        config = kinds[DICT_CONFIG]()
        config.__setstate__({"_content": content})
        with pytest.raises(ValueError, match=r"a key is a (tuple|list)"):
            plain_tree(config)


def test_shown():
    assert shown("plain é") == "plain é" and shown(None) == "None" and shown(0.5) == "0.5"
    assert shown("a\n\x1b[2J") == "a\\n\\x1b[2J" and shown([1]) == "list"
    assert shown("x" * 81) == "x" * 77 + "..." and shown("x" * 80) == "x" * 80


# What torch itself would call --------------------------------------------------------------------


class Calls:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Calls(bytearray, 5_000_000), r"builtins\.bytearray"),
        (Calls(torch.FloatTensor, 5_000_000), r"torch\.FloatTensor"),
    ],
)
def test_memory_by_a_number(tmp_path, zipped, value, name):
    torch.save({"a": value}, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    assert (tmp_path / "a.ckpt").stat().st_size < 3000
    with pytest.raises(Refused, match=f"wants to load {name}; nothing was executed"):
        load_data(tmp_path / "a.ckpt")


def test_memory_by_doubling(tmp_path):
    value = Calls(codecs.encode, "x", "latin1")
    for _ in range(16):
        value = Calls(codecs.encode, value, "hex")
    torch.save({"a": value}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match="encoded as hex"):
        load_data(tmp_path / "a.ckpt")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_checkpoints_hold_passes(tmp_path, zipped):
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], fused=False)
    weight.sum().backward()
    optimizer.step()
    content = {
        "optimizer_states": [optimizer.state_dict()], "random": torch.get_rng_state(),
        "bytes": "é hex".encode(), "words": ("zip", "hex", "a"), "size": torch.Size([2]),
        "set": {1}, "dtype": torch.bfloat16, "device": torch.device("cpu"), "parameter": weight,
        "half": torch.ones(2, dtype=torch.bfloat16), "complex": 1j,
    }  # fmt: skip
    torch.save(content, tmp_path / "a.ckpt", _use_new_zipfile_serialization=zipped)
    found = load_data(tmp_path / "a.ckpt")
    assert found["bytes"] == content["bytes"] and found["words"] == content["words"]
    assert found["optimizer_states"][0]["state"][0]["step"] == 1
