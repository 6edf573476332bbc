"""A full state comes back as it was, or not at all: kills, torn copies, full disks, attacks."""

import errno
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime import parts
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
from runtime.parts import META, remove_parts, remove_unfinished
from tests.support import equal
from tests.test_bad_input import files_no_larger_than
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


# What the disk does ------------------------------------------------------------------------------


def test_files_are_on_the_disk_before_the_name_is(folder, monkeypatch):
    """Data of all files, then the names in the folder, then its own name."""
    events, sync, rename = [], os.fsync, Path.rename

    def fsync(descriptor: int) -> None:
        events.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        sync(descriptor)

    def renamed(self: Path, target: Path) -> Path:
        events.append("rename")
        return rename(self, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "rename", renamed)
    place = folder.with_name("checkpoint-00000008-20260501_081813")
    write_full_state(checkpoint(8), place)
    assert sorted(events[:8]) == sorted(FILES)
    assert events[8:] == [META, f".{place.name}.part", "rename", folder.parent.name]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(folder):
    before, place = read_full_state(folder), folder.with_name("checkpoint-00000009-20260501_081814")
    for size in (100, 2_000, 10_000):
        with files_no_larger_than(size), pytest.raises(CheckpointError) as error:
            write_full_state(checkpoint(9), place)
        said = f"{place}: cannot be written (File too large); what was there before is unharmed"
        assert str(error.value).startswith(said) and "\n" not in str(error.value)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert equal(read_full_state(folder), before)
    write_full_state(checkpoint(9), place)
    assert read_full_state(place)["global_step"] == 9


@pytest.mark.parametrize("call", range(10))
def test_a_refusal_at_any_flush(folder, monkeypatch, call):
    count, sync = iter(range(100)), os.fsync

    def fsync(descriptor: int) -> None:
        if next(count) == call:
            raise OSError(errno.ENOSPC, "No space left on device")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    place = folder.with_name("checkpoint-00000009-20260501_081814")
    with pytest.raises(CheckpointError, match=r"cannot be written .No space left on device."):
        write_full_state(checkpoint(9), place)
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]


def test_what_exists_is_not_overwritten(folder):
    with pytest.raises(CheckpointError, match=r"cannot be written .exists already."):
        write_full_state(checkpoint(9), folder)
    assert read_full_state(folder)["global_step"] == 7
    (folder.parent / "file").write_text("text")
    with pytest.raises(CheckpointError, match="file/x: cannot be written"):
        write_full_state(checkpoint(9), folder.parent / "file" / "x")


def test_weights_alone_are_no_full_state(tmp_path):
    with pytest.raises(CheckpointError, match="no optimizer_states, lr_schedulers to save"):
        write_full_state({"state_dict": {}, "global_step": 1}, tmp_path / "x")
    with pytest.raises(TypeError):
        write_full_state(checkpoint(provenance={"a": {1, 2}}), tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_deleting(folder):
    remove_parts(folder)
    assert not list(folder.parent.iterdir())
    with pytest.raises(CheckpointError, match="cannot be deleted"):
        remove_parts(folder)


# SIGKILL -----------------------------------------------------------------------------------------


def in_fork(job: Callable[..., object], *arguments: object) -> multiprocessing.Process:
    def run() -> None:
        torch.set_num_threads(1)  # the threads of the parent do not exist here
        job(*arguments)
        os._exit(0)

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    return process


def all_whole(directory: Path, newest: int = 10_000) -> list[int]:
    """The steps of the newest folders there, after each of them was read and compared."""
    steps = []
    for path in full_states(directory)[-newest:]:
        content = read_full_state(path)
        steps.append(content["global_step"])
        assert equal(content, checkpoint(steps[-1]))
    return steps


def die_at(call: int, place: Path) -> None:
    """Save, with SIGKILL just before the `call`th time that something is asked of the disk."""
    count = iter(range(1000))

    def dying(function: Callable) -> Callable:
        def wrapped(*arguments: object, **options: object) -> object:
            if next(count) == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return wrapped

    os.fsync = dying(os.fsync)
    for name in ("open", "rename", "mkdir"):
        setattr(Path, name, dying(getattr(Path, name)))
    write_full_state(checkpoint(8), place)


def test_a_kill_before_any_step_of_a_save_leaves_nothing_or_everything(folder):
    place = folder.with_name("checkpoint-00000008-20260501_081813")
    states, call = [], 0
    while True:
        process = in_fork(die_at, call, place)
        process.join()
        states.append(tuple(all_whole(folder.parent)))
        assert remove_unfinished(folder.parent, "checkpoint-*") <= 1
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        if place.exists():
            remove_parts(place)
        call += 1
    # mkdir twice; open and flush of nine files; the folder, the new name, the folder above.
    assert len(states) == 2 + 2 * 9 + 1 + 1 + 1 + 1
    assert states == [(7,)] * (len(states) - 2) + [(7, 8)] * 2


def delete_and_die(folder: Path, files: int) -> None:
    """Delete a folder, with SIGKILL after so many of its files."""
    unlink, count = os.unlink, iter(range(100))

    def dying(*arguments: object, **options: object) -> None:
        if next(count) == files:
            os.kill(os.getpid(), signal.SIGKILL)
        unlink(*arguments, **options)

    os.unlink = dying
    remove_parts(folder)


@pytest.mark.parametrize("files", [0, 3])
def test_a_kill_while_one_is_deleted_leaves_no_half_of_it(folder, files):
    in_fork(delete_and_die, folder, files).join()
    assert not full_states(folder.parent)
    assert remove_unfinished(folder.parent, "checkpoint-*") == 1
    assert not list(folder.parent.iterdir())


def kill_repeatedly(directory: Path, times: int) -> tuple[list[int], int]:
    """Save folder after folder slowly, be killed anywhere, go on; returns steps and torn writes."""
    draw, torn = random.Random(0), 0

    def save_on(first: int) -> None:
        sync = os.fsync
        os.fsync = lambda descriptor: (time.sleep(0.002), sync(descriptor))
        for step in range(first, 10_000):
            write_full_state(checkpoint(step), directory / folder_name(step))

    for _ in range(times):
        first = max(all_whole(directory, newest=3), default=-1) + 1
        process = in_fork(save_on, first)
        time.sleep(draw.uniform(0.02, 0.15))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += remove_unfinished(directory, "checkpoint-*")
    return all_whole(directory), torn


def check_kills(directory: Path, times: int) -> None:
    directory.mkdir()
    steps, torn = kill_repeatedly(directory, times)
    assert steps == list(range(len(steps))) and len(steps) > times / 4, "saves went through"
    assert torn > times / 2, "kills hit a save"
    assert all(is_full_state(path) for path in directory.iterdir())


def test_kills_at_random(tmp_path):
    check_kills(tmp_path / "run", 8)


@pytest.mark.slow
def test_many_kills_at_random(tmp_path):
    check_kills(tmp_path / "run", 100)


def test_the_digest_of_a_file_is_taken_once(folder, monkeypatch):
    check_whole(folder)
    monkeypatch.setattr(parts.hashlib, "file_digest", lambda *a: pytest.fail("read again"))
    check_whole(folder)
