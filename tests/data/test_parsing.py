"""Parts are made once, by whom and when does not matter, and they join with their texts only."""

import dataclasses
import errno
import os
from pathlib import Path

import numpy as np
import pytest

from data.errors import DataError
from data.parse_store import STATUSES, ParsedDocument, ParseStore, Part, text_hash, write_part
from data.parsed import ParsedSource
from data.parsing import Shard, parse_split, usable_processes
from tests.plugins.toy_parser import ToyParser

TEXTS = ["a bb ccc", "", "dddd  e.", "FAIL now", "naïve 東京", " \n", "f g", "don't", "last one"]


class Texts:
    """A source of given texts."""

    name = "texts"
    splits = ("train", "validation")

    def __init__(self, texts=TEXTS, content="v1"):
        self.texts, self.content = texts, content

    def documents(self, split):
        texts = self.texts if split == "train" else self.texts[:3]
        return iter([{"text": text} for text in texts])

    def fingerprint(self):
        return self.content


def store_of(folder, size=2, source=None, parser=None):
    source, parser = source or Texts(), parser or ToyParser()
    return ParseStore(folder, source.name, source.fingerprint(), parser.options(), size)


def joined(folder, size=2, source=None):
    source = source or Texts()
    command = "python main.py mode=parse_depth"
    return ParsedSource(source, store_of(folder, size, source), lambda: command)


def files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


@pytest.fixture
def made(tmp_path):
    """The store of the texts, parsed in parts of two."""
    for split in Texts.splits:
        assert parse_split(Texts(), split, store_of(tmp_path), ToyParser()).finished
    return tmp_path


def test_documents_come_back_with_their_words(made):
    documents = list(joined(made).documents("train"))
    assert [document["text"] for document in documents] == TEXTS
    for document, text in zip(documents, TEXTS, strict=True):
        parsed = ToyParser().parse([text])[0]
        assert document["spans"] == list(zip(parsed.start, parsed.end, strict=True))
        assert list(document["features"]["depth"]) == list(parsed.depth)
    assert documents[2]["features"]["depth"].tolist() == [3, 0, 0]
    assert documents[2]["features"]["height"].tolist() == [3, 3, 3]


def test_everything_is_counted(tmp_path):
    ticks = []
    outcome = parse_split(Texts(), "train", store_of(tmp_path), ToyParser(), tick=ticks.append)
    statuses = {status: outcome.counts[status] for status in STATUSES}
    assert statuses == {"parsed": 6, "empty": 2, "failed": 1, "too_long": 0}
    assert (outcome.counts["documents"], outcome.counts["sentences"]) == (9, 6)
    assert outcome.counts["words"] == 3 + 3 + 2 + 2 + 2 + 2
    assert outcome.counts["failed: ValueError"] == 1
    assert (outcome.parts, outcome.kept, outcome.fresh) == (5, 0, outcome.counts)
    assert sum(ticks) == 9


def test_a_part_gives_back_what_was_written(tmp_path):
    document = ParsedDocument("too_long", 2, [0, 2], [1, 3], [0, -1], [0, -1])
    write_part(tmp_path / "p.arrow", {"a": 1}, ["x y"], [document])
    part = Part(tmp_path / "p.arrow", {"a": 1})
    found = dataclasses.asdict(part.document(0, "x y"))
    assert {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in found.items()} == (
        dataclasses.asdict(document)
    )
    assert part.counts()["unparsed_words"] == 1 and part.counts()["too_long"] == 1


def test_finished_parts_are_kept_and_the_rest_is_the_same(made, tmp_path_factory):
    whole = files(made)
    (part,) = made.rglob("train/part-00001.arrow")
    part.unlink()
    next(made.rglob("train/index.json")).unlink()
    outcome = parse_split(Texts(), "train", store_of(made), ToyParser())
    assert (outcome.kept, outcome.parts, outcome.finished) == (4, 5, True)
    assert outcome.fresh["documents"] == 2
    assert files(made) == whole


