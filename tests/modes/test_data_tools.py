"""The data tools from the command line: a chain of all of them, and what users get wrong."""

import json

import pytest

from modes import audit_labels, decontaminate, mix, prompts, subtract
from runtime.errors import ConfigError
from runtime.run import load_summary
from runtime.validation import validate
from tests.runs import call_main
from tests.support import compose_config

QUESTIONS = [f"How much is {n} plus {n + 1} and why?" for n in range(20)]


def rows_of(source, prompts_of, **more):
    return [
        {"id": f"{source}-{n}", "source": source, "prompt": text, **more}
        for n, text in enumerate(prompts_of)
    ]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def chain(tmp_path):
    """New rows of two sources, an earlier set and an evaluation set, three rows in common each."""
    answers = {"response": "It is so.", "response_ids": [1, 2, 3], "finish": "stop"}
    new = [*rows_of("math", QUESTIONS, **answers), *rows_of("chat", ["Hi", "Hello"], **answers)]
    write(tmp_path / "new.jsonl", new)
    write(tmp_path / "old.jsonl", rows_of("old", QUESTIONS[:3]))
    write(tmp_path / "items.jsonl", [{"question": text, "answer": "1"} for text in QUESTIONS[3:6]])
    return tmp_path


def test_all_tools_through_main(chain, capsys):
    """Prompts, subtraction, decontamination, mix and audit, each on what the one before wrote."""

    def call(mode, *overrides):
        run_dir = chain / f"run_{mode}"
        where = (f"mode.output={chain}/{mode}", f"paths.run_dir={run_dir}", "trainer=cpu")
        assert call_main([f"mode={mode}", *where, *overrides]) == 0, capsys.readouterr().err
        return load_summary(run_dir)["metrics"]

    found = call("prompts", "prompts=gsm8k", f"prompts.table.files={chain}/items.jsonl")
    assert (found["rows_out"], found["complete"]) == (3, 0.0)
    assert "gsm8k: 3 rows; the complete set has 1319" in capsys.readouterr().out
    found = call(
        "subtract", f"mode.input={chain}/new.jsonl", f"mode.against=[{chain}/old.jsonl]",
        "mode.near=null",
    )  # fmt: skip
    assert (found["rows_in"], found["removed/exact"], found["rows_out"]) == (22, 3, 19)
    found = call(
        "decontaminate", f"mode.input={chain}/subtract/rows.jsonl",
        f"mode.against={chain}/prompts/rows.jsonl",
    )  # fmt: skip
    assert (found["removed/whole"], found["gsm8k/items_hit"], found["rows_out"]) == (3, 3, 16)
    source = f"mode.input={chain}/decontaminate/rows.jsonl"
    found = call("mix", source, "mode.counts={math: 9, chat: 2}")
    assert (found["mix/math/rows"], found["mix/chat/rows"], found["rows_in"]) == (9, 2, 16)
    found = call("audit_labels", f"mode.input={chain}/mix/rows.jsonl")
    assert (found["all/rows"], found["math/mean"], found["all/capped"]) == (11, 3.0, 0.0)
    assert "0.0 [0.0, 25.9]" in capsys.readouterr().out
    assert (chain / "audit_labels/labels.png").read_bytes().startswith(b"\x89PNG")
    manifest = json.loads((chain / "audit_labels/manifest.json").read_text())
    summary = load_summary(chain / "run_audit_labels")
    assert summary["provenance"]["data_fingerprint"] == manifest["key"]
    assert "nothing has changed" not in capsys.readouterr().out
    assert call("mix", source, "mode.counts={math: 9, chat: 2}")["reused"] == 1.0
    assert f"{chain}/mix (as it was: nothing has changed)" in capsys.readouterr().out


def config(chain, mode, *overrides):
    cfg = compose_config(
        f"mode={mode}", f"mode.output={chain}/out", "trainer=cpu", *overrides, run_dir=chain / "r"
    )
    validate(cfg)
    return cfg


