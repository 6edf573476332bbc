"""What a full disk, a refusal or SIGKILL leaves of a folder that is being written: none, or all."""

import errno
import multiprocessing
import os
import random
import signal
import stat
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from runtime import parts
from runtime.errors import CheckpointError
from runtime.full_state import (
    check_whole,
    folder_name,
    full_states,
    is_full_state,
    read_full_state,
    write_full_state,
)
from runtime.parts import META, remove_parts, remove_unfinished
from tests.runtime.test_full_state import FILES, checkpoint
from tests.support import equal
from tests.test_bad_input import files_no_larger_than


@pytest.fixture
def folder(tmp_path) -> Path:
    path = tmp_path / "checkpoint-00000007-20260501_081812"
    write_full_state(checkpoint(), path)
    return path


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


def test_a_file_system_that_cannot_flush_folders(folder, monkeypatch):
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    place = folder.with_name("checkpoint-00000009-20260501_081814")
    write_full_state(checkpoint(9), place)
    assert read_full_state(place)["global_step"] == 9


def test_what_exists_is_not_overwritten(folder):
    with pytest.raises(CheckpointError, match=r"cannot be written .exists already."):
        write_full_state(checkpoint(9), folder)
    assert read_full_state(folder)["global_step"] == 7
    (folder.parent / "file").write_text("text")
    with pytest.raises(CheckpointError, match="file/x: cannot be written"):
        write_full_state(checkpoint(9), folder.parent / "file" / "x")


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


def save_on(directory: Path, first: int) -> None:
    """Save state after state, slowly."""
    sync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(0.002), sync(descriptor))
    for step in range(first, 10_000):
        write_full_state(checkpoint(step), directory / folder_name(step))


def check_kills(directory: Path, times: int) -> None:
    """Kill the one who saves at some moment of the next states, again and again."""
    directory.mkdir()
    draw, torn = random.Random(0), 0
    for _ in range(times):
        first = max(all_whole(directory, newest=3), default=-1) + 1
        process = in_fork(save_on, directory, first)
        wanted = first + draw.randrange(3)
        while not list(directory.glob(f"*checkpoint-{wanted:08d}-*")):
            time.sleep(0.0005)
        time.sleep(draw.uniform(0.0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        torn += remove_unfinished(directory, "checkpoint-*")
    steps = all_whole(directory)
    assert steps == list(range(len(steps))) and len(steps) > times / 2, "saves went through"
    assert torn > times / 2, "kills hit a save"
    assert all(map(is_full_state, directory.iterdir()))


def test_kills_at_random(tmp_path):
    check_kills(tmp_path / "run", 8)


@pytest.mark.slow
def test_many_kills_at_random(tmp_path):
    check_kills(tmp_path / "run", 100)


def test_the_digest_of_a_file_is_taken_once(folder, monkeypatch):
    check_whole(folder)
    monkeypatch.setattr(parts.hashlib, "file_digest", lambda *a: pytest.fail("read again"))
    check_whole(folder)