def test_processes_and_shards_make_the_same_files(made, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    outcome = parse_split(Texts(), "train", store_of(other), ToyParser(), processes=2)
    assert outcome.finished and outcome.counts["documents"] == 9
    for number in range(3):
        shard = Shard(number, 3)
        outcome = parse_split(Texts(), "validation", store_of(other), ToyParser(), shard=shard)
        # Two parts: the second shard closes the split, the third has nothing to do.
        assert outcome.parts == int(number < 2) and outcome.finished == (number > 0)
    assert files(other) == files(made)


def test_a_process_that_dies_is_reported(tmp_path):
    with pytest.raises(DataError, match=r"data\.parse\.num_processes=2: a process was killed"):
        parse_split(Texts(), "train", store_of(tmp_path), Deadly(), processes=2)


class Deadly(ToyParser):
    """Kills its process."""

    def parse(self, texts):
        os._exit(9)


def test_a_part_of_failures_only_is_not_written(tmp_path):
    failing = Texts(["FAIL", " ", *["FAIL again"] * 6])
    # Seven of them may be chance.
    assert parse_split(failing, "train", store_of(tmp_path, 8, failing), ToyParser()).finished
    failing = Texts(["FAIL", " ", *["FAIL again"] * 7, "well"], content="v2")
    store = store_of(tmp_path, 9, failing)
    message = r"part-00000\.arrow: not written, because all 8 documents failed, the first with Val"
    with pytest.raises(DataError, match=message):
        parse_split(failing, "train", store, ToyParser())
    assert not list(store.folder.rglob("*.arrow"))
    assert parse_split(failing, "train", store_of(tmp_path, 10, failing), ToyParser()).finished


def test_cores_are_counted_where_there_is_no_affinity(monkeypatch):
    monkeypatch.delattr("os.sched_getaffinity", raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 5)
    assert usable_processes(None, on_gpu=False) == 5


def test_as_many_processes_as_cores_but_one_for_a_gpu():
    assert usable_processes(3, on_gpu=True) == 3
    assert usable_processes(None, on_gpu=True) == 1
    assert usable_processes(None, on_gpu=False) >= 1


def test_a_missing_parse_names_the_command(tmp_path):
    source = joined(tmp_path)
    message = r"the parse of train of 'texts' is missing \(.*\); run: python main\.py mode=parse_de"
    with pytest.raises(DataError, match=message):
        next(source.documents("train"))
    with pytest.raises(DataError, match="the parse of train of 'texts' is missing"):
        source.fingerprint()
    parse_split(Texts(), "train", store_of(tmp_path), ToyParser(), shard=Shard(0, 2))
    with pytest.raises(DataError, match=r"has 3 parts but is not complete \(.*run: python"):
        next(joined(tmp_path).documents("train"))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["x", *TEXTS[1:]], r"document 0 of train: .*part-00000\.arrow: document 0 of this part"),
        ([*TEXTS[:5], "x", *TEXTS[6:]], r"document 5 of train: .*part-00002\.arrow: document 1"),
        (TEXTS[:-1], r"index\.json: 9 documents were parsed, the data has 8; delete"),
        ([*TEXTS, "more"], r"document 9 of train: .*part-00004\.arrow: document 1 of this part"),
        ([*TEXTS, "more", "yet"], r"document 9 of train: .*is not the text that was parsed"),
    ],
)
def test_other_texts_are_refused(made, texts, message):
    with pytest.raises(DataError, match=message):
        list(joined(made, source=Texts(texts)).documents("train"))


def test_more_parts_than_were_parsed(tmp_path):
    source = Texts(TEXTS[:8])
    parse_split(source, "train", store_of(tmp_path), ToyParser())
    with pytest.raises(DataError, match=r"index\.json: 8 documents were parsed, the data has more"):
        list(joined(tmp_path).documents("train"))


def test_resuming_on_other_texts_is_refused(made):
    with pytest.raises(DataError, match=r"part-00000\.arrow: document 1 of this part is not the"):
        parse_split(Texts(["a bb ccc", "x"]), "train", store_of(made), ToyParser())
    with pytest.raises(DataError, match=r"part-00000\.arrow: it has 2 documents, the data 1"):
        parse_split(Texts(["a bb ccc"]), "train", store_of(made), ToyParser())


