"""Rows of conversations: what is read, what is refused and how, and what makes prompts equal."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.chat import (
    check_row,
    messages_of,
    normalised,
    prompt_hash,
    prompt_key,
    read_chat,
    read_placed,
    to_line,
)
from data.errors import DataError

PROMPT = {"id": "1", "source": "s", "prompt": "Add 1 and 2."}
TURNS = {
    "id": "2",
    "source": "s",
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Add 1 and 2."},
    ],
}
ANSWERED = PROMPT | {"response": "3", "response_ids": [18, 2], "finish": "stop", "more": [None]}


def write(path, rows):
    path.write_text("".join(to_line(row) for row in rows))
    return path


def test_rows_come_back_as_they_were(tmp_path):
    rows = [PROMPT, TURNS, ANSWERED]
    path = write(tmp_path / "a.jsonl", rows)
    assert list(read_chat(path)) == rows
    packed = tmp_path / "a.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert list(read_chat(packed)) == rows


def test_blank_lines_count_as_lines_but_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(f"\n{to_line(PROMPT)}  \n{to_line(TURNS)}")
    assert [place for place, _ in read_placed(path)] == [f"{path}:2", f"{path}:4"]


def test_messages_of_both_forms():
    assert messages_of(PROMPT) == [{"role": "user", "content": "Add 1 and 2."}]
    assert messages_of(TURNS) is TURNS["messages"]


def test_the_key_is_of_the_users_turns_alone():
    assert prompt_key(TURNS) == "hello add 1 and 2."
    shout = PROMPT | {"prompt": "  ADD\t1\nand\u00a0\uff12. ", "id": "other"}
    assert prompt_key(shout) == prompt_key(PROMPT) == "add 1 and 2."
    assert prompt_hash(shout) == prompt_hash(PROMPT) != prompt_hash(TURNS)
    assert len(prompt_hash(PROMPT)) == 32


@given(st.text())
def test_normalising_twice_changes_nothing_more(text):
    once = normalised(text)
    # Folding may bring up another capital or space (of some ligatures), never a third time.
    assert normalised(normalised(once)) == normalised(once)
    assert once == once.strip() and "  " not in once


@given(st.text(st.characters(), max_size=20))
def test_any_text_survives_a_line(text):
    row = PROMPT | {"prompt": text + "\ud800", "id": "x" + text}
    line = to_line(row)
    assert json.loads(line.encode().decode()) == row and line.count("\n") == 1


def test_a_line_stays_readable():
    assert "é" in to_line(PROMPT | {"prompt": "é"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"a\.jsonl:2: not JSON \("),
        ("[]", r"a\.jsonl:2: a row must be a JSON object"),
        pytest.param("[" * 10**5, r"a\.jsonl:2: not JSON \(", id="nested deeply"),
        ('{"source": "s", "prompt": ""}', r":2: no text under 'id' \(keys: source, prompt\)"),
        ('{"id": 1, "source": "s", "prompt": ""}', "no text under 'id'"),
        ('{"id": "1", "source": "", "prompt": ""}', "no text under 'source'"),
        ('{"id": "1", "source": "s"}', "row '1' needs either 'messages' or 'prompt'"),
        ('{"id": "1", "source": "s", "prompt": "", "messages": []}', "needs either"),
        ('{"id": "1", "source": "s", "prompt": 3}', "'prompt' of row '1' is no text"),
        ('{"id": "1", "source": "s", "messages": []}', "'messages' must be a list of turns"),
        ('{"id": "1", "source": "s", "messages": ["a"]}', "turn 0 needs a 'content' and a 'role'"),
        (
            '{"id": "1", "source": "s", "messages": [{"role": "robot", "content": ""}]}',
            "'role' of system, user, assistant, tool",
        ),
        (
            '{"id": "1", "source": "s", "messages": [{"role": "assistant", "content": ""}]}',
            "its last turn is the assistant's",
        ),
        ('{"id": "1", "source": "s", "prompt": "", "response_ids": [true]}', "must be token ids"),
        ('{"id": "1", "source": "s", "prompt": "", "response_ids": [-1]}', "must be token ids"),
        ('{"id": "1", "source": "s", "prompt": "", "response_ids": "1"}', "must be token ids"),
    ],
)
def test_what_is_wrong_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_text(f"{to_line(PROMPT)}{line}\n")
    with pytest.raises(DataError, match=message) as error:
        list(read_chat(path))
    assert "\n" not in str(error.value)


def test_an_answer_is_asked_for_where_it_is_needed(tmp_path):
    path = write(tmp_path / "a.jsonl", [ANSWERED, PROMPT])
    assert len(list(read_chat(path))) == 2
    with pytest.raises(DataError, match=r"a\.jsonl:2: row '1' has no 'response'"):
        list(read_chat(path, answered=True))
    check_row(ANSWERED, "here", answered=True)


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"id": "\xff"}')
    with pytest.raises(DataError, match=r"a\.jsonl: not UTF-8 at line 1, byte 8"):
        list(read_chat(path))
