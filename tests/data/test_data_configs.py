"""Every data configuration composes, builds its source, and holds the same keys."""

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from runtime.config import instantiate

FOLDER = Path(__file__).parents[2] / "configs" / "data"
KEYS = {
    "name", "source", "tokenizer_name_or_path", "wrap", "score_padding",
    "insert_train_special", "insert_valid_special", "insert_train_eos", "insert_valid_eos",
    "streaming", "cache_dir",
}  # fmt: skip
OPTIONAL = {
    "vocab_size",
    "files",
    "valid_files",
    "valid_fraction",
    "text_column",
    "split_paragraphs",
    "encoder",
    "thinking",
    "join",
    "documents_per_row",
    "align",
    "chunking",
    "end_suffix",
    "share",
    "shares",
    "form",
    "open",
    "close",
    "limits",
    "min_prefix",
    "min_suffix",
}


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_data_configuration(path, tmp_path):
    endings = {"conllu": "conllu", "chat": "jsonl", "thoughts": "jsonl"}
    corpus = tmp_path / f"corpus.{endings.get(path.stem, 'txt')}"
    corpus.write_text("text")
    config = OmegaConf.create({"paths": {"cache_dir": str(tmp_path)}, "data": None, "seed": 1})
    config.data = OmegaConf.load(path)
    assert config.data.name == path.stem or path.stem == "lm1b_wrap"
    assert KEYS <= set(config.data) <= KEYS | OPTIONAL
    if "files" in config.data:
        config.data.files = str(corpus)
    source = instantiate(config.data.source)
    assert set(source.splits) <= {"train", "validation", "test"} and "validation" in source.splits
    assert config.data.cache_dir == str(tmp_path)
