"""Conversations become the very tokens that the target read and wrote."""

import json

import pytest

from data.blocks import RESPONSE, PackingReport
from data.chat import ChatFiles
from data.chat_encoding import ChatEncoder, prompt_ids
from data.errors import DataError
from data.tokenization import (
    load_tokenizer,
    special_ids,
    tokenizer_from_state,
    tokenizer_state,
)
from dataloader import LanguageData
from tests.support import compose_config

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant{% if enable_thinking %} think{% endif %}{% endif %}"
)
WORDS = "user assistant system think one two three four"


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = load_tokenizer("word", documents=[WORDS])
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def rows(*answers, **more):
    return [
        {"id": str(n), "source": "s", "messages": [{"role": "user", "content": "one"}], **answer,
         "text": "one", **more}
        for n, answer in enumerate(answers)
    ]  # fmt: skip


def encode(tokenizer, documents, **options):
    report = PackingReport()
    special = special_ids(tokenizer)
    return next(ChatEncoder(**options)(documents, tokenizer, special, report)), report


def words(tokenizer, batch):
    return tokenizer.convert_ids_to_tokens(batch.columns["input_ids"].tolist())


def test_prompt_then_answer_then_end_of_turn(tokenizer):
    batch, report = encode(tokenizer, rows({"response": "two three"}))
    assert words(tokenizer, batch) == ["user", "one", "assistant", "two", "three", "[EOS]"]
    assert batch.columns[RESPONSE].tolist() == [0, 0, 0, 1, 1, 1]
    assert report.documents == 1 and report.tokens == 6


def test_an_answer_that_was_cut_off_has_no_end(tokenizer):
    batch, _ = encode(tokenizer, rows({"response": "two three", "finish": "length"}))
    assert words(tokenizer, batch)[-1] == "three"


def test_the_tokens_of_the_target_are_taken_as_they_are(tokenizer):
    ids = tokenizer.convert_tokens_to_ids(["four", "four"])
    batch, _ = encode(tokenizer, rows({"response": "two", "response_ids": ids}))
    assert words(tokenizer, batch)[3:] == ["four", "four"]


def test_thinking_is_for_the_row_to_say(tokenizer):
    assert "think" in words(
        tokenizer, encode(tokenizer, rows({"response": "two"}), thinking=True)[0]
    )
    batch, _ = encode(tokenizer, rows({"response": "two", "thinking": False}), thinking=True)
    assert "think" not in words(tokenizer, batch)


def test_an_id_of_another_target_is_refused(tokenizer):
    with pytest.raises(DataError, match=r"row '0': response_ids has 999.*another target"):
        encode(tokenizer, rows({"response": "two", "response_ids": [999]}))


def test_without_a_template_it_says_whose_to_use():
    plain = load_tokenizer("word", documents=[WORDS])
    with pytest.raises(DataError, match=r"no chat template.*tokenizer_name_or_path=target"):
        prompt_ids(plain, [{"role": "user", "content": "one"}], False, "row 'a'")


def test_a_template_that_refuses_names_the_row(tokenizer):
    picky = tokenizer_from_state(tokenizer_state(tokenizer))
    picky.chat_template = "{{ raise_exception('only pairs') }}"
    with pytest.raises(DataError, match=r"row 'a': the chat template refuses it .*only pairs"):
        prompt_ids(picky, [{"role": "user", "content": "one"}], False, "row 'a'")


def test_the_template_travels_with_the_tokenizer(tokenizer):
    again = tokenizer_from_state(tokenizer_state(tokenizer))
    message = [{"role": "user", "content": "two"}]
    assert prompt_ids(again, message, False, "") == prompt_ids(tokenizer, message, False, "")


def test_rows_of_a_file_through_the_data_module(tokenizer, tmp_path):
    answered = [
        {"id": str(n), "source": "s", "prompt": f"one {WORDS.split()[n % 8]}", "response": "two"}
        for n in range(40)
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in answered))
    cfg = compose_config(
        "data=chat", f"data.files={path}", "data.valid_fraction=0.3", "model.length=16",
        f"paths.cache_dir={tmp_path}/cache", "loader.global_batch_size=4",
    )  # fmt: skip
    data = LanguageData(cfg, tokenizer)
    batch = next(iter(data.train_loader(max_steps=1)))
    assert set(batch) >= {"input_ids", "response", "segment", "position", "index"}
    answers = tokenizer.convert_ids_to_tokens(batch["input_ids"][batch["response"] == 1].tolist())
    assert set(answers) == {"two", "[EOS]"}
    report = data.packing_report("train")
    texts = {document["text"] for document in data.source.documents("train")}
    held_out = {document["text"] for document in data.source.documents("validation")}
    assert texts and held_out and not texts & held_out
    assert report.documents + data.packing_report("validation").documents == 40


def test_an_unanswered_row_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": "a", "source": "s", "prompt": "one"}\n')
    with pytest.raises(DataError, match=r"rows\.jsonl:1: row 'a' has no 'response'"):
        list(ChatFiles(str(path), valid_fraction=0.5).read(path))
