"""PyDocs and text files: what they read, how they split, and what they say when they cannot."""

import gzip
import json
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import DataError
from data.files import expand_paths, read_lines
from data.fingerprint import unit_hash
from data.pydocs import PyDocs
from data.text import TYPES, TextFiles, read_jsonl, read_paragraphs


def texts(source, split):
    return [document["text"] for document in source.documents(split)]


def test_pydocs_is_english_split_without_overlap():
    source = PyDocs()
    paragraphs = {
        split: [p for text in texts(source, split) for p in text.split("\n\n")]
        for split in source.splits
    }
    everything = [p for part in paragraphs.values() for p in part]
    assert len(everything) == len(set(everything))
    sizes = {split: sum(map(len, part)) for split, part in paragraphs.items()}
    assert sizes["train"] > 200_000
    assert min(sizes["validation"], sizes["test"]) > 5_000
    assert not any(set(p) <= set("*=-") for p in everything)


def test_pydocs_is_the_same_every_time():
    assert texts(PyDocs(), "test") == texts(PyDocs(), "test")
    assert PyDocs().fingerprint() == PyDocs().fingerprint()
    assert PyDocs().fingerprint() != PyDocs(test_fraction=0.2).fingerprint()


def test_unknown_split_is_named():
    with pytest.raises(DataError, match="'pydocs' has no split 'dev'"):
        next(PyDocs().documents("dev"))


@given(st.text())
def test_unit_hash_lies_in_the_unit_interval(text):
    assert 0 <= unit_hash(text) < 1
    assert unit_hash(text) == unit_hash(text)


def test_plain_markdown_gzip_and_jsonl_are_read(tmp_path):
    (tmp_path / "a.txt").write_text("first\nline\n\nsecond\n")
    (tmp_path / "b.md").write_text("# Title\n")
    with gzip.open(tmp_path / "c.txt.gz", "wt") as file:
        file.write("zipped\n")
    (tmp_path / "d.jsonl").write_text('{"body": "row one"}\n\n{"body": ""}\n')
    source = TextFiles(
        [str(tmp_path / "*.txt"), str(tmp_path / "b.md"), str(tmp_path / "*.gz"),
         str(tmp_path / "d.jsonl")],
        valid_files=str(tmp_path / "b.md"),
        text_column="body",
    )  # fmt: skip
    assert texts(source, "train") == ["first\nline", "second", "# Title", "zipped", "row one", ""]
    assert texts(source, "validation") == ["# Title"]


def test_many_files_are_whole_documents(tmp_path):
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(f"{number}\n\nend\n")
    source = TextFiles(str(tmp_path / "*.txt"), valid_fraction=0.25)
    assert not source.split_paragraphs
    assert sorted(texts(source, "train") + texts(source, "validation"))[0] == "0\n\nend\n"


def test_lines_are_documents_where_there_is_one_paragraph(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("\none\ntwo\nthree\n\n")
    assert list(read_paragraphs(path)) == ["one", "two", "three"]
    path.write_text("one\ntwo\n\n\nthree")
    assert list(read_paragraphs(path)) == ["one\ntwo", "three"]


@given(st.lists(st.text("ab", min_size=1, max_size=3), min_size=30, max_size=60))
def test_hold_out_separates_texts_and_loses_none(tmp_path_factory, words):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text("\n\n".join([*words, "train", "validation"]))
    source = TextFiles(str(path))
    train, validation = texts(source, "train"), texts(source, "validation")
    assert train and validation and not set(train) & set(validation)
    assert sorted(train + validation) == sorted([*words, "train", "validation"])


def test_fingerprint_follows_content_and_options(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    before = TextFiles(str(path)).fingerprint()
    (tmp_path / "copy.txt").write_text("one\n\ntwo")
    assert TextFiles(str(tmp_path / "copy.txt")).fingerprint() == before
    assert TextFiles(str(path), valid_fraction=0.5).fingerprint() != before
    path.write_text("one\n\ntwo!")
    assert TextFiles(str(path)).fingerprint() != before


def test_home_directory_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("text")
    assert expand_paths("~/a.txt", TYPES) == [tmp_path / "a.txt"]


def test_a_name_with_brackets_is_a_path_before_it_is_a_pattern(tmp_path):
    (tmp_path / "a[1].txt").write_text("text")
    assert expand_paths(str(tmp_path / "a[1].txt"), TYPES) == [tmp_path / "a[1].txt"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"a\.txt: the file is empty"),
        ("a.pdf", b"x", r"a\.pdf: unknown type; allowed are \.txt, \.md and \.jsonl"),
        ("a.txt", b"ok\n\nno \xff", r"a\.txt: not UTF-8 at line 3, byte 7"),
        ("a.txt.gz", b"no gzip", r"a\.txt\.gz: cannot be read"),
        ("a.jsonl", b'{"text": "a"}\n{"body": "b"}\n', r"a\.jsonl:2: no text under 'text' \(keys:"),
        ("a.jsonl", b'{"text": "a"}\n{oops\n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'["a"]\n', r"a\.jsonl:1: a row must be a JSON object"),
        ("a.txt", b"only one", r"a\.txt: 1 document\(s\) are too few .*; give data\.valid_files"),
        ("a.txt", b" \n", r"a\.txt: 0 document\(s\) are too few"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        texts(TextFiles(str(path)), "train")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.txt: no such file"):
        TextFiles(str(tmp_path / "nowhere.txt"))
    with pytest.raises(DataError, match=r"\*\.txt: no such file"):
        TextFiles(str(tmp_path / "*.txt"))
    with pytest.raises(DataError, match=r"data\.files is not set"):
        TextFiles(None)
    with pytest.raises(DataError, match=r"valid_fraction=1.5"):
        TextFiles("a.txt", valid_fraction=1.5)


def test_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\ntwo".encode())
    assert list(read_lines(path)) == ["one\n", "two"]


def test_jsonl_keeps_unicode(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "naïve ☕\u2028 end"}, ensure_ascii=False) + "\n")
    assert list(read_jsonl(path, "text")) == ["naïve ☕\u2028 end"]


def test_python_without_pydoc_data(monkeypatch):
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match="no pydoc_data; use data=text"):
        PyDocs().fingerprint()
