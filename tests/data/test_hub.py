"""Datasets of the `datasets` library, from local copies."""

import builtins
import json

import pytest

from data.errors import DataError
from data.hub import HubDataset

datasets = pytest.importorskip("datasets")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    datasets.disable_progress_bars()


@pytest.fixture
def files(tmp_path):
    train = tmp_path / "train.parquet"
    datasets.Dataset.from_dict({"text": [f"row , {i}" for i in range(5)]}).to_parquet(train)
    return {"train": str(train)}


def make(files, split_map=None, **options):
    split_map = split_map or {"train": "train[:-2]", "validation": "train[-2:]"}
    return HubDataset("toy", "owner/toy", split_map, files=files, **options)


def texts(source, split):
    return [document["text"] for document in source.documents(split)]


def test_slices_and_detokenizer(files):
    source = make(files, detokenizer="lm1b")
    assert source.splits == ("train", "validation")
    assert texts(source, "train") == ["row, 0", "row, 1", "row, 2"]
    assert texts(source, "validation") == ["row, 3", "row, 4"]


def test_streaming_gives_the_same_rows(files):
    split_map = {"train": "train[2:]", "validation": "train[:2]"}
    stream, stored = make(files, split_map, streaming=True), make(files, split_map)
    for split in split_map:
        assert texts(stream, split) == texts(stored, split)


def test_stream_cannot_count_from_the_end(files):
    with pytest.raises(DataError, match=r"'train\[:-2\]' counts from the end"):
        texts(make(files, streaming=True), "train")


def test_jsonl_and_saved_folder(tmp_path):
    rows = [{"text": "a"}, {"text": "b"}]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert texts(make({"train": str(path)}, {"train": "train"}), "train") == ["a", "b"]
    folder = tmp_path / "saved"
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(folder)
    for streaming in (False, True):
        source = make(str(folder), {"train": "train"}, streaming=streaming)
        assert texts(source, "train") == ["a", "b"]


def test_fingerprint_follows_files_and_options(files, tmp_path):
    assert make(files).fingerprint() == make(files).fingerprint()
    assert make(files).fingerprint() != make(files, detokenizer="ptb").fingerprint()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"split_map": {"train": "dev"}}, "toy: no split 'dev'; the dataset has train"),
        ({"split_map": {"train": "train[a:]"}}, r"split 'train\[a:\]' is not NAME"),
        ({"column": "body"}, "toy: no column 'body'; the dataset has text"),
    ],
)
def test_wrong_names_are_reported(files, options, message):
    with pytest.raises(DataError, match=message):
        texts(make(files, **options), "train")


def test_fingerprint_follows_which_file_is_which_split(tmp_path):
    """The same files, dealt differently by a dict or by their names, are other data."""
    for number in range(3):
        (tmp_path / f"part-{number}.jsonl").write_text(f'{{"text": "row {number}"}}\n')
    a, b, c = (str(tmp_path / f"part-{number}.jsonl") for number in range(3))
    split_map = {"train": "train", "validation": "test"}
    one = make({"train": [a, b], "test": [c]}, split_map).fingerprint()
    assert make({"train": [a], "test": [b, c]}, split_map).fingerprint() != one
    folder = make(str(tmp_path), split_map).fingerprint()
    (tmp_path / "part-2.jsonl").rename(tmp_path / "test.jsonl")
    assert make(str(tmp_path), split_map).fingerprint() != folder


def test_rows_must_be_text(tmp_path):
    path = tmp_path / "a.parquet"
    datasets.Dataset.from_dict({"text": [1]}).to_parquet(path)
    with pytest.raises(DataError, match="toy: row 0 of train: text is no text"):
        texts(make({"train": str(path)}, {"train": "train"}), "train")


def test_bad_local_copies_are_named(tmp_path):
    with pytest.raises(DataError, match=r"detokenizer='x': unknown; allowed are lm1b"):
        make(None, detokenizer="x")
    with pytest.raises(DataError, match=r"gone\.parquet: no such file"):
        texts(make({"train": str(tmp_path / "gone.parquet")}), "train")
    with pytest.raises(DataError, match=r"a\.csv: unknown type"):
        texts(make({"train": "a.csv"}), "train")
    with pytest.raises(DataError, match="no folder with"):
        make(str(tmp_path)).fingerprint()
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"no parquet")
    with pytest.raises(DataError, match="toy: cannot read"):
        texts(make({"train": str(broken)}), "train")


def test_hub_out_of_reach(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route\nlong trace")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    message = r"toy: cannot read owner/toy \(ConnectionError: no route\); .*data\.source\.files"
    with pytest.raises(DataError, match=message):
        make(None).fingerprint()


def test_library_missing(monkeypatch):
    real = builtins.__import__

    def without_datasets(name, *args, **kwargs):
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_datasets)
    with pytest.raises(DataError, match="pip install datasets"):
        make(None).fingerprint()
