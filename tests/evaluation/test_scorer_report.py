"""A whole measurement: parts by round and entropy, its metrics, rows, tables and pictures."""

import json
import math

import numpy as np
import pytest

from data.errors import DataError
from evaluation.grouped import Measure
from evaluation.scorer_evaluation import entropy_buckets, evaluate, metrics_of
from evaluation.scorer_report import markdown_text, show, terminal_text, verdict, write_report
from evaluation.scorer_rows import read_blocks, write_blocks
from tests.evaluation.scored_blocks import BY_HAND, random_blocks


@pytest.fixture(scope="module")
def measured():
    blocks = random_blocks(0, 200, skill=2.0)
    return blocks, evaluate(blocks, 1.0, resamples=300)


def test_parts_are_measured_like_wholes(measured):
    blocks, found = measured
    assert [part.name for part in found.rounds] == ["round 1", "round 2"]
    for number, part in enumerate(found.rounds):
        alone = blocks.round(number)
        assert part == evaluate(alone, 1.0, resamples=300).whole._replace(name=part.name)
    assert [part.selection.blocks for part in found.buckets] == [50] * 4
    assert sum(part.selection.right for part in found.buckets) == found.whole.selection.right
    for part, (_, chosen) in zip(found.buckets, entropy_buckets(blocks, 4), strict=True):
        assert part.ordering == evaluate(blocks.among(chosen), 1.0, resamples=300).whole.ordering
    assert found.gate.gain == found.whole.selection.gain == found.sweep[5].gain


def test_buckets_of_entropy():
    found = {name: chosen.tolist() for name, chosen in entropy_buckets(BY_HAND, 2)}
    assert found == {
        "entropy 0.1 to 1.5": [True, True, False, True, False],
        "entropy 2 to 2.5": [False, False, True, False, True],
    }
    same = BY_HAND._replace(entropy_M=np.array([0.0, 0.0, 0.0, 0.0, 2.0]))
    assert [chosen.sum() for _, chosen in entropy_buckets(same, 4)] == [4, 1]


def test_metrics_are_numbers(measured):
    found = metrics_of(measured[1])
    whole = measured[1].whole
    assert found["gain"] == whole.selection.gain.value
    assert found["gain_low"] == whole.selection.gain.low
    assert found["ships"] == 1 and found["groups"] > 40
    for key in ("round_2/mrr", "entropy_4/auroc", "alpha_0.05/bon", "alpha_inf/gain_high",
                "baseline/random", "pairwise", "tau", "ece", "gain_p", "flips"):  # fmt: skip
        assert math.isfinite(found[key]), key
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["alpha_0/bon"] == found["greedy"]


def test_rows_give_every_number_back(tmp_path, measured):
    blocks, found = measured
    path = tmp_path / "run" / "blocks.jsonl"
    write_blocks(path, blocks)
    again = read_blocks(path)
    assert evaluate(again, 1.0, resamples=300) == found
    np.testing.assert_array_equal(again.score_MC, blocks.score_MC)
    write_blocks(tmp_path / "again.jsonl", again)
    assert (tmp_path / "again.jsonl").read_bytes() == path.read_bytes()
    write_blocks(tmp_path / "few.jsonl", BY_HAND)
    row = json.loads((tmp_path / "few.jsonl").read_text().splitlines()[0])
    assert row == {
        "group": 7, "entropy": 0.5, "truth_score": 3.0, "valid": [True, True, False],
        "errors": [1, 0, None], "log_q": [-1.0, -2.0, None], "score": [0.0, 3.0, None],
        "score_rounds": [[0.0, 4.0, None], [0.0, 2.0, None]],
    }  # fmt: skip
    assert read_blocks(tmp_path / "few.jsonl").truth_score_RM is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"score": None}, ":1: no row of scored blocks"),
        ({"score": [0.0]}, ":1: its lists do not have one entry per candidate"),
        ({"errors": [None, 0, None]}, ":1: null or text stands where"),
        ({"log_q": [-1.0, "x", None]}, ":1: null or text stands where"),
        ({"group": "a"}, ":1: null or text stands where"),
        ({"valid": [False, True, False], "errors": [None, 0, None]}, "block 0: candidate 0 is"),
        ({"truth_score_rounds": [1.0, 2.0]}, ":2: its candidates or rounds are not as many"),
    ],
)  # fmt: skip
def test_rows_that_are_none(tmp_path, change, message):
    path = tmp_path / "blocks.jsonl"
    write_blocks(path, BY_HAND)
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | change), *others]))
    with pytest.raises(DataError, match=message) as error:
        read_blocks(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match="cannot be read"):
        read_blocks(tmp_path / "absent.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(DataError, match=r"empty\.jsonl: no row"):
        read_blocks(tmp_path / "empty.jsonl")
    (tmp_path / "cut.jsonl").write_text('{"group": 1, "ent')
    with pytest.raises(DataError, match=r"cut\.jsonl:1: no row of scored blocks"):
        read_blocks(tmp_path / "cut.jsonl")


def test_cells():
    assert show(Measure(0.5, 0.25, 0.75, 8), "+") == "+0.500 [+0.250, +0.750]"
    assert show(Measure(0.5, None, None, 8)) == "0.500"
    assert show(Measure(None, None, None, 0)) == "-"


def test_tables_by_hand():
    found = evaluate(BY_HAND, 1.0, buckets=1, resamples=50)
    text = terminal_text(found)
    by_alpha = text.split("\n\n")[1].splitlines()
    assert by_alpha[0] == "Alpha" and by_alpha[1].split()[:4] == ["alpha", "n", "oracle", "greedy"]
    assert by_alpha[-1].startswith("inf") and "+0.200 [" in by_alpha[-1]
    assert verdict(found.gate).startswith("Scorer does not ship: gain +0.000 [")
    assert verdict(found.gate).endswith(
        "5 blocks of 3 groups, fewer than the 20 that shipping asks for."
    )
    markdown = markdown_text(found, "beam")
    rows = [line for line in markdown.splitlines() if line.startswith("| 1 |")]
    assert len(rows) == 1 and rows[0].count("|") == 14
    # Every row of a table has the cells of its header.
    for table in markdown.split("\n\n"):
        if table.startswith("|"):
            assert len({line.count("|") for line in table.splitlines()}) == 1


def test_a_run_leaves_its_files(tmp_path, measured):
    text = write_report(tmp_path, "beam", *measured)
    assert (tmp_path / "scorer.md").read_text() == text
    assert text.startswith("# beam\n\nScorer ships: gain +")
    for name in ("scorer_alpha.png", "scorer_reliability.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    assert len((tmp_path / "blocks.jsonl").read_text().splitlines()) == 200


def test_pictures_of_hardly_anything(tmp_path):
    """One group has no intervals, one candidate nothing to calibrate."""
    lone = BY_HAND.among(np.array([3]))
    found = evaluate(lone, 1.0, resamples=10)
    assert found.whole.calibration.decidable == 0 and found.whole.selection.bon.low is None
    write_report(tmp_path, "lone", lone, found)
    assert (
        "Scorer does not ship: gain +0.000 at alpha=1, p=-" in (tmp_path / "scorer.md").read_text()
    )
