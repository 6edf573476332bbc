"""OlympiadBench: rows with one exact answer, counted; the benchmark and its prompts."""

import json
import logging

import pytest

from data.errors import DataError
from data.olympiad import OlympiadTable
from data.prompt_tables import HubTable
from runtime.config import instantiate
from tests.support import compose_config


def item(number, **more):
    return {
        "id": 1600 + number, "question": f"Halve {2 * number}.", "final_answer": [f"${number}$"],
        "error": None, "is_multiple_answer": False, "subfield": "Algebra", "solution": ["Easy."],
    } | more  # fmt: skip


ITEMS = [
    item(0), item(1, error="1e-2"), item(2, is_multiple_answer=True, final_answer=["2", "-2"]),
    item(3), item(4, final_answer=None), item(5, final_answer=["\\$5"]), item(6),
]  # fmt: skip


def write(folder, items=ITEMS):
    path = folder / "olympiad.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in items))
    return path


def rows_in(folder, first=None, items=ITEMS):
    table = HubTable("owner/name", "test", files=str(write(folder, items)))
    return OlympiadTable(table, first)


def test_rows_with_one_exact_answer_are_kept_and_the_others_counted(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        kept = list(rows_in(tmp_path).items())
    assert [(place.rsplit(":")[-1], one["final_answer"]) for place, one in kept] == [
        ("1", "0"), ("4", "3"), ("6", "\\$5"), ("7", "6"),
    ]  # fmt: skip
    assert caplog.messages == [
        "OlympiadBench: 3 rows are left out"
        " (1 with a tolerance, 1 with several answers, 1 without an answer)"
    ]
    # The first rows are counted before any is left out.
    first = rows_in(tmp_path, 4)
    assert [one["id"] for _, one in first.items()] == [1600, 1603]
    assert first.fingerprint() != rows_in(tmp_path).fingerprint()


def test_rows_of_another_shape(tmp_path):
    with pytest.raises(DataError, match=r"olympiad\.jsonl:1: no column 'error'; there are id, "):
        list(rows_in(tmp_path, items=[{"id": 1, "question": "?", "final_answer": ["1"]}]).items())
    with pytest.raises(DataError, match=r"olympiad\.jsonl:1: final_answer=\[1\]; allowed: texts"):
        list(rows_in(tmp_path, items=[item(1, final_answer=[1])]).items())
    with pytest.raises(DataError, match=r"prompts\.table\.first=0: allowed: an integer >= 1, or"):
        rows_in(tmp_path, 0)


def test_the_benchmark(tmp_path):
    pytest.importorskip("math_verify", reason="needs the package math-verify")
    files = f"benchmark.olympiad_bench.prompts.table.table.files={write(tmp_path)}"
    cfg = compose_config("benchmark=olympiad_bench", files)
    benchmark = instantiate(cfg.benchmark.olympiad_bench)
    assert (benchmark.expected, benchmark.few_shot.shots) == (220, 0)
    prompts = benchmark.make_prompts()
    assert [prompt.id for prompt in prompts] == [f"olympiad_bench/160{n}" for n in (0, 3, 5, 6)]
    boxed = "Please reason step by step, and put your final answer within \\boxed{}."
    assert prompts[1].text == f"Problem:\nHalve 6.\n{boxed}\n\nSolution:"
    assert prompts[1].row["messages"][0]["content"] == f"Halve 6.\n{boxed}"
    assert prompts[1].row["subfield"] == "Algebra"
    verdict = benchmark.grader.grade(prompts[1].row, " So it is $\\boxed{ 3 }$.")
    assert verdict.correct and verdict.extracted == "3"
