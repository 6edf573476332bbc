"""Documents cut into prefixes and suffixes: every token where it belongs, or counted."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken

from data.blocks import IDS, RESPONSE, PackingReport
from data.errors import DataError
from data.fingerprint import fingerprint
from data.prefix_suffix import Chunking, PrefixSuffixEncoder, documents_of, halves
from data.tokenization import added_ids, load_tokenizer, special_ids, with_mask_token
from dataloader import LanguageData, _encoder_identity
from models.tiny_causal import byte_tokenizer
from runtime.validation import validate
from tests.support import compose_config

TOKENIZER = load_tokenizer("word", documents=[" ".join(f"w{n}" for n in range(60))])
SMALL = {"suffix_len": 4, "prefix_len": 6, "max_len": 12, "min_source_tokens": 0}


def text(count, first=0):
    return " ".join(f"w{n}" for n in range(first, first + count))


def encoded(texts, tokenizer=TOKENIZER, length=16, end_suffix=None, **chunking):
    """The batches, and the report."""
    encoder = PrefixSuffixEncoder(length, Chunking(**{**SMALL, **chunking}), end_suffix)
    report = PackingReport()
    documents = [{"text": text} for text in texts]
    return list(encoder(documents, tokenizer, special_ids(tokenizer), report)), report


def cut(texts, length=16, end_suffix=None, **chunking):
    """(prefix, suffix) of every row, as words, and the report."""
    rows = []
    batches, report = encoded(texts, TOKENIZER, length, end_suffix, **chunking)
    for batch in batches:
        assert set(batch.columns) == {IDS, RESPONSE}
        ends = np.cumsum(batch.lengths)[:-1]
        for ids, response in zip(
            np.split(batch.columns[IDS], ends), np.split(batch.columns[RESPONSE], ends), strict=True
        ):
            assert (np.diff(response) >= 0).all()
            words = TOKENIZER.convert_ids_to_tokens(ids.tolist())
            middle = int((response == 0).sum())
            rows.append((" ".join(words[:middle]), " ".join(words[middle:])))
    return rows, report


def test_fixed_takes_the_beginning_of_every_document():
    rows, report = cut([text(10), text(12, 20), text(9)], mode="fixed")
    assert rows == [(text(6), text(4, 6)), (text(6, 20), text(4, 26))]
    assert (report.documents, report.short_documents) == (3, 1)
    assert (report.tokens, report.dropped_tokens) == (31, 2 + 9)


def test_the_least_length_of_a_document_is_the_users():
    rows, report = cut([text(12), text(15)], mode="fixed", min_source_tokens=13)
    assert len(rows) == 1 and report.short_documents == 1


def test_contiguous_makes_a_suffix_of_every_chunk_but_the_first():
    rows, report = cut([text(18)], mode="contiguous")
    # At most 12 tokens: two chunks before the suffix, the nearest ones.
    assert rows == [
        (text(4), text(4, 4)),
        (text(8), text(4, 8)),
        (text(8, 4), text(4, 12)),
    ]
    assert report.dropped_tokens == 2


def test_the_last_chunk_may_end_the_document():
    rows, report = cut([text(18), text(8, 30)], mode="contiguous", end_suffix=True)
    assert rows[-2] == (text(8, 8), f"{text(2, 16)} [EOS]")
    assert rows[-1] == (text(4, 30), f"{text(4, 34)} [EOS]")
    assert sum("[EOS]" in suffix for _, suffix in rows) == 2 and report.dropped_tokens == 0


@pytest.mark.parametrize(
    ("most", "chunks"), [(1, [4]), (2, [2, 4]), (3, [1, 2, 4]), (9, [1, 2, 3, 4])]
)
def test_some_prefixes_of_a_document_are_evenly_spaced(most, chunks):
    rows, _ = cut([text(20)], mode="contiguous", max_prefixes_per_doc=most)
    assert [suffix for _, suffix in rows] == [text(4, 4 * chunk) for chunk in chunks]


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.sampled_from([4, 6, 8]))
@settings(max_examples=40, deadline=None)
def test_contiguous_suffixes_are_a_document_without_its_first_chunk(counts, max_len):
    texts = [text(count) for count in counts]
    rows, report = cut(texts, mode="contiguous", max_len=2 * max_len)
    whole = [min(count, count // 4 * 4) if count >= 8 else 0 for count in counts]
    assert sorted(" ".join(suffix for _, suffix in rows).split()) == sorted(
        word for count in whole for word in text(max(0, count - 4), 4).split()
    )
    assert report.tokens == sum(counts)
    assert report.dropped_tokens == sum(counts) - sum(whole)
    for prefix, suffix in rows:
        joined = [int(word[1:]) for word in f"{prefix} {suffix}".split()]
        assert joined == list(range(joined[0], joined[0] + len(joined)))
        assert len(joined) <= 2 * max_len


def test_a_marker_ends_the_prefix():
    documents = [f"{text(3)} w9 {text(2, 20)}", f"{text(3)} w9 {text(6, 20)} w9", text(5), "w1 w9"]
    rows, report = cut(documents, mode="marker", marker="w9")
    # The document goes on behind the second suffix, so that has no end.
    assert rows == [
        (f"{text(3)} w9", f"{text(2, 20)} [EOS]"),
        (f"{text(3)} w9", text(4, 20)),
    ]
    assert (report.unmarked_documents, report.short_documents) == (1, 1)
    assert report.tokens == 6 + 11 + 5 + 2 and report.dropped_tokens == 3 + 5 + 2
    rows, _ = cut(documents[:1], mode="marker", marker="w9", end_suffix=False)
    assert rows == [(f"{text(3)} w9", text(2, 20))]


def bytes_with(*extra_tokens):
    """Bytes, four special tokens, and these, which are none."""
    tokenizer = byte_tokenizer(extra_tokens)
    return with_mask_token(tokenizer, tokenizer.convert_tokens_to_ids("<|mask|>"))


@pytest.mark.parametrize(
    "written",
    ["<think>", "</think>", "\u25c1think\u25b7", "<|im_end|>", "<|endoftext|>", "<|mask|>"],
)
@pytest.mark.parametrize("mode", ["fixed", "contiguous", "marker"])
def test_delimiters_and_special_tokens_of_a_document_are_text(mode, written):
    tokenizer = bytes_with("<think>", "</think>", "\u25c1think\u25b7")
    document = f"so {written} {written} on and {written}"
    size = len(document.encode())
    lengths = {"suffix_len": 8, "prefix_len": size - 8, "max_len": size}
    batches, report = encoded(
        [document], tokenizer, 2 * size, False, mode=mode, marker="so ", **lengths
    )
    (batch,) = batches
    ids = batch.columns[IDS].tolist()
    assert not added_ids(tokenizer) & set(ids)
    assert report.added_tokens_in_text == report.documents_with_mask == 0
    assert report.tokens == size, "a token a byte"
    if mode != "contiguous":
        assert document.startswith(tokenizer.decode(ids)) and len(ids) >= 8
    if mode == "fixed":
        assert tokenizer.decode(ids) == document


def test_added_words_stay_tokens_and_are_counted():
    tokenizer = bytes_with("<think>", "Palimpsest", "    ")
    word, indent = tokenizer.convert_tokens_to_ids(["Palimpsest", "    "])
    batches, report = encoded(
        ["x Palimpsest    y<think>"], tokenizer, suffix_len=8, prefix_len=4, mode="fixed"
    )
    assert batches[0].columns[IDS].tolist()[2:5] == [
        word,
        indent,
        *tokenizer.encode("y", add_special_tokens=False),
    ]
    assert report.added_tokens_in_text == 1 and "1 added tokens in text" in str(report)


def test_a_special_token_that_is_a_word_of_the_vocabulary_is_counted():
    """The tokenizer of words has no other tokens for it."""
    _, report = encoded([f"{text(4)} [EOS] {text(5)} [EOS]", text(11)], mode="fixed")
    assert report.added_tokens_in_text == 2
    assert "2 added tokens in text" in str(report) and "added" not in str(PackingReport())


@pytest.mark.parametrize("content", ["<tool call>", "[x]", "\u00abx\u00bb"])
def test_delimiters_are_told_by_their_ends(content):
    tokenizer = bytes_with()
    tokenizer.add_tokens([AddedToken(content, normalized=False)])
    batches, report = encoded([f"{content} {'x' * 20}"], tokenizer, mode="fixed")
    shown = tokenizer.decode(batches[0].columns[IDS].tolist())
    assert f"{content} {'x' * 20}".startswith(shown) and len(shown.encode()) == 10
    assert report.added_tokens_in_text == 0


def test_rows_know_their_document():
    texts = [text(12), text(4), text(9), text(8)]
    batches, _ = encoded(texts, mode="contiguous")
    assert [batch.origins.tolist() for batch in batches] == [[0, 0, 2, 3]]
    # Numbers go on in the next batch.
    many = [text(12)] * 1001
    batches, _ = encoded(many, mode="contiguous", max_prefixes_per_doc=1)
    assert [batch.origins.tolist() for batch in batches] == [list(range(1000)), [1000]]
    batches, _ = encoded([f"{text(3)} w9 w5", "w1", f"{text(3)} w9 w5"], mode="marker", marker="w9")
    assert batches[0].origins.tolist() == [0, 2]


def test_a_prefix_without_room_for_its_suffix_is_counted():
    rows, report = cut(
        [f"{text(8)} w9 w10 w11", f"{text(9)} w9 w11"], 12, mode="marker", marker=" w9"
    )
    assert [len(" ".join(row).split()) for row in rows] == [12] * 2 and not report.long_documents
    rows, report = cut([f"{text(9)} w9 w10 w11"], 12, mode="marker", marker=" w9 w10")
    assert rows == [] and report.long_documents == 1 and report.dropped_tokens == 12


@given(st.text("ab ", max_size=12), st.text("ab ", min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_halves_are_the_text(one, marker):
    first, second = halves(one, marker)
    assert first + second == one and (first.endswith(marker) if marker in one else first == "")


@pytest.mark.parametrize(
    ("chunking", "message"),
    [
        ({"mode": "any"}, r"data\.chunking\.mode=any: allowed contiguous, fixed, marker"),
        ({"mode": "marker"}, r"data\.chunking\.marker=null: .* needs the text"),
        (
            {"mode": "contiguous", "max_len": 7},
            r"data\.chunking\.max_len=7: allowed at least 8, two chunks of .*suffix_len=4",
        ),
        (
            {"prefix_len": 13},
            r"prefix_len=13 and suffix_len=4 need 17 tokens.*at most model\.length=16",
        ),
        ({"mode": "contiguous", "max_len": 20}, r"max_len=20 need 20 .*model\.length=16"),
        ({"mode": "marker", "marker": "a", "suffix_len": 15}, r"suffix_len=15 need 17"),
    ],
    ids=["mode", "marker", "two chunks", "fixed", "contiguous", "after a marker"],
)
def test_what_cannot_be_is_one_line(chunking, message):
    with pytest.raises(DataError, match=message) as error:
        cut([], **chunking)
    assert "\n" not in str(error.value)


TINY = ("model=tiny_causal", 'model.extra_tokens=["<think>","</think>"]', "data=prefix_suffix")


def test_rows_of_documents_that_ship_with_python(tmp_path):
    cfg = compose_config(
        "algo=sft_raw", *TINY, "data.chunking.suffix_len=32", "data.chunking.prefix_len=96",
        f"paths.cache_dir={tmp_path}", "loader.global_batch_size=4",
    )  # fmt: skip
    validate(cfg)
    data = LanguageData(cfg)
    batch = next(iter(data.train_loader(max_steps=1)))
    assert set(batch) == {
        "input_ids", "segment", "response", "token_mask", "loss_mask", "index", "position",
        "origin",
    }  # fmt: skip
    assert batch["input_ids"].shape == (4, 128)
    assert torch.equal(batch["response"], (torch.arange(128) >= 96).long().expand(4, -1))
    assert (batch["segment"] == 0).all() and batch["token_mask"].all()
    texts = {document["text"] for document in data.source.documents("train")}
    begins = {data.tokenizer.decode(row) for row in batch["input_ids"]}
    assert all(any(one.startswith(begin.rstrip("\ufffd")) for one in texts) for begin in begins)
    report = data.packing_report("train")
    assert report.rows + report.short_documents == report.documents and report.short_documents


def test_rows_of_questions_and_answers(tmp_path):
    rows = [{"id": str(n), "text": f"Question: 1 + {n} =\nAnswer: {n + 1}\n"} for n in range(40)]
    rows.append({"id": "none", "text": "No question"})
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = compose_config(
        "algo=sft_raw", *TINY, f"data.files={path}", "data.valid_fraction=0.2",
        "data.chunking.mode=marker", "data.chunking.marker=Answer:", "model.length=64",
        "data.chunking.suffix_len=16", f"paths.cache_dir={tmp_path}", "loader.global_batch_size=8",
    )  # fmt: skip
    validate(cfg)
    data = LanguageData(cfg)
    seen = {}
    for split in ("train", "validation"):
        report = data.packing_report(split)
        assert report.rows + report.unmarked_documents == report.documents
        seen[split] = set()
        for batch in data.eval_loader(split):
            for ids, response, segment in zip(
                batch["input_ids"], batch["response"], batch["segment"], strict=True
            ):
                prefix, suffix = (data.tokenizer.decode(ids[response == side]) for side in (0, 1))
                assert prefix.endswith("\nAnswer:") and suffix.endswith("\n<|im_end|>")
                assert torch.equal(segment == 0, response >= 0)
                seen[split].add(prefix + suffix.removesuffix("<|im_end|>"))
    assert seen["train"] and seen["validation"] and not seen["train"] & seen["validation"]
    assert seen["train"] | seen["validation"] == {row["text"] for row in rows[:-1]}


def test_documents_are_those_of_the_files_or_of_python(tmp_path):
    assert documents_of().name == "pydocs"
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo\n")
    assert documents_of(str(path)).name == "text"


def test_rows_of_an_earlier_edition_are_not_taken_for_these(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("x <think> y " * 40)
    cfg = compose_config(
        "algo=sft_raw", *TINY, f"data.files=[{path}]", f"data.valid_files=[{path}]",
        "data.chunking.suffix_len=16", "data.chunking.prefix_len=16", "data.split_paragraphs=false",
        "data.chunking.min_source_tokens=0", "model.length=32", f"paths.cache_dir={tmp_path}",
    )  # fmt: skip
    monkeypatch.setattr(PrefixSuffixEncoder, "edition", 1)
    before = LanguageData(cfg)
    path_before, fingerprint_before = before.rows("train").path, before.fingerprint
    monkeypatch.undo()
    now = LanguageData(cfg)
    assert now.rows("train").path != path_before and now.fingerprint != fingerprint_before
    assert now.rows("train").path == LanguageData(cfg).rows("train").path
    # Without an edition the key is that of caches which are older than editions.
    chat = {"_target_": "data.chat_encoding.ChatEncoder", "thinking": True}
    assert _encoder_identity(chat) == fingerprint(chat)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("data.chunking.suffix_len=16", "data.chunking.prefix_len=32"),
            r"no document makes a row with data\.chunking\.min_source_tokens=640,"
            r" data\.chunking\.prefix_len=32, data\.chunking\.suffix_len=16 \(\d+ documents",
        ),
        (
            (
                "data.chunking.mode=marker",
                "data.chunking.marker=Answer:",
                "data.chunking.suffix_len=16",
            ),
            r"no document makes a row with data\.chunking\.marker=Answer: \(",
        ),
    ],
    ids=["short", "unmarked"],
)
def test_what_leaves_out_every_document_is_named(tmp_path, options, message):
    (tmp_path / "some.txt").write_text("".join(f"text {n}\n\n" for n in range(20)))
    cfg = compose_config(
        "algo=sft_raw", *TINY, f"data.files={tmp_path}/some.txt", "data.split_paragraphs=true",
        *options, f"paths.cache_dir={tmp_path}",
    )  # fmt: skip
    with pytest.raises(DataError, match=message) as error:
        LanguageData(cfg).rows("train")
    assert "model.length" not in str(error.value) and "; allowed: values that" in str(error.value)
