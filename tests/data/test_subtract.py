"""Rows minus the prompts of earlier sets."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.chat import prompt_key, to_line
from data.errors import DataError
from data.near import NearRule
from data.subtract import subtract

LONG = "a train leaves the station at noon and drives for three hours at sixty miles an hour"


def row(name, prompt, source="math", **more):
    return {"id": name, "source": source, "prompt": prompt, **more}


def write(path, rows):
    path.write_text("".join(map(to_line, rows)))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def run(tmp_path):
    def subtracted(rows, against, rule=None, within=False):
        files = [write(tmp_path / "rows_in.jsonl", rows)]
        seen = [write(tmp_path / "seen.jsonl", against)] if against else []
        out = tmp_path / "out"
        manifest = subtract(out, files, seen, rule, within)
        return manifest, read(out / "rows.jsonl"), read(out / "removed.jsonl")

    return subtracted


def test_exact_by_hand(run, tmp_path):
    rows = [
        row("1", "What is  TWO?"),
        row("2", "Three?", "code", answer=3),
        row("3", "three?", "code"),
    ]
    manifest, kept, removed = run(rows, [row("old", "what is two?", "m1")])
    assert kept == rows[1:]
    assert removed == [
        {
            "id": "1", "source": "math", "place": f"{tmp_path}/rows_in.jsonl:1", "reason": "exact",
            "match": "old", "match_in": "against", "match_place": f"{tmp_path}/seen.jsonl:1",
            "similarity": 1.0,
        }
    ]  # fmt: skip
    assert manifest["rows"] == {
        "in": {"code": 2, "math": 1}, "out": {"code": 2}, "removed": {"exact": {"math": 1}},
    }  # fmt: skip
    assert manifest["against"] == {"rows": 1, "prompts": 1}


def test_near_duplicates_are_named_with_their_similarity(run):
    pytest.importorskip("datasketch")
    rule = NearRule(threshold=0.6, shingle=3)
    rows = [row("1", LONG + " ."), row("2", LONG.replace("noon", "nine").replace("sixty", "40"))]
    manifest, kept, removed = run(rows, [row("old", LONG)], rule)
    # 17 words: 15 shingles, and a 16th with the sign.
    assert [(r["id"], r["reason"], r["similarity"]) for r in removed] == [("1", "near", 0.9375)]
    assert [r["id"] for r in kept] == ["2"]
    assert manifest["versions"]["datasketch"]


def test_repetitions_inside_the_input(run):
    rows = [row("1", "a"), row("2", "b"), row("3", "A "), row("4", "b")]
    assert len(run(rows, [row("old", "b")])[1]) == 2
    _, kept, removed = run(rows, [row("old", "b")], within=True)
    assert [r["id"] for r in kept] == ["1"]
    assert [(r["id"], r["match"], r["match_in"]) for r in removed] == [
        ("2", "old", "against"), ("3", "1", "input"), ("4", "old", "against"),
    ]  # fmt: skip


def test_a_near_repetition_of_a_removed_row_stays(run):
    """Only rows that were kept count, or chains of small changes would remove everything."""
    pytest.importorskip("datasketch")
    words = LONG.split()
    second = " ".join(["x", *words[1:]])
    third = " ".join(["x", *words[1:-1], "y"])
    rows = [row("1", LONG), row("2", second), row("3", third)]
    rule = NearRule(threshold=0.8, shingle=3)
    _, kept, removed = run(rows, [], rule, within=True)
    assert [r["id"] for r in kept] == ["1", "3"] and removed[0]["match"] == "1"


def test_the_same_file_on_both_sides(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("1", "a")])
    (tmp_path / "link.jsonl").symlink_to(path)
    with pytest.raises(DataError, match=r"mode\.against=.*a\.jsonl: is also in mode\.input"):
        subtract(tmp_path / "out", [path], [tmp_path / "link.jsonl"])


def test_a_bad_row_leaves_no_output(tmp_path):
    path = write(tmp_path / "a.jsonl", [row("1", "a")])
    path.write_text(path.read_text() + '{"id": "2"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: no text under 'source'"):
        subtract(tmp_path / "out", [path], [], within=True)
    assert not (tmp_path / "out" / "rows.jsonl").exists()


PROMPTS = st.lists(st.sampled_from(["a b", "A  b", "c", "d e f g", "d e f h", ""]), max_size=12)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(PROMPTS.filter(bool), PROMPTS, st.booleans())
def test_kept_and_removed_are_the_input(tmp_path, prompts, seen, within):
    rows = [row(str(n), text, f"s{n % 2}") for n, text in enumerate(prompts)]
    files = [write(tmp_path / "a.jsonl", rows)]
    old = [row(f"o{n}", text) for n, text in enumerate(seen)]
    against = [write(tmp_path / "b.jsonl", old)] if old else []
    subtract(tmp_path / "out", files, against, None, within)
    kept, removed = read(tmp_path / "out/rows.jsonl"), read(tmp_path / "out/removed.jsonl")
    assert sorted(r["id"] for r in [*kept, *removed]) == sorted(r["id"] for r in rows)
    keys = {prompt_key(r) for r in old}
    assert not keys & {prompt_key(r) for r in kept}
    left = [prompt_key(r) for r in kept]
    assert set(left) == {prompt_key(r) for r in rows} - keys
    assert not within or len(left) == len(set(left))