def test_texts_in_another_order_cost_the_folder(made):
    message = r"part-00000\.arrow: document 0 of .*; delete the folder \S+/train and parse again$"
    with pytest.raises(DataError, match=message):
        parse_split(Texts(TEXTS[::-1]), "train", store_of(made), ToyParser())
    with pytest.raises(DataError, match=message):
        list(joined(made, source=Texts(TEXTS[::-1])).documents("train"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_disk_that_refuses_names_the_key_of_the_folder(tmp_path, monkeypatch, number):
    def refuse(descriptor):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("os.fsync", refuse)
    with pytest.raises(DataError, match=r"part-00000\.arrow: .* set data\.parse\.folder"):
        parse_split(Texts(), "train", store_of(tmp_path), ToyParser())
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match=r"cannot be written .* set data\.parse\.folder"):
        parse_split(Texts(), "train", store_of(tmp_path / "file"), ToyParser())


def test_damage_is_found(made):
    (path,) = made.rglob("train/part-00002.arrow")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    message = r"part-00002\.arrow: it is incomplete, damaged or foreign \(wrong checksum\); delete"
    with pytest.raises(DataError, match=message):
        list(joined(made).documents("train"))
    with pytest.raises(DataError, match=message):
        parse_split(Texts(), "train", store_of(made), ToyParser())
    path.unlink()
    with pytest.raises(DataError, match=r"part-00002\.arrow: missing; run: python main\.py"):
        list(joined(made).documents("train"))


def test_a_part_in_anothers_place_is_found(made):
    (path,) = made.rglob("train/part-00002.arrow")
    path.write_bytes(path.with_name("part-00003.arrow").read_bytes())
    with pytest.raises(DataError, match=r"part-00002\.arrow: it was made with part 3, not 2"):
        list(joined(made).documents("train"))


@pytest.mark.parametrize("content", ["{", "[]", '{"format": "palimpsest.parse.1"}'])
def test_a_damaged_index_is_found(made, content):
    (path,) = made.rglob("train/index.json")
    path.write_text(content)
    with pytest.raises(DataError, match=r"index\.json: damaged"):
        joined(made).fingerprint()


def test_a_foreign_index_is_found(made):
    (path,) = made.rglob("train/index.json")
    path.write_text(path.read_text().replace('"v1"', '"v2"'))
    with pytest.raises(DataError, match=r"index\.json: not the index of this data"):
        list(joined(made).documents("train"))


def test_another_parser_is_refused(made):
    with pytest.raises(DataError, match=r"it was made with parser version 1, not 2; delete"):
        parse_split(Texts(), "train", store_of(made), ToyParser(version=2))
    for path in made.rglob("validation/*"):
        path.unlink()
    parse_split(Texts(), "validation", store_of(made), ToyParser(version=2))
    with pytest.raises(DataError, match="its splits were parsed by different models"):
        joined(made).fingerprint()


def test_fingerprints_tell_texts_parsers_and_parses_apart(made, tmp_path_factory):
    def fingerprint_of(source, parser, size=2, splits=("train",)):
        folder = tmp_path_factory.mktemp("store")
        for split in splits:
            parse_split(source, split, store_of(folder, size, source), parser)
        return joined(folder, size, source).fingerprint()

    first = joined(made).fingerprint()
    # Whether validation was parsed as well does not matter to who trains.
    assert fingerprint_of(Texts(), ToyParser()) == first
    others = [
        fingerprint_of(Texts(content="v2"), ToyParser()),
        fingerprint_of(Texts(), ToyParser(version=2)),
        fingerprint_of(Texts(), ToyParser(), splits=("validation",)),
        Texts().fingerprint(),
    ]
    assert len({first, *others}) == 5


def test_hashes_of_texts_are_literal():
    # Stores on disk rely on them.
    assert text_hash("naïve") == 13759174791853198556
