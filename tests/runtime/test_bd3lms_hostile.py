"""A checkpoint of bd3lms may mention some foreign names; nothing that they stand for is run."""

import builtins
import collections
import io
import os
import pickle
import subprocess
import zipfile

import pytest
import torch
from omegaconf import OmegaConf
from omegaconf.dictconfig import DictConfig

from diffusion import Diffusion
from runtime.bd3lms.records import MENTIONED, STAND_INS, Record
from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError
from runtime.safe_load import load_data
from tests import bd3lms_format as theirs
from tests.small import word_tokenizer


class Calls:
    """An object that a pickle builds by calling `function`."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Configuration(DictConfig):
    """A subclass whose state, when it is set, touches a file."""

    def __setstate__(self, state):
        subprocess.run(["touch", str(state["_content"]["canary"])], check=True)


class Filled:
    """Built by a harmless call, then filled with a state that is a call."""

    def __init__(self, kind, state):
        self.kind, self.state = kind, state

    def __reduce__(self):
        return self.kind, (), self.state


def touch(canary):
    return Calls(os.system, f"touch {canary}")


PAYLOADS = {
    "os.system": (touch, r"(posix|nt)\.system"),
    "eval": (
        lambda canary: Calls(builtins.eval, f"open({str(canary)!r}, 'w')"),
        r"wants to load builtins\.eval;",
    ),
    "getattr": (
        lambda canary: Calls(getattr, touch(canary), "name"),
        r"wants to load (builtins\.getattr|posix\.system)",
    ),
    "subclass": (
        lambda canary: Configuration({"canary": str(canary)}),
        r"wants to load ([\w.]+\.)?test_bd3lms_hostile\.Configuration;",
    ),
    "state": (
        lambda canary: Filled(collections.OrderedDict, {"x": touch(canary)}),
        r"(posix|nt)\.system",
    ),
    "defaultdict": (
        lambda canary: Calls(collections.defaultdict, os.getcwd),
        r"(posix|nt)\.getcwd",
    ),
}


def in_config(content, payload):
    cfg = theirs.config()
    cfg._content["algo"]._content["name"]._val = payload
    content["hyper_parameters"]["config"] = cfg


def in_tokenizer(content, payload):
    content["hyper_parameters"]["tokenizer"].init_kwargs["extra"] = payload


def in_average(content, payload):
    content["ema"]["shadow_params"][2] = payload


def in_loops(content, payload):
    content["loops"]["fit_loop"]["hidden"] = payload


PLACES = {f.__name__: f for f in (in_config, in_tokenizer, in_average, in_loops)}


def content():
    return theirs.checkpoint(
        word_tokenizer(), theirs.weights(11, 1), theirs.weights(11, 2), theirs.config()
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_refused_by_name_and_not_run(tmp_path, place, payload):
    canary, path = tmp_path / "canary", tmp_path / "evil.ckpt"
    make, message = PAYLOADS[payload]
    evil = content()
    PLACES[place](evil, make(canary))
    torch.save(evil, path)
    for read in (read_checkpoint, Diffusion.load_from_checkpoint):
        with pytest.raises(CheckpointError, match=message) as error:
            read(path)
        text = str(error.value)
        assert text.startswith(f"{path}: refused") and "\n" not in text
        assert "nothing was executed" in text
    assert not canary.exists()


@pytest.mark.parametrize("payload", ["os.system", "eval", "subclass"])
def test_the_canary_would_sing(tmp_path, payload):
    evil = content()
    in_loops(evil, PAYLOADS[payload][0](tmp_path / "canary"))
    torch.save(evil, tmp_path / "evil.ckpt")
    torch.load(tmp_path / "evil.ckpt", weights_only=False)
    assert (tmp_path / "canary").exists()


def test_allowed_names_in_wrong_places_do_nothing(tmp_path):
    """Objects that a library would run code for, once they get their state or are asked."""
    evil = content()
    evil["loops"] = Filled(OmegaConf.create({}).__class__, {"_content": "${oc.env:HOME}"})
    evil["hyper_parameters"]["config"].seed = "${oc.env:PATH}"
    torch.save(evil, tmp_path / "a.ckpt")
    config = read_checkpoint(tmp_path / "a.ckpt")["hyper_parameters"]["config"]
    assert config["seed"] == 1  # the default: what a resolver would say is not asked for


def test_every_name_leads_to_something_inert():
    kinds = {made for made, _ in STAND_INS}
    assert {name for _, name in STAND_INS} == MENTIONED
    functions = [made for made in kinds if not isinstance(made, type)]
    assert [made(os.getcwd) for made in functions] == [{}]
    for made in kinds - set(functions):
        assert issubclass(made, Record) and not set(vars(made)) - {
            "__slots__", "__module__", "__doc__", "name", "__firstlineno__",
            "__static_attributes__",
        }  # fmt: skip


def test_the_names_are_of_configurations_and_tokenizers():
    """Inert as they are, the list is short: types of Python, and classes of three libraries."""
    modules = {name.rpartition(".")[0] for name in MENTIONED}
    roots = {module.split(".")[0] for module in modules}
    assert roots == {"builtins", "collections", "omegaconf", "pathlib", "tokenizers",
                     "transformers", "typing"}  # fmt: skip
    plain = [name for name in MENTIONED if name.startswith("builtins.")]
    assert all(isinstance(getattr(builtins, name.split(".")[1]), type) for name in plain)
    assert {name for name in MENTIONED if name.startswith(("collections.", "typing."))} == {
        "collections.defaultdict", "typing.Any",
    }  # fmt: skip


def test_the_list_is_forgotten_after_reading(tmp_path):
    torch.save(content(), tmp_path / "a.ckpt")
    before = set(torch.serialization.get_safe_globals())
    read_checkpoint(tmp_path / "a.ckpt")
    assert set(torch.serialization.get_safe_globals()) == before
    with pytest.raises(CheckpointError, match="refused"):
        load_data(tmp_path / "a.ckpt")


def test_foreign_objects_outside_of_a_bd3lms_checkpoint(tmp_path):
    """The names are for these checkpoints alone."""
    torch.save({"hyper_parameters": {"config": OmegaConf.create({})}}, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"wants to load omegaconf\.") as error:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "allowed: tensors and plain Python values" in str(error.value)


def nested(depth):
    value: list = []
    for _ in range(depth):
        value = [value, value]
    return value


def endless():
    value: list = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    "spoil",
    [
        lambda c: c["hyper_parameters"]["config"].__dict__.update(_content={"a": nested(40)}),
        lambda c: c["hyper_parameters"]["config"].__dict__.update(_content={"a": endless()}),
        lambda c: c["hyper_parameters"]["config"].__dict__.update(_content=5),
        lambda c: c["hyper_parameters"].update(config=torch.zeros(2)),
        lambda c: c["hyper_parameters"]["tokenizer"].__dict__.clear(),
        lambda c: c["hyper_parameters"]["tokenizer"].__dict__.update(_tokenizer=3),
        lambda c: c.update(state_dict=[1]),
        lambda c: c.update(state_dict={1: 2}),
        lambda c: c["state_dict"].update({"backbone.vocab_embed.embedding": torch.tensor(1.0)}),
        lambda c: c["hyper_parameters"]["config"].model.update(n_heads=0),
    ],
)
def test_nonsense_is_one_line(tmp_path, spoil):
    broken = content()
    spoil(broken)
    torch.save(broken, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError) as error:
        Diffusion.load_from_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


@pytest.mark.parametrize(
    "state", [b"{}", b"not json", b'{"added_tokens": [{"id": "x", "content": 3}]}', b"[]",
              b'{"added_tokens": [], "model": {"type": "BPE", "vocab": {"a": -1}, "merges": []}}']
)  # fmt: skip
def test_a_backend_that_is_none(tmp_path, state):
    broken = content()
    kind = "tokenizers", "Tokenizer"
    with theirs.fake_class(*kind) as fake:
        hidden = theirs.filled(fake)
        fake.__getstate__ = lambda self: state
        broken["hyper_parameters"]["tokenizer"].__dict__["_tokenizer"] = hidden
        torch.save(broken, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value)


def test_truncated(tmp_path):
    torch.save(content(), tmp_path / "a.ckpt")
    whole = (tmp_path / "a.ckpt").read_bytes()
    (tmp_path / "a.ckpt").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="damaged"):
        read_checkpoint(tmp_path / "a.ckpt")


def flipped(data, place):
    return data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :]


def test_flipped_bytes_never_run_anything(tmp_path):
    """Whatever a damaged pickle says, it is a CheckpointError or harmless data."""
    buffer = io.BytesIO()
    torch.save(content(), buffer)
    archive = zipfile.ZipFile(buffer)
    [name] = [name for name in archive.namelist() if name.endswith("data.pkl")]
    pickled = archive.read(name)
    assert len(pickle.PROTO) == 1 and pickled[:1] == pickle.PROTO
    for place in range(2, len(pickled), max(1, len(pickled) // 60)):
        with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as copy:
            for entry in archive.namelist():
                data = archive.read(entry)
                copy.writestr(entry, flipped(data, place) if entry == name else data)
        try:
            read_checkpoint(tmp_path / "a.ckpt")
        except CheckpointError as error:
            assert "\n" not in str(error)


@pytest.mark.parametrize("index", [-1, 2**40, "x", None])
def test_a_slow_vocabulary_with_nonsense(tmp_path, index):
    vocabulary = theirs.VOCABULARY
    size = len(vocabulary)
    broken = theirs.checkpoint(
        None, theirs.weights(size, 1), theirs.weights(size, 2), theirs.config()
    )
    theirs.save_with_slow_bert(tmp_path / "good.ckpt", broken)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "filled", lambda kind, **state: spoiled(kind, index, state))
        theirs.save_with_slow_bert(tmp_path / "a.ckpt", broken)
    read_checkpoint(tmp_path / "good.ckpt")
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(tmp_path / "a.ckpt")
    assert "\n" not in str(error.value)


def spoiled(kind, index, state):
    found = kind()
    found.__dict__.update(state)
    if "vocab" in state:
        found.__dict__["vocab"] = {**state["vocab"], "the": index}
    return found
