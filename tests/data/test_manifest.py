"""The frame of the data tools: outputs that appear together, are kept, and balance."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.manifest import MANIFEST, Plan, Tally, finished, perform, read_files, row_files

ROW = '{"id": "1", "source": "s", "prompt": "p"}\n'


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "in" / "a.jsonl"
    path.parent.mkdir()
    path.write_text(ROW)
    return path


def plan(tmp_path, rows, **options):
    return Plan("toy", tmp_path / "out", ("a.txt", "b.txt"), {"mode.input": [rows]}, options)


def work(files):
    files["a.txt"].write(b"one\ntwo\n")
    files["b.txt"].write_row({"k": "é"})
    return {"said": 1}


def never(files):
    raise AssertionError("done again")


def test_a_manifest_says_what_was_made(tmp_path, rows):
    manifest = perform(plan(tmp_path, rows, n=1), work)
    stored = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest == stored | {"reused": False} and stored["said"] == 1
    digest = hashlib.sha256(ROW.encode()).hexdigest()
    assert stored["inputs"] == {"mode.input": [{"path": str(rows), "sha256": digest}]}
    made = (tmp_path / "out" / "a.txt").read_bytes()
    assert stored["outputs"]["a.txt"] == {
        "sha256": hashlib.sha256(made).hexdigest(),
        "lines": 2,
    }
    assert (tmp_path / "out" / "b.txt").read_text() == '{"k": "é"}\n'


def test_the_same_is_not_done_twice(tmp_path, rows):
    first = perform(plan(tmp_path, rows, n=1), work)
    again = perform(plan(tmp_path, rows, n=1), never)
    assert again == first | {"reused": True}
    # A copy of the input elsewhere is the same input.
    copy = rows.with_name("copy.jsonl")
    copy.write_bytes(rows.read_bytes())
    assert perform(plan(tmp_path, copy, n=1), never)["reused"]


@pytest.mark.parametrize("spoil", ["option", "input", "output", "missing", "manifest", "odd"])
def test_what_differs_is_done_again(tmp_path, rows, spoil):
    perform(plan(tmp_path, rows, n=1), work)
    out = tmp_path / "out"
    if spoil == "input":
        rows.write_text(ROW + ROW)
    elif spoil == "output":
        (out / "a.txt").write_text("other")
    elif spoil == "missing":
        (out / "a.txt").unlink()
    elif spoil in ("manifest", "odd"):
        (out / MANIFEST).write_text("{" if spoil == "manifest" else "[1]")
    asked = plan(tmp_path, rows, n=2 if spoil == "option" else 1)
    assert finished(asked) is None
    assert not perform(asked, work)["reused"]
    assert (out / "a.txt").read_text() == "one\ntwo\n"


def test_a_failure_leaves_nothing_half_done(tmp_path, rows):
    def fails(files):
        files["a.txt"].write(b"half")
        raise DataError("bad row")

    with pytest.raises(DataError, match="bad row"):
        perform(plan(tmp_path, rows), fails)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [f"{MANIFEST}.lock"]


def test_a_failure_keeps_the_earlier_outputs(tmp_path, rows):
    perform(plan(tmp_path, rows, n=1), work)
    with pytest.raises(AssertionError):
        perform(plan(tmp_path, rows, n=2), never)
    assert perform(plan(tmp_path, rows, n=1), never)["reused"]


def test_an_input_is_never_overwritten(tmp_path, rows):
    asked = Plan("toy", rows.parent, ("a.jsonl",), {"mode.input": [rows]})
    with pytest.raises(DataError, match=r"mode\.output=.*would overwrite .*a\.jsonl of mode\.in"):
        perform(asked, work)
    assert rows.read_text() == ROW


@given(st.lists(st.tuples(st.sampled_from("ab"), st.sampled_from(["kept", "x", "y"]))))
def test_sums_balance(events):
    tally = Tally()
    for source, fate in events:
        tally.keep(source) if fate == "kept" else tally.remove(source, fate)
    counts = tally.as_dict()
    assert sum(counts["in"].values()) == len(events)
    for source, came in counts["in"].items():
        removed = sum(by_source.get(source, 0) for by_source in counts["removed"].values())
        assert came == counts["out"].get(source, 0) + removed


def test_a_lost_row_is_noticed():
    tally = Tally()
    tally.came["a"] += 1
    with pytest.raises(AssertionError, match="accounted"):
        tally.as_dict()


def test_a_file_counts_once_whatever_it_is_called(tmp_path, rows, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link.jsonl").symlink_to(rows)
    other = tmp_path / "b.jsonl"
    other.write_text(ROW)
    names = ["in/a.jsonl", str(rows), "in/../in/*.jsonl", "link.jsonl", "b.jsonl"]
    found = row_files(names, "mode.input")
    assert [path.resolve() for path in found] == [rows, other]


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, r"mode\.x: .*: no such file"), ("", r"mode\.x: .*the file is empty")],
)
def test_files_that_are_not_there(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        row_files(str(path), "mode.x")


def test_another_type_and_a_file_without_rows(tmp_path):
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(DataError, match=r"mode\.x: .*x\.csv: unknown type"):
        row_files(str(tmp_path / "x.csv"), "mode.x")
    blank = tmp_path / "x.jsonl"
    blank.write_text("\n\n")
    with pytest.raises(DataError, match=r"mode\.x=.*x\.jsonl: no rows there"):
        list(read_files([blank], "mode.x"))
