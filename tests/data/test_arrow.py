"""The token cache: round trips, and every way a file can be wrong."""

import errno
import multiprocessing
import os
import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data import arrow
from data.arrow import Rows, cache_path, open_or_build, regroup
from data.blocks import IDS, LENGTH, PackingReport
from data.errors import DataError

KEY = {"source": "toy", "split": "train", "length": 4, "wrap": True, "content": "abc"}


def block(rows, vocab_size=100, seed=0):
    ids = np.random.default_rng(seed).integers(0, vocab_size, (rows, 4), dtype=np.uint32)
    return {
        IDS: ids,
        LENGTH: np.arange(rows) % 5,
        "depth": (ids % 7).astype(np.int16) - 3,
    }


def build(folder, content, vocab_size=100, key=KEY):
    def blocks(report):
        for part in content:
            report.rows += len(part[IDS])
            yield part

    return open_or_build(cache_path(folder, key), key, vocab_size, blocks)


@given(st.lists(st.integers(0, 7), max_size=4), st.sampled_from([100, 256, 257, 70_000]))
def test_round_trip_in_the_smallest_integers(tmp_path_factory, sizes, vocab_size):
    content = [block(size, vocab_size, seed) for seed, size in enumerate(sizes)]
    rows = build(tmp_path_factory.mktemp("cache"), content, vocab_size)
    assert len(rows) == sum(sizes)
    if len(rows):
        whole = {name: np.concatenate([part[name] for part in content]) for name in content[0]}
        order = np.random.default_rng(0).permutation(len(rows))
        taken = rows.take(order)
        for name, column in whole.items():
            assert np.array_equal(taken[name], column[order])
        assert taken[IDS].itemsize == {100: 1, 256: 1, 257: 2, 70_000: 4}[vocab_size]
        assert taken[LENGTH].dtype == np.uint8


def test_rows_span_record_batches(tmp_path, monkeypatch):
    monkeypatch.setattr(arrow, "_BYTES_PER_BATCH", 3 * 4 * 4)
    content = block(11)
    rows = build(tmp_path, [content])
    assert pa.ipc.open_file(str(rows.path)).num_record_batches == 5
    order = np.array([10, 0, 3, 3, 8, 2])
    assert np.array_equal(rows.take(order)[IDS], content[IDS][order])
    joined = np.concatenate([part[IDS] for part in rows.blocks(limit=7)])
    assert np.array_equal(joined, content[IDS][:7])
    with pytest.raises(IndexError, match=r"rows 0..11 of 11"):
        rows.take(np.array([0, 11]))


def test_second_opening_does_not_build(tmp_path):
    first = build(tmp_path, [block(3)])
    second = open_or_build(first.path, KEY, 100, lambda report: pytest.fail("built again"))
    assert second.report == first.report == PackingReport(rows=3)
    assert second.names == (IDS, LENGTH, "depth")


def test_reading_is_memory_mapped(tmp_path):
    rows = build(tmp_path, [block(3)])
    (part,) = rows.blocks()
    assert not part[IDS].flags.owndata and not part[IDS].flags.writeable


def test_pickle_carries_the_path_only(tmp_path):
    rows = build(tmp_path, [block(1000)])
    copy = pickle.loads(pickle.dumps(rows))
    assert len(pickle.dumps(rows)) < 1000
    assert np.array_equal(copy.take(np.arange(9))[IDS], rows.take(np.arange(9))[IDS])


def test_name_tells_what_is_inside(tmp_path):
    name = cache_path(tmp_path, KEY).name
    assert name.startswith("toy-train-L4-wrap-") and name.endswith(".arrow")
    assert name != cache_path(tmp_path, KEY | {"content": "other"}).name


def test_truncation_anywhere_is_found(tmp_path):
    path = build(tmp_path, [block(3)]).path
    whole = path.read_bytes()
    for size in range(0, len(whole), 7):
        path.write_bytes(whole[:size])
        with pytest.raises(DataError, match=rf"{path.name}: .*; delete it and run again"):
            Rows(path, KEY)


def test_any_changed_bit_is_found(tmp_path):
    path = build(tmp_path, [block(3)]).path
    whole = path.read_bytes()
    for place in range(0, len(whole), 3):
        changed = bytearray(whole)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        with pytest.raises(DataError, match=rf"{path.name}: .*damaged.*; delete it and run again"):
            Rows(path, KEY)


def test_other_arrow_readers_read_the_file(tmp_path):
    content = block(3)
    table = pa.ipc.open_file(str(build(tmp_path, [content]).path)).read_all()
    assert table.column(IDS).to_pylist() == content[IDS].tolist()
    table.validate(full=True)


def test_foreign_files_are_refused(tmp_path):
    path = tmp_path / "rows.arrow"
    batch = pa.record_batch({IDS: pa.array([1])})
    with pa.ipc.new_file(str(path), batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(DataError, match=r"foreign .*; delete it"):
        Rows(path)
    with path.open("r+b") as file:
        arrow.seal(file)
    with pytest.raises(DataError, match="no token cache of this format; delete it"):
        Rows(path)
    other = build(tmp_path, [block(3)], key=KEY | {"content": "other"}).path
    os.replace(other, cache_path(tmp_path, KEY))
    with pytest.raises(DataError, match="holds other data than its name says; delete it"):
        build(tmp_path, [])


def test_full_disk_leaves_nothing(tmp_path, monkeypatch):
    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    message = r"toy-train.*\.arrow: disk full, more than \d+ bytes needed; .*paths\.cache_dir"
    with pytest.raises(DataError, match=message):
        build(tmp_path, [block(3)])
    assert {path.suffix for path in (tmp_path / "rows").iterdir()} <= {".lock"}


def test_failing_build_leaves_nothing(tmp_path):
    def broken(report):
        yield block(2)
        raise DataError("document 7: bad")

    with pytest.raises(DataError, match="document 7: bad"):
        open_or_build(cache_path(tmp_path, KEY), KEY, 100, broken)
    assert {path.suffix for path in (tmp_path / "rows").iterdir()} <= {".lock"}


def test_remains_of_a_killed_writer_are_removed(tmp_path):
    path = cache_path(tmp_path, KEY)
    path.parent.mkdir()
    stale = path.with_name(f".{path.name}.1.tmp")
    stale.write_text("half")
    build(tmp_path, [block(1)])
    assert not stale.exists()


def test_unusable_folder_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be written .*; set paths\.cache_dir"):
        build(tmp_path / "file", [block(1)])


def _build_in_process(folder, queue):
    def blocks(report):
        queue.put(os.getpid())
        report.rows += 3
        yield block(3)

    open_or_build(cache_path(folder, KEY), KEY, 100, blocks)


def test_of_several_processes_one_builds(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    workers = [context.Process(target=_build_in_process, args=(tmp_path, queue)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(30)
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    assert isinstance(queue.get(timeout=5), int) and queue.empty()


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(1, 5))
def test_regroup_keeps_rows_and_order(sizes, size):
    content = [block(count, seed=seed) for seed, count in enumerate(sizes)]
    groups = [group[IDS] for group in regroup(content, size)]
    total = sum(sizes)
    assert [len(group) for group in groups] == [size] * (total // size) + [total % size] * (
        total % size > 0
    )
    if total:
        whole = np.concatenate([part[IDS] for part in content])
        assert np.array_equal(np.concatenate(groups), whole)