def test_anchors_and_groups(chain):
    found = mix.run(
        config(
            chain, "mix", f"mode.input={chain}/new.jsonl", f"mode.anchor_input={chain}/old.jsonl",
            "mode.counts={all: 10}", "mode.groups={all: [math, chat, old]}",
            "mode.anchors={all: 2}",
        )
    )  # fmt: skip
    assert (found["mix/all/anchors"], found["mix/all/rows"]) == (2, 10)
    one = mix.run(
        config(
            chain, "mix", f"mode.input={chain}/new.jsonl", "mode.counts={a: 3}",
            "mode.groups={a: m*}",
        )
    )  # fmt: skip
    assert one["mix/a/rows"] == 3


def test_near_duplicates_by_default(chain):
    pytest.importorskip("datasketch")
    text = "a train leaves the station at noon and drives for three hours at sixty miles an hour"
    write(chain / "near.jsonl", rows_of("near", [text, text + " !"]))
    found = subtract.run(
        config(chain, "subtract", f"mode.input={chain}/near.jsonl", "mode.within=true")
    )
    assert (found["removed/near"], found["rows_out"]) == (1, 1)


def test_languages_and_words(chain):
    pytest.importorskip("langdetect")
    answer = {"response": "The train leaves at noon and arrives in the evening."}
    write(chain / "words.jsonl", rows_of("w", ["a", "b"], **answer))
    cfg = config(
        chain, "audit_labels", f"mode.input={chain}/words.jsonl", "mode.language_share=1.0"
    )
    assert audit_labels.run(cfg)["w/mean"] == 10
    figures = json.loads((chain / "out" / "labels.json").read_text())
    assert figures["sources"]["w"]["languages"] == {"en": 2} and figures["unit"] == "words"
    assert audit_labels.table(figures["sources"], "words").count("en 100.0 %") == 2


def test_what_a_set_hit_is_reported(chain):
    items = rows_of("bench", [QUESTIONS[0], QUESTIONS[1]])
    write(chain / "bench.jsonl", items)
    found = decontaminate.run(
        config(
            chain, "decontaminate", f"mode.input={chain}/new.jsonl",
            f"mode.against={chain}/bench.jsonl",
        )
    )  # fmt: skip
    assert (found["bench/items"], found["bench/items_hit"], found["bench/rows_hit"]) == (2, 2, 2)
    assert {hit["item"] for hit in read(chain / "out" / "hits.jsonl")} == {"bench-0", "bench-1"}


@pytest.mark.parametrize(
    ("mode", "overrides", "message"),
    [
        (subtract, ["mode.input={0}/new.jsonl"], r"mode\.against=\[\]: there is nothing to sub"),
        (subtract, ["mode.input=[]"], r"mode\.input=\[\]: wrong value; allowed: a \.jsonl file"),
        (subtract, ["mode.input={0}/none.jsonl", "mode.within=true"], r"mode\.input: .*no such"),
        (
            subtract,
            ["mode.input={0}/new.jsonl", "mode.within=true", "mode.near.threshold=2"],
            "threshold=2: allowed",
        ),
        (
            subtract,
            ["mode.input={0}/new.jsonl", "mode.within=true", "+mode.near.size=2"],
            r"mode\.near\.size: unknown option of NearRule",
        ),
        (mix, ["mode.input={0}/new.jsonl", "mode.counts={{a:-1}}"], r"mode\.counts=.*allowed"),
        (mix, ["mode.input={0}/new.jsonl", "mode.counts={{a:1}}"], "group a .* available 0"),
        (mix, ["mode.input={0}/n*", "mode.counts={{a:1}}", "mode.groups={{a:[]}}"], "mode.groups"),
        (audit_labels, ["mode.input={0}/old.jsonl"], r"old\.jsonl:1: row 'old-0' has no 'respon"),
        (prompts, [], "prompts=null: nothing to write; allowed: gsm8k, humaneval, "),
        (prompts, ["prompts=gsm8k", "mode.limit=0"], r"mode\.limit=0: wrong value"),
    ],
)
def test_what_users_get_wrong(chain, mode, overrides, message):
    name = mode.__name__.removeprefix("modes.")
    overrides = [text.format(chain) for text in overrides]
    with pytest.raises((ConfigError, ValueError), match=message) as error:
        mode.run(config(chain, name, *overrides))
    assert "\n" not in str(error.value)
