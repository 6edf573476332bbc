"""Questions with choices: their order, and the user's own file."""

import gzip
import json
from collections import Counter

import pytest
from omegaconf import OmegaConf

from data.chat import check_row, prompt_hash
from data.errors import DataError
from data.multiple_choice import ChoicePrompts
from data.prompt_tables import FileTable
from runtime.config import instantiate
from tests.support import compose_config

COLUMNS = ("Record ID", "Question", "Correct Answer",
           "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")  # fmt: skip


def item(number, **more):
    texts = [f"rec{number}", f"Question {number}?\nIt has \"two\" lines, {{braces}}.",
             *(f"choice {n} of {number}" for n in range(4))]  # fmt: skip
    return dict(zip(COLUMNS, texts, strict=True)) | more


def write_csv(path, items):
    def line(cells):
        return ",".join('"' + cell.replace('"', '""') + '"' for cell in cells) + "\r\n"

    lines = [line(items[0]), *(line(one.values()) for one in items)]
    path.write_bytes("".join(lines).encode("utf-8-sig"))
    return path


def prompts_of(files, *overrides):
    cfg = compose_config(
        "benchmark=gpqa_diamond", f"benchmark.gpqa_diamond.prompts.table.files={files}", *overrides
    )
    return instantiate(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)).benchmark
                       .gpqa_diamond.prompts)  # fmt: skip


def test_rows_of_a_csv_with_the_published_columns(tmp_path):
    path = write_csv(tmp_path / "gpqa.csv", [item(n, Subdomain="x") for n in range(40)])
    rows = list(prompts_of(path).rows())
    assert [row["id"] for row in rows] == [f"gpqa_diamond/rec{n}" for n in range(40)]
    for number, row in enumerate(rows):
        check_row(row, "here")
        assert row["question"] == item(number)["Question"]
        shown = dict(line[1:].split(") ", 1) for line in row["choices"].splitlines())
        assert list(shown) == list("ABCD")
        assert sorted(shown.values()) == [f"choice {n} of {number}" for n in range(4)]
        assert shown[row["answer"]] == f"choice 0 of {number}"
        content = row["messages"][0]["content"]
        assert content.startswith(f"{row['question']}\n\n{row['choices']}\n\n")
        assert row["prompt_hash"] == prompt_hash(row)


def test_csv_and_jsonl_are_the_same(tmp_path):
    items = [item(n) for n in range(5)]
    text = "".join(json.dumps(one) + "\n" for one in items)
    (tmp_path / "a.jsonl").write_text(text)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    found = [
        list(prompts_of(path).rows())
        for path in (write_csv(tmp_path / "a.csv", items), tmp_path / "a.jsonl",
                     tmp_path / "b.jsonl.gz")
    ]  # fmt: skip
    assert found[0] == found[1] == found[2]


def test_the_order_depends_on_seed_and_id_alone(tmp_path):
    path = write_csv(tmp_path / "a.csv", [item(n) for n in range(400)])
    rows = {row["id"]: row["choices"] for row in prompts_of(path).rows()}
    few = write_csv(tmp_path / "b.csv", [item(n) for n in (7, 3)])
    for row in prompts_of(few).rows():
        assert row["choices"] == rows[row["id"]]
    other = prompts_of(path, "benchmark.gpqa_diamond.prompts.seed=1", "seed=9")
    same = sum(row["choices"] == rows[row["id"]] for row in other.rows())
    assert 5 <= same <= 35  # of 400 orders one in 24
    assert other.fingerprint() != prompts_of(path).fingerprint()
    assert prompts_of(path, "seed=9").fingerprint() == prompts_of(path).fingerprint()
    # A literal, because answers of earlier runs rely on it.
    made = prompts_of(path)
    assert made.order("gpqa_diamond/rec7", 4) == [3, 2, 1, 0]


def test_every_letter_is_right_about_as_often(tmp_path):
    made = prompts_of(write_csv(tmp_path / "a.csv", [item(0)]))
    places = Counter(made.order(f"id {n}", 4).index(0) for n in range(2000))
    assert set(places) == {0, 1, 2, 3} and all(430 < count < 570 for count in places.values())


def test_without_a_file_the_message_says_why():
    with pytest.raises(
        DataError,
        match=r"benchmark\.gpqa_diamond\.prompts\.table\.files=null: GPQA may not be passed on.*;"
        r" allowed: a \.csv or \.jsonl file",
    ):
        list(prompts_of("null").rows())


def test_one_file_is_read_and_no_first_of_several(tmp_path):
    for name in "ab":
        write_csv(tmp_path / f"{name}.csv", [item(0)])
    message = (
        r"benchmark\.gpqa_diamond\.prompts\.table\.files=.*/\*\.csv: 2 files \(.*a\.csv, .*b\."
    )
    for use in (lambda made: list(made.rows()), lambda made: made.fingerprint()):
        with pytest.raises(DataError, match=message):
            use(prompts_of(f"'{tmp_path}/*.csv'"))
    assert list(prompts_of(f"'{tmp_path}/a*.csv'").rows())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "Record ID,Question\nx\n", r"a\.csv:2: not as many cells as the first line has"),
        ("a.csv", "Record ID,Question\nx,y,z\n", r"a\.csv:2: not as many cells"),
        ("a.csv", 'Record ID\n"x"y"\n', r"a\.csv: not CSV behind line 1 "),
        ("a.csv", "Record ID,Question\nx,y\n", r"a\.csv:2: no text in column 'Correct Answer'"),
        ("a.jsonl", '{"Record ID": 3}\n', r"a\.jsonl:1: no text in column 'Record ID'"),
        ("a.jsonl", "{\n", r"a\.jsonl:1: not JSON"),
        ("a.xlsx", "x", r"a\.xlsx: unknown type; allowed are \.csv and \.jsonl"),
        ("a.csv", "", r"a\.csv: the file is empty"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        list(prompts_of(tmp_path / name).rows())
    assert "\n" not in str(error.value)
    with pytest.raises(DataError, match=r"none\.csv: no such file"):
        list(prompts_of(tmp_path / "none.csv").rows())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"template": "{question}"}, r"template='\{question\}': allowed: a text with"),
        ({"incorrect": []}, r"incorrect=\[\]: allowed: 1 to 9 columns"),
    ],
)
def test_impossible_options(options, message):
    values = {"template": "{question}{choices}", "incorrect": ["b"]} | options
    with pytest.raises(DataError, match=message):
        ChoicePrompts("x", FileTable(None), "q", "a", **values)
