"""Overlaps with evaluation sets: each kind by hand, and that every one is reported."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data.chat import to_line
from data.decontaminate import decontaminate
from data.errors import DataError
from data.overlap import CONTAINMENT, NGRAM, WHOLE, EvaluationIndex, OverlapRule, reason
from data.shingles import words_of

QUESTION = (
    "Natalia sold clips to 48 of her friends in April, and then she sold half as many clips in May."
)
TEMPLATE = "Please reason step by step, and put your final answer within \\boxed{} if possible."
ITEM = {
    "id": "gsm8k/0",
    "source": "gsm8k",
    "messages": [{"role": "user", "content": f"{QUESTION}\n{TEMPLATE}"}],
    "question": QUESTION,
    "answer": "Natalia sold 48/2 = 24 clips in May and so 48+24 = 72 clips in both the months.",
}
SHORT = {"id": "mt/1", "source": "mt", "prompt": "Write a haiku about rain."}


def row(prompt, **more):
    return {"id": "r", "source": "s", "prompt": prompt, **more}


def hits_of(prompt, *items, rule=None, **more):
    index = EvaluationIndex(rule or OverlapRule())
    for item in items or (ITEM, SHORT):
        index.add(item)
    return index.hits(row(prompt, **more))


def kinds(hits):
    return {(hit.part.item, hit.part.name, hit.row_part, hit.kind) for hit in hits}


def test_the_same_question_is_found_in_every_way():
    hits = hits_of(QUESTION.upper())
    found = {("gsm8k/0", "question", "prompt", kind) for kind in (WHOLE, CONTAINMENT, NGRAM)}
    assert kinds(hits) == found and reason(hits) == WHOLE
    ngram = next(hit for hit in hits if hit.kind == NGRAM)
    words = words_of(QUESTION)
    assert (ngram.words, ngram.ngrams) == (len(words), len(words) - 12)
    assert ngram.text == " ".join(words)


def test_thirteen_words_are_one_too_many():
    words = QUESTION.split()
    twelve, thirteen = " ".join(words[2:14]), " ".join(words[2:15])
    assert hits_of(f"He said: {twelve} end") == []
    (hit,) = hits_of(f"He said: {thirteen} end")
    assert (hit.kind, hit.words, hit.ngrams) == (NGRAM, 13, 1)
    assert hit.text == " ".join(words_of(thirteen))


def test_the_longest_common_stretch_is_shown():
    words = QUESTION.split()
    prompt = " ".join([*words[:13], "and", "now", *words[3:18], "x", *words[1:15]])
    (hit,) = hits_of(prompt)
    assert hit.words == 15 and hit.ngrams == 1 + 3 + 2
    assert hit.text == " ".join(words_of(" ".join(words[3:18])))


def test_the_template_around_a_question_is_no_contamination():
    assert hits_of(f"Another question altogether.\n{TEMPLATE}") == []
    bare = {key: value for key, value in ITEM.items() if key != "question"}
    assert kinds(hits_of(f"Another question altogether.\n{TEMPLATE}", bare)) == {
        ("gsm8k/0", "question", "prompt", NGRAM)
    }


def test_a_short_question_must_be_the_whole_prompt():
    assert kinds(hits_of("write a HAIKU, about rain")) == {("mt/1", "question", "prompt", WHOLE)}
    assert hits_of("Write a haiku about rain and wind.") == []


def test_containment_sees_through_spacing_and_signs():
    question = "Compute sin(2x)cos(3x)+4y^2 for x=1234, y=56789 k"
    item = {"id": "m", "source": "math", "prompt": question}
    spaced = "So: compute sin ( 2x ) cos ( 3 x ) + 4 y ^ 2 for x = 12 34 , y = 567 89 k. Thanks!"
    assert len("".join(words_of(question))) == 35 and hits_of(spaced, item) == []
    rule = OverlapRule(least_characters=30)
    (hit,) = hits_of(spaced, item, rule=rule)
    assert hit.kind == CONTAINMENT and hit.text == " ".join(words_of(item["prompt"]))
    assert hits_of(spaced.replace("56", "57"), item, rule=rule) == []


def test_answers_count_in_prompts_and_responses_but_not_when_short():
    prompt = f"Check this: {ITEM['answer']}"
    assert ("gsm8k/0", "answer", "prompt", NGRAM) in kinds(hits_of(prompt))
    found = kinds(hits_of("Solve it.", response=ITEM["answer"]))
    assert found == {("gsm8k/0", "answer", "response", kind) for kind in (CONTAINMENT, NGRAM)}
    for answer in ("72", 72):
        assert hits_of("72", ITEM | {"answer": answer}, response="72") == []
    nothing = OverlapRule(item_fields=(), row_fields=())
    assert hits_of(prompt, ITEM, rule=nothing, response=ITEM["answer"]) == []


def test_tests_and_second_turns_of_items_count():
    tests = ["assert " + " ".join(f"f({n}) == {n}" for n in range(9)), {"more": [3]}, None]
    item = SHORT | {"tests": tests, "turns": ["Write a haiku about rain.", "Now about snow please"]}
    assert ("mt/1", "tests", "prompt", NGRAM) in kinds(hits_of(tests[0], item))
    assert kinds(hits_of("now about snow, please!", item)) == {
        ("mt/1", "question", "prompt", WHOLE)
    }


def test_what_was_said_before_counts_as_context():
    """An example in the system's turn and an earlier answer teach as much as a prompt does."""
    index = EvaluationIndex(OverlapRule())
    index.add(ITEM)
    turns = [("system", f"Example: {QUESTION}"), ("user", "Go on."),
             ("assistant", ITEM["answer"]), ("user", "And?")]  # fmt: skip
    messages = [{"role": role, "content": text} for role, text in turns]
    found = kinds(index.hits({"id": "r", "source": "s", "messages": messages}))
    assert {hit[1:3] for hit in found} == {("question", "context"), ("answer", "context")}
    assert (*("gsm8k/0", "question", "context"), CONTAINMENT) in found
    messages[0]["content"] = QUESTION
    found = kinds(index.hits({"id": "r", "source": "s", "messages": messages}))
    assert all(kind != WHOLE for *_, kind in found), "a whole prompt is the user's"


