"""Mixes of exact counts."""

import itertools
import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.chat import prompt_key, to_line
from data.errors import DataError
from data.mixing import Recipe, mix


def rows_of(source, count, prefix="", prompts=None):
    return [
        {
            "id": f"{prefix}{source}-{n}",
            "source": source,
            "prompt": f"{prefix}{source} {n % (prompts or count)}",
            "response": "é",
        }
        for n in range(count)
    ]


def write(path, rows):
    path.write_text("".join(map(to_line, rows)))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def recipe(counts, groups=None, anchors=None, **options):
    return Recipe(counts, groups or {}, anchors or {}, **options)


@pytest.fixture
def run(tmp_path):
    def mixed(rows, asked, anchors=(), out="out"):
        files = [write(tmp_path / "a.jsonl", rows)]
        old = [write(tmp_path / "old.jsonl", anchors)] if anchors else []
        manifest = mix(tmp_path / out, files, old, asked)
        return manifest, read(tmp_path / out / "rows.jsonl")

    return mixed


def test_exact_counts_of_groups_with_patterns(run):
    rows = [*rows_of("numina_hard", 6), *rows_of("numina_easy", 5), *rows_of("code", 7),
            *rows_of("other", 2)]  # fmt: skip
    asked = recipe({"math": 8, "code": 7}, {"math": ["numina_*"]})
    manifest, made = run(rows, asked)
    assert len(made) == 15 and all(r in rows for r in made)
    assert Counter(r["source"].split("_")[0] for r in made) == {"numina": 8, "code": 7}
    assert manifest["mix"]["math"]["rows"] == 8
    assert sum(manifest["mix"]["math"]["sources"].values()) == 8
    removed = manifest["rows"]["removed"]
    assert removed["no_group"] == {"other": 2} and sum(removed["not_drawn"].values()) == 3


def test_the_draw_depends_on_the_seed_and_not_on_the_order_of_the_rows(run):
    rows = rows_of("a", 30)
    first = run(rows, recipe({"a": 10}))[1]
    assert run(rows[::-1], recipe({"a": 10}), out="again")[1] == first
    other = run(rows, recipe({"a": 10}, seed=1), out="seed")[1]
    assert {r["id"] for r in other} != {r["id"] for r in first}


def test_the_order_is_shuffled(run):
    made = run([*rows_of("a", 20), *rows_of("b", 20)], recipe({"a": 20, "b": 20}))[1]
    changes = sum(x["source"] != y["source"] for x, y in itertools.pairwise(made))
    assert changes > 10


def test_anchors_come_from_the_earlier_set(run):
    asked = recipe({"math": 5, "chat": 4}, anchors={"chat": 4, "math": 2})
    old = [*rows_of("chat", 9, "old "), *rows_of("math", 3, "old ")]
    manifest, made = run(rows_of("math", 4), asked, old)
    found = Counter((r["id"].startswith("old "), r["source"]) for r in made)
    assert found == {(True, "chat"): 4, (True, "math"): 2, (False, "math"): 3}
    assert manifest["mix"]["math"]["anchors"] == 2
    assert sum(manifest["anchor_rows"]["out"].values()) == 6


def test_an_anchor_is_not_drawn_again_as_new(run):
    rows = rows_of("a", 6)
    made = run(rows, recipe({"a": 6}, anchors={"a": 2}), rows[:2])[1]
    assert sorted(r["id"] for r in made) == sorted(r["id"] for r in rows)
    with pytest.raises(DataError, match=r"wants 5 rows of mode\.input, available 4 \(6 rows"):
        run(rows, recipe({"a": 7}, anchors={"a": 2}), rows[:2], out="more")


def test_a_prompt_occurs_once_if_not_asked_otherwise(run):
    rows = rows_of("a", 12, prompts=4)
    with pytest.raises(DataError, match=r"group a \(sources a\) wants 5 .* available 4"):
        run(rows, recipe({"a": 5}))
    made = run(rows, recipe({"a": 8}, max_per_prompt=2))[1]
    assert set(Counter(map(prompt_key, made)).values()) == {2}
    assert len({r["id"] for r in made}) == 8


def test_new_prompts_come_before_second_occurrences(run):
    rows = [*rows_of("a", 6, prompts=2), *rows_of("a", 3, "x")]
    made = run(rows, recipe({"a": 5}, max_per_prompt=3))[1]
    assert len(set(map(prompt_key, made))) == 5


