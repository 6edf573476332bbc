"""Gold trees from CoNLL-U: every word in its place, every broken sentence named."""

import gzip
import math
from pathlib import Path

import pytest

from data.blocks import PackingReport
from data.errors import DataError
from data.packing import PackingOptions, pack
from data.tokenization import load_tokenizer, special_ids
from data.treebank import Treebank, read_trees
from tests.support import ENGLISH, needs_english


def line(number, form, head, misc="_"):
    return f"{number}\t{form}\t_\tX\t_\t_\t{head}\tdep\t_\t{misc}\n"


SPLIT = (
    "# sent_id = one\n# text = They don't  see naïve 東京.\n# a comment without a value\n"
    + line(1, "They", 4)
    + line("2-3", "don't", "_")
    + line(2, "do", 4)
    + line(3, "n't", 2)
    + line(4, "see", 0)
    + line("4.1", "elided", "_")
    + line(5, "naïve", 6)
    + line(6, "東京", 4, "SpaceAfter=No")
    + line(7, ".", 4)
    + "\n"
)


def write(folder, *sentences):
    path = folder / "a.conllu"
    path.write_text("".join(sentences))
    return path


def test_words_stand_where_the_text_has_them(tmp_path):
    (document,) = read_trees(write(tmp_path, SPLIT))
    text = document["text"]
    assert text == "They don't  see naïve 東京."
    words = [text[start:end] for start, end in document["spans"]]
    assert words == ["They", "don't", "see", "naïve", "東京", "."]
    # `do` has depth 1 and `n't` depth 2: their word has the smaller one.
    assert document["features"]["depth"] == [1, 1, 0, 2, 1, 1]
    assert document["features"]["height"] == [2] * 6
    assert document["heads"] == [4, 4, 2, 0, 6, 4, 4]


def test_text_is_rebuilt_where_it_is_missing(tmp_path):
    bare = SPLIT.split("value\n")[1]
    (document,) = read_trees(write(tmp_path, "\n\n", bare))
    assert document["text"] == "They don't see naïve 東京."


def test_splits_and_files(tmp_path):
    sentences = [line(1, f"w{number}", 0) + "\n" for number in range(60)]
    path = write(tmp_path, *sentences)
    with gzip.open(tmp_path / "b.conllu.gz", "wt") as file:
        file.write(SPLIT)
    source = Treebank(str(path), valid_fraction=0.2)
    train, valid = ([d["text"] for d in source.documents(s)] for s in source.splits)
    assert sorted(train + valid) == sorted(f"w{number}" for number in range(60))
    assert 1 <= len(valid) < 30 and not set(train) & set(valid)
    given = Treebank(str(path), valid_files=str(tmp_path / "b.conllu.gz"))
    assert [d["text"] for d in given.documents("validation")] == ["They don't  see naïve 東京."]
    assert len({source.fingerprint(), given.fingerprint()}) == 2
    assert source.fingerprint() == Treebank(str(path), valid_fraction=0.2).fingerprint()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (line(1, "a", 2), r"a\.conllu:1: sentence without sent_id: word 1: head 2 of a sentence"),
        (line(1, "a", 2) + line(2, "b", 1), "its heads go in a circle"),
        (line(1, "a", 0) + line(3, "b", 1), "word 3 stands where 2 should be"),
        (line(1, "a", "_"), "word 1 has no head"),
        (line("_", "a", "0"), "the line of 'a' has no number"),
        ("# sent_id = x\n", "sentence x: it has no words"),
        (line("1-3", "ab", "_") + line(1, "a", 0) + line(2, "b", 1), "the word 1-3 does not fit"),
        (line(1, "a", 0) + line("1-2", "ab", "_") + line(2, "b", 1), "the word 1-2 does not fit"),
        ("# text = a c\n" + line(1, "a", 0) + line(2, "b", 1), "word 2 is 'b', its text has 'c'"),
        ("# text = a c\n" + line(1, "a", 0), "its text goes on after the last word: 'c'"),
        ("1 a 0\n", r"a\.conllu:1: no CoNLL-U sentence \(Invalid line format"),
        (line(1, "a", "x"), r"no CoNLL-U sentence \(Failed parsing field 'head'"),
        (SPLIT + "\n" + line(1, "a", 5), r"a\.conllu:15: sentence without sent_id: word 1: head 5"),
    ],
)
def test_broken_sentences_are_named(tmp_path, content, message):
    with pytest.raises(DataError, match=message):
        list(read_trees(write(tmp_path, content)))


@pytest.mark.parametrize(
    ("files", "options", "message"),
    [
        (None, {}, r"data\.files is not set"),
        ("a.txt", {}, r"a\.txt: unknown type; allowed are \.conllu and \.conll, plain or \.gz"),
        ("a.conllu", {"valid_fraction": 2}, "valid_fraction=2: must lie between 0 and 1"),
        ("a.conllu", {}, r"a\.conllu: 1 document\(s\) are too few .*; give data\.valid_files"),
    ],
)
def test_bad_files_are_named(tmp_path, monkeypatch, files, options, message):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("x")
    write(tmp_path, SPLIT)
    with pytest.raises(DataError, match=message):
        list(Treebank(files, **options).documents("train"))


@needs_english
def test_every_token_of_real_english_is_accounted_for():
    documents = list(read_trees(ENGLISH))
    assert len(documents) == 2001
    for document in documents:
        inside = [document["text"][start:end] for start, end in document["spans"]]
        assert "".join(inside) == "".join(document["text"].split()) or any(" " in w for w in inside)
    texts = [document["text"] for document in documents]
    tokenizer = load_tokenizer("bpe", documents=texts, vocab_size=1024)
    report = PackingReport()
    rows = pack(documents, tokenizer, special_ids(tokenizer), PackingOptions(64), report)
    given = sum(int((block["depth"] >= 0).sum()) for block in rows)
    assert report.documents == 2001 and report.unknown_tokens == 0
    assert report.tokens == report.tokens_of_words + report.tokens_without_word
    # A trailing piece of a row is all that may be missing.
    assert math.isclose(given, report.tokens_of_words, abs_tol=64)