def test_every_item_that_is_hit_is_reported():
    second = ITEM | {"id": "copy/0", "source": "copy"}
    assert {hit.part.set for hit in hits_of(QUESTION, ITEM, second)} == {"gsm8k", "copy"}


@pytest.mark.parametrize("options", [{"ngram": 0}, {"least_characters": 0}])
def test_impossible_rules(options):
    with pytest.raises(DataError, match=rf"{next(iter(options))}=0: allowed"):
        OverlapRule(**options)


def write(path, rows):
    path.write_text("".join(map(to_line, rows)))
    return path


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_files_and_counts(tmp_path):
    rows = [row(QUESTION), row("fine", keep=1) | {"id": "f"}, row("write a haiku about rain")]
    files = [write(tmp_path / "a.jsonl", rows)]
    against = [write(tmp_path / "e.jsonl", [ITEM, SHORT, SHORT | {"id": "mt/2", "prompt": "b"}])]
    out = tmp_path / "out"
    manifest = decontaminate(out, files, against, OverlapRule())
    assert read(out / "rows.jsonl") == [rows[1]]
    hits = read(out / "hits.jsonl")
    assert [(h["set"], h["item"], h["kind"]) for h in hits] == [
        ("gsm8k", "gsm8k/0", WHOLE), ("gsm8k", "gsm8k/0", CONTAINMENT), ("gsm8k", "gsm8k/0", NGRAM),
        ("mt", "mt/1", WHOLE),
    ]  # fmt: skip
    assert hits[3]["place"] == f"{files[0]}:3" and hits[3]["text"] == "write a haiku about rain"
    assert manifest["rows"]["removed"] == {WHOLE: {"s": 2}}
    assert manifest["sets"] == {
        "gsm8k": {"items": 1, "items_hit": 1, "rows_hit": 1, WHOLE: 1, CONTAINMENT: 1, NGRAM: 1},
        "mt": {"items": 2, "items_hit": 1, "rows_hit": 1, WHOLE: 1, CONTAINMENT: 0, NGRAM: 0},
    }
    with pytest.raises(DataError, match=r"mode\.against=.*a\.jsonl: is also in mode\.input"):
        decontaminate(out, files, [*against, *files], OverlapRule())


TEXTS = st.lists(st.sampled_from("abcd"), max_size=12).map(" ".join)


def slow_overlap(prompt, question, size):
    """Whether they share a run of `size` words, or are the same words."""
    a, b = prompt.split(), question.split()
    runs = {tuple(b[at : at + size]) for at in range(len(b) - size + 1)}
    return any(tuple(a[at : at + size]) in runs for at in range(len(a) - size + 1)) or (
        a == b and bool(a)
    )


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.lists(TEXTS, min_size=1, max_size=6), st.lists(TEXTS, min_size=1, max_size=4))
def test_kept_and_removed_are_the_input_and_equal_the_slow_reference(tmp_path, prompts, questions):
    rows = [row(text) | {"id": str(n)} for n, text in enumerate(prompts)]
    items = [row(text) | {"id": f"e{n}"} for n, text in enumerate(questions)]
    files, against = [write(tmp_path / "a.jsonl", rows)], [write(tmp_path / "e.jsonl", items)]
    decontaminate(tmp_path / "out", files, against, OverlapRule(ngram=3, least_characters=99))
    hit = {r["id"] for r in rows if any(slow_overlap(r["prompt"], i["prompt"], 3) for i in items)}
    assert {line["row"] for line in read(tmp_path / "out/hits.jsonl")} == hit
    assert [r["id"] for r in read(tmp_path / "out/rows.jsonl")] == [
        r["id"] for r in rows if r["id"] not in hit
    ]