def test_the_cap_holds_across_groups(run):
    rows = rows_of("a", 3)
    twins = [r | {"id": f"t{r['id']}", "source": "b"} for r in rows]
    with pytest.raises(DataError, match=r"group b .* wants 1 .* available 0"):
        run([*rows, *twins], recipe({"a": 3, "b": 1}))
    assert len(run([*rows, *twins], recipe({"a": 2, "b": 1}))[1]) == 3


def test_copies_fill_up_to_the_cap_with_ids_of_their_own(run):
    rows = rows_of("a", 3)
    manifest, made = run(rows, recipe({"a": 8}, max_per_prompt=3, repeat=True))
    assert manifest["mix"]["a"]["copies"] == 5
    assert len({r["id"] for r in made}) == 8
    assert Counter(r["id"].partition("#")[0] for r in made).most_common()[-1][1] >= 2
    originals = {r["id"]: r for r in rows}
    for r in made:
        name, _, copy = r["id"].partition("#")
        assert r | {"id": name} == originals[name] and copy in ("", "2", "3")
    with pytest.raises(DataError, match=r"available 9 .* at most 3 per prompt, with copies"):
        run(rows, recipe({"a": 10}, max_per_prompt=3, repeat=True))


@pytest.mark.parametrize(
    ("counts", "groups", "anchors", "message"),
    [
        ({"a": 1, "b": 1}, {"b": ["a*"]}, {}, "source 'a' fits a and b; allowed: one group"),
        ({"a": 4}, {}, {}, r"group a \(sources a\) wants 4 rows of mode\.input, available 3"),
        ({"z": 1}, {"z": ["y", "x?"]}, {}, r"group z \(sources y, x\?\) wants 1 .* available 0"),
        ({}, {}, {}, r"mode\.counts=\{\}: allowed"),
        ({"a": 1}, {"b": ["x"]}, {}, r"mode\.groups\.b: has no count in mode\.counts; allowed: a"),
        ({"a": 1}, {}, {"c": 1}, r"mode\.anchors\.c: has no count"),
        ({"a": 1}, {}, {"a": 2}, r"mode\.anchors\.a=2: more than mode\.counts\.a=1"),
        ({"a": 1}, {}, {"a": 1}, r"mode\.anchor_input=\[\]: mode\.anchors needs rows"),
    ],
)
def test_what_users_get_wrong(run, counts, groups, anchors, message):
    with pytest.raises(DataError, match=message) as error:
        run(rows_of("a", 3), recipe(counts, groups, anchors))
    assert "\n" not in str(error.value)


def test_two_rows_of_one_name(run, tmp_path):
    rows = [*rows_of("a", 1), rows_of("a", 1)[0] | {"prompt": "else"}]
    with pytest.raises(DataError, match=r"a\.jsonl:\d: id 'a-0' is also at .*a\.jsonl:\d; allowed"):
        run(rows, recipe({"a": 2}))
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["manifest.json.lock"]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.data())
def test_sums_are_exact_whatever_is_possible(tmp_path, data):
    sizes = {name: data.draw(st.integers(1, 8)) for name in "ab"}
    kinds = {name: data.draw(st.integers(1, 8)) for name in "ab"}
    cap, repeat = data.draw(st.integers(1, 3)), data.draw(st.booleans())
    rows = [r for name in "ab" for r in rows_of(name, sizes[name], prompts=kinds[name])]
    counts = {name: data.draw(st.integers(0, 12)) for name in "ab"}

    def available(name):
        by_prompt = Counter(prompt_key(r) for r in rows if r["source"] == name)
        return sum(cap if repeat else min(cap, n) for n in by_prompt.values())

    files = [write(tmp_path / "a.jsonl", rows)]
    asked = recipe(counts, max_per_prompt=cap, repeat=repeat, seed=data.draw(st.integers(0, 3)))
    if any(counts[name] > available(name) for name in "ab"):
        with pytest.raises(DataError, match="available"):
            mix(tmp_path / "out", files, [], asked)
        return
    manifest = mix(tmp_path / "out", files, [], asked)
    made = read(tmp_path / "out" / "rows.jsonl")
    assert Counter(r["source"] for r in made) == Counter(counts)
    assert max(Counter(map(prompt_key, made)).values(), default=0) <= cap
    assert len({r["id"] for r in made}) == len(made)
    seen = manifest["rows"]
    assert sum(seen["in"].values()) == len(rows)
