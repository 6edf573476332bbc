"""Rows that survive a kill at any byte."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.journal import Journal, encode_row
from tests.support import ROOT

ROWS = [{"id": f"r{n}", "text": "é日\n\u2028" * n, "n": n} for n in range(12)]


def write(path, rows=ROWS):
    with Journal(path) as journal:
        for row in rows:
            journal.append(row)


def test_rows_are_found_by_id(tmp_path):
    write(tmp_path / "a" / "j.jsonl")
    with Journal(tmp_path / "a" / "j.jsonl") as journal:
        assert len(journal) == 12 and "r3" in journal and "r12" not in journal
        assert [journal.read(f"r{n}") for n in (7, 0, 11)] == [ROWS[7], ROWS[0], ROWS[11]]
        journal.append({"id": "new"})
        assert journal.read("new") == {"id": "new"} and journal.read("r1") == ROWS[1]
    lines = (tmp_path / "a" / "j.jsonl").read_bytes().split(b"\n")
    assert [json.loads(line) for line in lines[:-1]] == [*ROWS, {"id": "new"}]


@given(cut=st.integers(0, 400))
def test_cut_anywhere_only_the_broken_row_is_lost(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("j") / "j.jsonl"
    write(path)
    size = path.stat().st_size
    os.truncate(path, max(0, size - cut))
    left = path.read_bytes()
    whole = left.count(b"\n")
    with Journal(path) as journal:
        assert len(journal) == whole
        assert journal.repaired == (left != b"" and not left.endswith(b"\n"))
        for row in ROWS[whole:]:
            journal.append(row)
        assert [journal.read(row["id"]) for row in ROWS] == ROWS
    expected = b"".join(map(encode_row, ROWS))
    assert path.read_bytes() == expected


def test_a_long_broken_line_is_cut_off(tmp_path):
    path = tmp_path / "j.jsonl"
    write(path)
    good = path.read_bytes()
    path.write_bytes(good + b'{"id": "' + b"x" * 200_000)
    with Journal(path) as journal:
        assert journal.repaired and len(journal) == 12
    assert path.read_bytes() == good
    path.write_bytes(b"x" * 200_000)
    with Journal(path) as journal:
        assert journal.repaired and len(journal) == 0


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b"{]\n", "no row with an id"),
        (b"[1]\n", "no row with an id"),
        (b'{"id": 3}\n', "no row with an id"),
        (b"\xff\n", "no row with an id"),
        (b'{"id": "r1"}\n', "row 'r1' again"),
    ],
)
def test_a_damaged_middle_is_named(tmp_path, line, problem):
    path = tmp_path / "j.jsonl"
    write(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:4], line, *lines[4:]]))
    with pytest.raises(DataError, match=rf"j\.jsonl:\d+: {problem}; remove the line"):
        Journal(path)


def test_what_is_no_file_is_named(tmp_path):
    with pytest.raises(DataError, match=rf"{tmp_path}: cannot be opened .*directory.*; allowed: "):
        Journal(tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"file/j\.jsonl: cannot be opened .*; allowed: the path"):
        Journal(tmp_path / "file" / "j.jsonl")


def test_an_id_comes_once(tmp_path):
    with Journal(tmp_path / "j.jsonl") as journal:
        journal.append({"id": "a"})
        with pytest.raises(DataError, match="row 'a' would be there twice"):
            journal.append({"id": "a"})
        assert len(journal) == 1


def test_half_a_surrogate_pair_is_kept(tmp_path):
    row = {"id": "a\ud800", "text": "\udfff"}
    write(tmp_path / "j.jsonl", [row])
    assert (tmp_path / "j.jsonl").read_bytes().decode()
    with Journal(tmp_path / "j.jsonl") as journal:
        assert journal.read("a\ud800") == row


def test_a_killed_process_leaves_every_row_it_appended(tmp_path):
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom data.journal import Journal\n"
        "journal = Journal(Path(sys.argv[1]))\n"
        "for n in range(5): journal.append({'id': str(n), 'text': 'x' * 50})\n"
        "print('ready', flush=True)\ntime.sleep(60)\n"
    )
    path = tmp_path / "j.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.readline() == b"ready\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    with Journal(path) as journal:
        assert [str(n) in journal for n in range(5)] == [True] * 5


def test_rows_come_to_disk_every_so_often(tmp_path, monkeypatch):
    synced = []
    real = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(fd), real(fd)))
    with Journal(tmp_path / "a.jsonl", sync_rows=4, sync_seconds=1e9) as journal:
        for n in range(10):
            journal.append({"id": str(n)})
        assert len(synced) == 2
    assert len(synced) == 3
    with Journal(tmp_path / "b.jsonl", sync_rows=1000, sync_seconds=0.05) as journal:
        journal.append({"id": "a"})
        before = len(synced)
        time.sleep(0.06)
        journal.append({"id": "b"})
        assert len(synced) == before + 1
