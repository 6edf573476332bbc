"""Rows of texts with thoughts: shares by document, kinds by token, and every form of them."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.blocks import IDS, RESPONSE, PackingReport
from data.errors import DataError
from data.left_out import deciding_keys
from data.parts import DELIMITER, KIND, TEXT, THOUGHT
from data.thought_rows import SHARES, ThoughtEncoder, ThoughtFiles, delimiter_id, share_of
from data.thoughts import Delimiters, Insertion, Limits, splice
from data.tokenization import added_ids, special_ids, with_mask_token
from dataloader import LanguageData
from models.tiny_causal import byte_tokenizer
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.support import compose_config

BYTES = byte_tokenizer(["<think>", "</think>"])
TOKENIZER = with_mask_token(BYTES, BYTES.convert_tokens_to_ids("<|mask|>"))
SPECIAL = special_ids(TOKENIZER)
THINK = Delimiters()
OPEN, CLOSE = (TOKENIZER.convert_tokens_to_ids(text) for text in ("<think>", "</think>"))
LETTERS = st.text(st.sampled_from("aé. \n"), max_size=12)


def row(text, *insertions, **more):
    augmented = splice(text, [Insertion(*one) for one in insertions], THINK)
    return {"id": "r", "source_sha": "s", "raw_text": text, "augmented_text": augmented, **more}


def encode(*rows, **options):
    """Per row its columns, and the report."""
    report, found = PackingReport(), []
    for batch in ThoughtEncoder(**options)(rows, TOKENIZER, SPECIAL, report):
        assert set(batch.columns) == {IDS, RESPONSE, KIND}
        ends = np.cumsum(batch.lengths)[:-1]
        columns = {name: np.split(column, ends) for name, column in batch.columns.items()}
        found += [
            {name: column[n] for name, column in columns.items()} for n in range(len(ends) + 1)
        ]
    return found, report


def spelled(columns, where):
    return TOKENIZER.decode(columns[IDS][where].tolist())


@given(LETTERS, st.lists(st.tuples(st.floats(0, 1), LETTERS.filter(str.strip)), max_size=4))
@settings(max_examples=30, deadline=None)
def test_kinds_align_with_tokens(text, asked):
    insertions = [(round(share * len(text)), thought) for share, thought in asked]
    if not text and not asked:
        return
    (columns,), report = encode(row(text, *insertions), limits=Limits(min_thoughts=0))
    kind, ids = columns[KIND], columns[IDS]
    assert spelled(columns, kind == TEXT) == text
    in_order = sorted(insertions, key=lambda one: one[0])
    assert spelled(columns, kind == THOUGHT) == "".join(one[1].strip() for one in in_order)
    assert set(ids[kind == DELIMITER].tolist()) <= {OPEN, CLOSE}
    assert ids[kind == DELIMITER].tolist() == [OPEN, CLOSE] * len(asked)
    # Thoughts are what stands between the delimiters.
    depth = np.cumsum(ids == OPEN) - np.cumsum(ids == CLOSE)
    assert np.array_equal(kind == THOUGHT, (depth == 1) & (ids != OPEN))
    assert (columns[RESPONSE] == 1).all() and report.tokens == len(ids)


def test_the_space_before_a_delimiter_is_no_token():
    (columns,), _ = encode(row("a: 1\n", (2, "b")))
    assert columns[KIND].tolist() == [0, 0, 2, 1, 2, 0, 0, 0]
    assert spelled(columns, slice(None)) == "a:<think>b</think> 1\n"


def test_raw_is_the_text_alone_and_the_end_is_text():
    (columns,), _ = encode(row("a: 1\n", (2, "b")), form="raw", end_suffix=True)
    assert spelled(columns, slice(None)) == "a: 1\n<|im_end|>"
    assert (columns[KIND] == TEXT).all() and (columns[RESPONSE] == 1).all()


@pytest.mark.parametrize("form", ["raw", "interleaved", "prefixes"])
def test_other_delimiters_in_the_text_are_text(form):
    tokenizer = byte_tokenizer(["<think>", "</think>", "<tool_call>"])
    tokenizer = with_mask_token(tokenizer, tokenizer.convert_tokens_to_ids("<|mask|>"))
    text, report = "a <tool_call> <|im_end|> b", PackingReport()
    encoder = ThoughtEncoder(form=form, min_prefix=1, min_suffix=1)
    (batch,) = encoder([row(text, (2, "<tool_call>"))], tokenizer, special_ids(tokenizer), report)
    ids, kind = batch.columns[IDS], batch.columns[KIND]
    assert tokenizer.decode(ids[kind == TEXT].tolist()) == text
    written = set(ids[kind != DELIMITER].tolist())
    assert not added_ids(tokenizer) & written and report.added_tokens_in_text == 0
    assert (kind == DELIMITER).sum() == 2 * (form == "interleaved")


def test_rows_of_one_source_have_one_origin():
    rows = [row("a b", (1, "x"), source_sha=sha) for sha in "pqpr"]
    rows[3]["augmented_text"] = "a b"
    rows.append(row("a b", (1, "x"), source_sha="s"))
    (batch,) = ThoughtEncoder()(rows, TOKENIZER, SPECIAL, PackingReport())
    assert batch.origins.tolist() == [0, 1, 0, 2]
    # Of two that are too short each is of a document with another row. A document has the same
    # number in a form that leaves nothing out.
    rows = [row(text, (len(text) - 2, "x"), source_sha=sha) for text, sha in
            (("a b", "p"), ("long b", "q"), ("a b", "q"), ("longer b", "p"))]  # fmt: skip
    encoder = ThoughtEncoder(form="prefixes", min_prefix=3, min_suffix=1)
    (batch,) = encoder(rows, TOKENIZER, SPECIAL, PackingReport())
    assert batch.origins.tolist() == [1, 0] and len(batch.lengths) == 2
    (batch,) = ThoughtEncoder()(rows, TOKENIZER, SPECIAL, PackingReport())
    assert batch.origins.tolist() == [0, 1, 1, 0]


def test_prefixes_are_cut_at_the_first_thought_that_leaves_enough():
    text = "one two  three four"
    thoughts = [(3, "x"), (9, "y"), (14, "z")]
    for least, prefix in ((1, "one"), (4, "one two"), (9, "one two  three")):
        (columns,), _ = encode(
            row(text, *thoughts), form="prefixes", min_prefix=least, min_suffix=5
        )
        # White space goes to the suffix, also that before the place of the thought.
        assert spelled(columns, columns[RESPONSE] == 0) == prefix
        assert spelled(columns, columns[RESPONSE] == 1) == text[len(prefix) :]
        assert (columns[KIND] == TEXT).all()
    rows = [row(text, *thoughts), row(text)]
    found, report = encode(
        *rows, form="prefixes", min_prefix=9, min_suffix=6, limits=Limits(min_thoughts=0)
    )
    assert found == [] and (report.short_documents, report.unmarked_documents) == (1, 1)
    assert report.tokens == report.dropped_tokens == len(text)


def test_what_is_refused_is_counted_by_reason_in_every_form():
    rows = [
        row("a b", (1, "x")),
        row("a b", (1, "x")) | {"augmented_text": "a <think>x</think> c"},
        row("a b"),
        row("a b") | {"augmented_text": "a <think>x b"},
    ]
    for form in ("interleaved", "raw", "prefixes"):
        found, report = encode(*rows, form=form, min_prefix=1, min_suffix=1)
        assert len(found) == 1 and report.documents == 4
        reasons = {"text_changed": 1, "too_few_thoughts": 1, "unbalanced": 1}
        assert report.rejected_documents == reasons
        assert "1 rejected (text changed), 1 rejected (too few thoughts)" in str(report)


def test_a_delimiter_is_one_token():
    assert delimiter_id(TOKENIZER, "<think>", "data.open") == OPEN
    with pytest.raises(DataError, match=r"^data\.open=<thought>: 9 tokens of .*allowed: a text"):
        encode(row("a"), open="<thought>")
    with pytest.raises(DataError, match=r"^data\.form=all: allowed interleaved, raw, prefixes"):
        ThoughtEncoder(form="all")


@given(st.lists(st.text(max_size=8), min_size=1, max_size=5))
@settings(max_examples=20, deadline=None)
def test_a_document_is_in_one_share(sources):
    for source in sources:
        assert share_of(source, SHARES) == share_of(source, dict(SHARES)) in SHARES
        assert share_of(source, {"none": 0.0, "all": 1.0}) == "all"


def test_shares_have_their_sizes():
    found = Counter(share_of(str(n), SHARES) for n in range(10_000))
    # Three standard deviations of a binomial are 0.015 at most.
    assert all(abs(found[name] / 10_000 - part) < 0.015 for name, part in SHARES.items())


def write(path, documents=120, rows_each=2):
    """Several rows of every document, not together."""
    rows = [
        row(
            f"Sum {n}: 1 + {n} =\nAnswer: {n + 1}\n", (len(f"Sum {n}: 1 + {n} =\nAnswer:"), "so"),
            id=f"{n}#{part}", source_sha=f"sha{n}",
        )
        for part in range(rows_each)
        for n in range(documents)
    ]  # fmt: skip
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return rows


def test_shares_and_sides_are_disjoint_by_document(tmp_path):
    rows = write(tmp_path / "rows.jsonl")
    seen, ids = [], []
    for share in SHARES:
        files = ThoughtFiles(str(tmp_path / "rows.jsonl"), valid_fraction=0.3, share=share)
        for split in files.splits:
            found = list(files.documents(split))
            assert found
            seen.append({one["source_sha"] for one in found})
            ids += [one["id"] for one in found]
    assert sorted(ids) == sorted(one["id"] for one in rows)
    assert sum(map(len, seen)) == len(set().union(*seen)) == 120
    whole = ThoughtFiles(str(tmp_path / "rows.jsonl"), valid_fraction=0.3)
    for split, of_shares in zip(whole.splits, (seen[::2], seen[1::2]), strict=True):
        sources = {one["source_sha"] for one in whole.documents(split)}
        assert sources == set().union(*of_shares)
    assert len({files.fingerprint(), whole.fingerprint()}) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"share": "all"}, r"data\.share=all: allowed sft, rlmt, gate \(data\.shares\), null"),
        ({"share": "gate", "shares": {"sft": 1.0, "gate": 0.0}}, r"data\.share=gate: allowed sft "),
        ({"shares": {"sft": 0.5}}, r"data\.shares=\{'sft': 0\.5\}: allowed numbers whose sum is 1"),
    ],
    ids=["unknown", "empty", "sum"],
)
def test_shares_that_are_none(tmp_path, options, message):
    write(tmp_path / "rows.jsonl", 2)
    with pytest.raises(DataError, match=message):
        ThoughtFiles(str(tmp_path / "rows.jsonl"), **options)


def test_a_row_without_a_text_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "raw_text": "b"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: no text under 'source_sha' \(keys: id"):
        list(ThoughtFiles(str(path)).read(path))


@pytest.mark.parametrize("form", ["interleaved", "raw", "prefixes"])
def test_batches_of_every_form(tmp_path, form):
    rows = write(tmp_path / "rows.jsonl", 20)
    cfg = compose_config(
        "algo=sft_raw", "model=tiny_causal", 'model.extra_tokens=["<think>","</think>"]',
        "data=thoughts", f"data.files={tmp_path}/rows.jsonl", f"data.form={form}",
        "data.valid_fraction=0.3", "data.end_suffix=true", "data.min_prefix=1",
        "data.min_suffix=1", "model.length=64", "loader.global_batch_size=4",
        f"paths.cache_dir={tmp_path}/cache",
    )  # fmt: skip
    validate(cfg)
    data = LanguageData(cfg)
    batch = next(iter(data.train_loader(max_steps=1)))
    assert set(batch) == {
        "input_ids", "segment", "response", "kind", "token_mask", "loss_mask", "index", "position",
        "origin",
    }  # fmt: skip
    assert batch["input_ids"].shape == (4, 64) and batch["index"].shape == (4,)
    texts = {one["raw_text"] for one in rows}
    for ids, segment, response, kind, mask in zip(
        *(batch[name] for name in ("input_ids", "segment", "response", "kind", "token_mask")),
        strict=True,
    ):
        assert torch.equal(mask, segment == 0) and torch.equal(segment < 0, kind < 0)
        assert torch.equal(segment < 0, response < 0)
        text = data.tokenizer.decode(ids[kind == TEXT])
        assert text.removesuffix("<|im_end|>") in texts and text.endswith("\n<|im_end|>")
        assert data.tokenizer.decode(ids[kind == THOUGHT]) == "so" * (form == "interleaved")
        prefix = data.tokenizer.decode(ids[response == 0])
        assert prefix.endswith("\nAnswer:") if form == "prefixes" else prefix == ""
    assert data.packing_report("train").rows + data.packing_report("validation").rows == len(rows)
    for split in ("train", "validation"):
        assert data.packing_report(split).added_tokens_in_text == 0
        source = {}
        for batch in data.eval_loader(split):
            for ids, kind, origin in zip(
                batch["input_ids"], batch["kind"], batch["origin"], strict=True
            ):
                source.setdefault(origin.item(), []).append(
                    data.tokenizer.decode(ids[kind == TEXT])
                )
        # Two rows of every document, with the same text.
        assert {len(texts) for texts in source.values()} == {2}
        assert all(len(set(texts)) == 1 for texts in source.values())


def prefixes_of(folder, *overrides):
    cfg = compose_config(
        "algo=sft_raw", "model=tiny_causal", 'model.extra_tokens=["<think>","</think>"]',
        "data=thoughts", f"data.files={folder}/rows.jsonl", "data.form=prefixes",
        "data.valid_fraction=0.3", f"paths.cache_dir={folder}/cache", *overrides,
    )  # fmt: skip
    return LanguageData(cfg)


def test_what_leaves_out_every_document_is_named(tmp_path):
    write(tmp_path / "rows.jsonl", 20)
    with pytest.raises(DataError, match=r"with data\.min_prefix=128, data\.min_suffix=64 \(\d+ do"):
        prefixes_of(tmp_path).rows("train")
    limits = ("data.limits.min_thoughts=7", "data.min_prefix=1", "data.min_suffix=1")
    with pytest.raises(DataError, match=r"with data\.limits\.min_thoughts=7 \(") as error:
        prefixes_of(tmp_path, *limits).rows("train")
    assert "rejected (too few thoughts)" in str(error.value)
    # What leaves out most comes first.
    report = PackingReport(documents=6, short_documents=2, unmarked_documents=1)
    report.rejected_documents |= {"unbalanced": 3}
    data = {"open": "<a>", "min_prefix": 5, "limits": {"min_thoughts": 0}}
    assert deciding_keys(data, report) == [
        "data.open=<a>", "data.close=null", "data.min_prefix=5", "data.min_suffix=null",
        "data.limits.min_thoughts=0",
    ]  # fmt: skip
    assert deciding_keys({}, PackingReport(documents=6)) == []


@pytest.mark.parametrize("algo", ["rlmt", "online_dpo"])
def test_whole_texts_are_no_prefixes(algo):
    asked = ("model=tiny_thinker", "data=thoughts", "data.files=rows.jsonl")
    with pytest.raises(ConfigError, match=r"data\.form=interleaved: rows without a prefix, and"):
        validate(compose_config(f"algo={algo}", *asked))
    validate(compose_config(f"algo={algo}", *asked, "data.form=prefixes"))
    validate(compose_config("algo=sft_thoughts", *asked))
