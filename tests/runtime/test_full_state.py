"""A full state comes back as it was; torn copies, foreign files and attacks are refused."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime.checkpoint import read_checkpoint
from runtime.errors import CheckpointError
from runtime.full_state import (
    check_whole,
    folder_name,
    full_states,
    is_full_state,
    read_full_state,
    step_of,
    write_full_state,
)
from runtime.parts import META
from tests.support import equal
from tests.test_hostile_checkpoints import Payload

FILES = ("model.pt", "optimizer.pt", "scheduler.pt", "eval_batches.pt", "rng_rank0.pt",
         "rng_rank1.pt", "ema.pt", "trainer.pt")  # fmt: skip


def checkpoint(step: int = 7, tensors: int = 3, **more) -> dict:
    """As much of a checkpoint of ours as reading checks; every number in it is the step."""
    weights = {f"w{n}": torch.full((50, 20), float(step)) for n in range(tensors)}
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3) * step}}}],
        "lr_schedulers": [{"last_epoch": step}],
        "eval_batches": [{"input_ids": torch.full((2, 3), step)}],
        "random_states": [{"torch": torch.arange(step)}, {"torch": torch.arange(step + 1)}],
        "ema": {"decay": 0.9, "num_updates": step, "shadow_params": [torch.ones(2) * step]},
        "global_step": step,
        "hyper_parameters": {"config": {"algo": {"name": "mdlm"}}},
        "provenance": {"git": None, "config_hash": "0" * 16},
        "callbacks": {"BestAndLast": {"best_score": 1.5}},
        **more,
    }


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "checkpoint-00000007-20260501_081812"
    write_full_state(checkpoint(), path)
    return path


def test_comes_back_as_it_was(folder):
    assert sorted(file.name for file in folder.iterdir()) == sorted((*FILES, META))
    assert equal(read_full_state(folder), checkpoint())
    assert equal(read_checkpoint(folder), read_full_state(folder))
    meta = check_whole(folder)
    assert (meta["step"], meta["world_size"], meta["ties"]) == (7, 2, {})
    assert meta["provenance"] == checkpoint()["provenance"]


def test_may_be_renamed_and_read_the_other_way_round(folder):
    plain = checkpoint(ema=None)
    del plain["random_states"], plain["eval_batches"]
    write_full_state(plain, folder.with_name("mine"))
    assert is_full_state(folder.with_name("mine"))
    assert equal(read_full_state(folder.with_name("mine")), {**plain, "eval_batches": []})
    names = {file.name for file in folder.with_name("mine").iterdir()}
    assert names == {*FILES, META} - {"rng_rank0.pt", "rng_rank1.pt", "ema.pt"}


def test_names(tmp_path):
    assert step_of(Path(folder_name(8706))) == 8706
    assert step_of(Path("a/checkpoint-00008706-20260501_081812")) == 8706
    for other in ("checkpoint-8706-20260501_081812", "checkpoint-00008706", "last.ckpt",
                  ".checkpoint-00008706-20260501_081812.part"):  # fmt: skip
        assert step_of(Path(other)) is None
        (tmp_path / other).mkdir()
        assert not is_full_state(tmp_path / other)
    names = [
        "checkpoint-00000009-20270101_000000",
        "checkpoint-00000010-20260101_000000",
        "checkpoint-00000010-20260101_000001",
        "checkpoint-100000000-20250101_000000",
    ]
    for name in reversed(names):
        (tmp_path / name).mkdir()
    assert [path.name for path in full_states(tmp_path)] == names


def test_tied_weights_are_stored_once_and_tied_again(tmp_path):
    table = torch.randn(1000, 64)
    state = {"embed": table, "head": table, "row": torch.randn(10_000, 10)[3]}
    write_full_state(checkpoint(state_dict=state), tmp_path / "tied")
    apart = {"embed": table, "head": table.clone(), "row": state["row"].clone()}
    write_full_state(checkpoint(state_dict=apart), tmp_path / "apart")
    one, two = ((tmp_path / name / "model.pt").stat().st_size for name in ("tied", "apart"))
    assert table.nbytes < one < table.nbytes + 5_000 and one + table.nbytes < two + 1_000
    assert check_whole(tmp_path / "tied")["ties"] == {"head": "embed"}
    found = read_full_state(tmp_path / "tied")["state_dict"]
    assert equal(found, state)
    found["head"][0] = 5.0
    assert torch.equal(found["embed"], found["head"])
    assert check_whole(tmp_path / "apart")["ties"] == {}


def refused(path: Path) -> str:
    """The one line that reading says; the same wherever a checkpoint is read."""
    with pytest.raises(CheckpointError) as error:
        read_full_state(path)
    message = str(error.value)
    assert message.startswith(str(path)) and "\n" not in message
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(error.value) == message
    return message


@pytest.mark.parametrize("name", FILES)
def test_every_file_is_verified(folder, tmp_path, name):
    other = tmp_path / "other"
    write_full_state(checkpoint(8), other)
    path, whole = folder / name, (folder / name).read_bytes()
    path.write_bytes(whole[:-1])
    assert f"{name}: truncated, has {len(whole) - 1} bytes of {len(whole)}" in refused(folder)
    path.write_bytes(whole + b"0")
    assert f"{name}: foreign, has" in refused(folder)
    middle = len(whole) // 2
    path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    assert f"{name}: changed or foreign, its sha256 is another one" in refused(folder)
    shutil.copy(other / name, path)
    assert f"{path}: " in refused(folder)
    path.unlink()
    assert f"{path}: missing, but listed in meta.json" in refused(folder)
    path.write_bytes(whole)
    assert read_full_state(folder)["global_step"] == 7


def test_more_files_than_were_saved(folder):
    (folder / "README.md").write_text("a card")
    assert read_full_state(folder)["global_step"] == 7
    shutil.copy(folder / "rng_rank1.pt", folder / "rng_rank2.pt")
    assert f"{folder / 'rng_rank2.pt'}: foreign, not listed in meta.json" in refused(folder)


def rewrite(folder: Path, change: Callable[[dict], object]) -> None:
    meta = json.loads((folder / META).read_text())
    change(meta)
    (folder / META).write_text(json.dumps(meta))


def test_a_folder_without_meta(folder):
    (folder / META).unlink()
    assert is_full_state(folder) and "missing, so the folder is not whole" in refused(folder)
    (folder / META).write_text('{"format": 1, ')
    assert "meta.json: damaged" in refused(folder)
    (folder / META).write_text("[" * 100_000)
    assert "meta.json: damaged" in refused(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda m: m.update(format=2), "format=2; allowed: 1"),
        (lambda m: m.update(step=-1), "step=-1; allowed: a count"),
        (lambda m: m.update(step=8), "step=8; allowed: 7, as the folder is named"),
        (lambda m: m.update(world_size=10**9), "world_size=1000000000; allowed: at most"),
        (lambda m: m.update(world_size=1), "files has also rng_rank1.pt; allowed: those of 1"),
        (lambda m: m.update(files=5), "files=5; allowed: {name: {bytes, sha256}}"),
        (lambda m: m["files"].update(a=1), "files=dict; allowed"),
        (lambda m: m["files"].pop("ema.pt"), "ema.pt: foreign, not listed"),
        (lambda m: m["files"].pop("model.pt"), "files lacks model.pt; allowed: those of 2 ranks"),
        (lambda m: m["files"].update({"../x.pt": m["files"]["ema.pt"]}), "files=dict; allowed"),
        (lambda m: m["files"].update({"x.pt": m["files"]["ema.pt"]}), "files has also x.pt"),
        (lambda m: m.update(ties={"w0": "w1"}), "model.pt: other tensors are tied"),
    ],
)
def test_a_meta_that_says_something_else(folder, change, says):
    rewrite(folder, change)
    assert says in refused(folder)


def replaced(folder: Path, name: str, content: object) -> None:
    """Put another content into a file, and say so in meta.json as its maker would."""
    torch.save(content, folder / name)
    data = (folder / name).read_bytes()
    facts = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    rewrite(folder, lambda meta: meta["files"].update({name: facts}))


@pytest.mark.parametrize("name", FILES)
def test_hostile_files_run_nothing(folder, tmp_path, name):
    replaced(folder, name, [Payload(tmp_path / "canary")])
    assert "nothing was executed" in refused(folder)
    assert not (tmp_path / "canary").exists()
    torch.load(folder / name, weights_only=False)
    assert (tmp_path / "canary").exists(), "it would have run"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("model.pt", [1], "model.pt: holds list; allowed: dict"),
        ("model.pt", {"w": 5}, "state_dict.w: no tensor"),
        ("model.pt", {"w": torch.zeros(1).expand(10**9)}, "bytes behind it"),
        ("optimizer.pt", {}, "optimizer.pt: holds dict; allowed: list"),
        ("eval_batches.pt", [5], "eval_batches.pt: allowed are dicts of tensors"),
        ("ema.pt", {"decay": 2.0, "shadow_params": [], "num_updates": 1}, "ema.decay=2.0"),
        ("trainer.pt", {}, "trainer.pt: global_step=None; allowed: 7, as in meta.json"),
    ],
)
def test_parts_of_another_form(folder, name, content, says):
    replaced(folder, name, content)
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(folder)
    assert says in str(error.value) and "\n" not in str(error.value)


def test_an_instantiator_is_refused(folder, tmp_path):
    evil = {"_instantiator": "os.system", "command": f"touch {tmp_path / 'canary'}"}
    rest = torch.load(folder / "trainer.pt", weights_only=True)
    replaced(folder, "trainer.pt", {**rest, "hyper_parameters": evil})
    with pytest.raises(CheckpointError, match="_instantiator names code to run"):
        read_checkpoint(folder)


def test_weights_alone_are_no_full_state(tmp_path):
    with pytest.raises(CheckpointError, match="no optimizer_states, lr_schedulers to save"):
        write_full_state({"state_dict": {}, "global_step": 1}, tmp_path / "x")
    with pytest.raises(TypeError):
        write_full_state(checkpoint(provenance={"a": {1, 2}}), tmp_path / "x")
    assert not list(tmp_path.iterdir())
