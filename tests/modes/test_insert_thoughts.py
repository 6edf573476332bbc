"""mode=insert_thoughts: every document becomes a row, or is counted by the reason why not."""

import json

import pytest

from data.annotation import Annotated, Passage, in_passages, read_documents, source_sha
from data.errors import DataError
from data.thought_rows import ThoughtFiles
from data.thoughts import Delimiters, Limits, strip_thoughts
from data.worked_sums import WorkedSums
from dataloader import LanguageData
from decoding.generate import GenerationResult
from modes.insert_thoughts import run
from modes.thought_teacher import Rewriter, Teacher, json_list, numbered
from runtime.config import instantiate
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.support import compose_config

THINK = Delimiters()


def write(path, count=6):
    rows = [
        {"id": f"d{n}", "text": f"Question: {n} + 7 - 3 =\nAnswer: {n + 4}\n", "answer": str(n + 4)}
        for n in range(count)
    ]
    rows.append({"text": "No sum."})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def config(folder, *overrides, annotator="worked_sums", name="d.jsonl"):
    return compose_config(
        "mode=insert_thoughts", f"mode/annotator={annotator}", f"mode.input={folder}/{name}",
        f"mode.output={folder}/out", "trainer=cpu", *overrides, run_dir=folder / "run",
    )  # fmt: skip


def rows_of(folder, name="rows.jsonl"):
    return [json.loads(line) for line in (folder / "out" / name).read_text().splitlines()]


def test_documents_become_rows_that_training_reads(tmp_path):
    documents = write(tmp_path / "d.jsonl", 20)
    cfg = config(tmp_path)
    validate(cfg)
    metrics = run(cfg)
    rows = rows_of(tmp_path)
    assert rows[3] == {
        "id": "d3", "source_sha": source_sha(documents[3]["text"]), "answer": "7",
        "raw_text": documents[3]["text"], "teacher": "worked_sums", "prompt_kind": "rule",
        "augmented_text":
            "Question: 3 + 7 - 3 =\nAnswer: <think>3 + 7 = 10, 10 - 3 = 7</think> 7\n",
        "think_count": 1, "think_words": 10, "raw_word_coverage": 1.0,
        "original_text_preserved": True,
    }  # fmt: skip
    assert [row["raw_text"] for row in rows] == [one["text"] for one in documents[:-1]]
    assert rows_of(tmp_path, "rejected.jsonl") == [{"id": "d.jsonl:21", "reason": "no_sum"}]
    assert metrics.pop("passages_per_s") > 0
    assert metrics == {
        "documents": 21, "passages": 21, "rows": 20, "rejected": 1, "rejected/no_sum": 1,
        "failed": 0, "escaped": 0, "thoughts": 20, "thoughts_per_row": 1.0, "attempts": 1.0,
        "words_per_thought": 10.0, "raw_word_coverage": 1.0, "preserved": 1.0,
    }  # fmt: skip
    cfg = compose_config(
        "algo=sft_raw", "model=tiny_causal", 'model.extra_tokens=["<think>","</think>"]',
        "data=thoughts", f"data.files={tmp_path}/out/rows.jsonl", "data.form=prefixes",
        "data.valid_fraction=0.3", "data.end_suffix=true", "data.min_prefix=1",
        "data.min_suffix=1", "model.length=64", "loader.eval_global_batch_size=4",
        f"paths.cache_dir={tmp_path}/cache",
    )  # fmt: skip
    data = LanguageData(cfg)
    for batch in data.eval_loader("validation"):
        for ids, response in zip(batch["input_ids"], batch["response"], strict=True):
            prefix, suffix = (data.tokenizer.decode(ids[response == side]) for side in (0, 1))
            assert prefix.endswith("- 3 =\nAnswer:") and suffix.endswith("\n<|im_end|>")
            assert suffix.startswith(" ") and suffix.strip("\n <|im_end>").isdigit()


def test_a_run_that_was_broken_off_goes_on(tmp_path, monkeypatch):
    write(tmp_path / "d.jsonl")
    whole = run(config(tmp_path, f"mode.output={tmp_path}/whole"))
    expected = (tmp_path / "whole" / "rows.jsonl").read_bytes()
    annotate, asked = WorkedSums.annotate, []

    def broken(self, passages):
        for number, passage in enumerate(passages):
            if number == 3 and not asked:
                raise KeyboardInterrupt
            yield from annotate(self, [passage])

    monkeypatch.setattr(WorkedSums, "annotate", broken)
    with pytest.raises(KeyboardInterrupt):
        run(config(tmp_path))
    assert not (tmp_path / "out" / "rows.jsonl").exists()

    def noted(self, passages):
        asked.extend(passage.id for passage in passages)
        return annotate(self, passages)

    monkeypatch.setattr(WorkedSums, "annotate", noted)
    metrics = run(config(tmp_path))
    assert asked == ["d3", "d4", "d5", "d.jsonl:7"]
    assert (tmp_path / "out" / "rows.jsonl").read_bytes() == expected
    same = {name: value for name, value in whole.items() if name != "passages_per_s"}
    assert {name: metrics[name] for name in same} == same
    assert "passages_per_s" not in run(config(tmp_path)) and len(asked) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("mode.annotator.marker=A", r'annotator marker="A": .* begun with "Answer:"'),
        ("mode.annotator.limits.max_thoughts=1", r"limits\.max_thoughts=1: .* begun with null"),
        ("mode.delimiter_in_text=escape", r'mode\.delimiter_in_text="escape": .* "reject"'),
    ],
    ids=["marker", "limits", "delimiter"],
)
def test_other_options_are_refused(tmp_path, change, message):
    write(tmp_path / "d.jsonl")
    run(config(tmp_path))
    with pytest.raises(ConfigError, match=message):
        run(config(tmp_path, change))


def test_a_delimiter_in_the_text_is_refused_or_taken_apart(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "<think> 1 + 2 =\\nAnswer: 3"}\n')
    # Once more is no other end: what was refused is not asked for again.
    for _ in range(2):
        with pytest.raises(
            DataError, match=r"out: no rows of 1 passages \(1 delimiter_in_text; see"
        ):
            run(config(tmp_path))
    (refused,) = rows_of(tmp_path, "rejected.jsonl")
    assert refused["reason"] == "delimiter_in_text" and rows_of(tmp_path) == []
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["status"] == "done" and manifest["counts"]["rejected/delimiter_in_text"] == 1
    out = f"mode.output={tmp_path}/out2"
    assert run(config(tmp_path, "mode.delimiter_in_text=escape", out))["escaped"] == 1
    (row,) = list(ThoughtFiles(f"{tmp_path}/out2/rows.jsonl").read(tmp_path / "out2/rows.jsonl"))
    assert row["raw_text"] == "< think> 1 + 2 =\nAnswer: 3" and row["original_text_preserved"]


def test_documents_in_passages_keep_their_source(tmp_path):
    (tmp_path / "a.txt").write_text("One two. Three.\n\nFour.\n")
    found = list(read_documents([tmp_path / "a.txt"]))
    assert [(one.id, one.text) for one in found] == [
        ("a.txt:1", "One two. Three."), ("a.txt:2", "Four."),
    ]  # fmt: skip
    parts = list(in_passages(found[0], 2))
    assert [(one.id, one.text) for one in parts] == [
        ("a.txt:1#0", "One two. "), ("a.txt:1#1", "Three."),
    ]  # fmt: skip
    assert {one.source_sha for one in parts} == {found[0].source_sha}
    assert list(in_passages(found[0], 9)) == [found[0]]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"id": "a"}', r"d\.jsonl:1: no text under 'text' \(keys: id\); set mode\.text_column"),
        ('{"id": 1, "text": "a"}', r"d\.jsonl:1: id=1: allowed a text"),
        ('{"id": "a", "text": "b"}\n{"id": "a", "text": "c"}', "id 'a' is there twice"),
    ],
    ids=["text", "id", "twice"],
)
def test_a_bad_document_is_named(tmp_path, line, message):
    (tmp_path / "d.jsonl").write_text(line + "\n")
    with pytest.raises(DataError, match=message):
        list(read_documents([tmp_path / "d.jsonl"]))


class Scripted:
    """Gives the replies of a passage one after the other; None is an error."""

    def __init__(self, replies, finish="stop"):
        self.replies, self.finish, self.prompts = replies, finish, []

    def identity(self):
        return {"target": "scripted"}

    def generate(self, requests):
        for request in reversed(list(requests)):
            self.prompts.append(request.messages[0]["content"])
            name, _, attempt = request.id.partition("~")
            reply = self.replies[name][int(attempt or 0)]
            if reply is None:
                yield GenerationResult(request.id, error="gone")
            else:
                yield GenerationResult(request.id, reply, finish=self.finish)


TEXT = "One is here. Two follows. Three ends."
GOOD = '```json\n[{"after": 1, "thought": "a b"}, {"after": "Two follows.", "thought": "c"}]\n```'


def taught(replies, kind=Teacher, finish="stop", **limits):
    generator = Scripted(replies, finish)
    teacher = kind(generator, THINK, Limits(**limits), "Read this:\n{passage}\nNow.", "k", 2)
    passages = [Passage(name, name, TEXT) for name in replies]
    return {one.id: one for one in teacher.annotate(passages)}, generator.prompts


def test_a_teacher_says_where_thoughts_go():
    found, prompts = taught({"a": [GOOD]}, max_thoughts=2)
    assert prompts == ["Read this:\n[1] One is here.\n[2] Two follows.\n[3] Three ends.\nNow."]
    augmented = found["a"].augmented
    assert augmented == (
        "One is here. <think>a b</think> Two follows. <think>c</think> Three ends."
    )
    assert strip_thoughts(augmented, THINK) == TEXT


def test_refused_replies_are_asked_for_again_and_counted_by_the_last_reason():
    found, prompts = taught(
        {
            "late": ["no", '[{"after": 9, "thought": "x"}]', GOOD],
            "never": ["no", GOOD, "[1]"],
            "few": ["[]", "[]", "[]"],
            "gone": [None],
            "good": [GOOD],
        },
        max_thoughts=2,
    )
    assert found["late"].augmented and found["late"].attempts == 3
    # The second reply was good, so there was no third.
    assert found["never"].augmented and found["never"].attempts == 2
    assert (found["few"].reason, found["few"].attempts) == ("too_few_thoughts", 3)
    assert found["gone"].error == "gone" and not found["gone"].reason
    assert found["good"].attempts == 1 and len(prompts) == 3 + 2 + 3 + 1 + 1


def test_a_reply_that_ended_too_early_is_told_from_a_bad_one():
    for finish, reason in (("stop", "not_json"), ("length", "cut_off")):
        found, _ = taught({"a": ['[{"after": 1, "thou'] * 3}, finish=finish)
        assert found["a"].reason == reason
    found, _ = taught({"a": ["[]"] * 3}, finish="length")
    assert found["a"].reason == "too_few_thoughts"


def test_a_rewriter_must_not_change_the_text():
    good = "One is here. <think>so</think>\nTwo follows. Three ends.\n"
    found, prompts = taught({"a": [good], "b": [good.replace("Two", "2")] * 3}, Rewriter)
    assert found["a"].augmented == good.strip() and found["b"].reason == "text_changed"
    assert prompts[0] == f"Read this:\n{TEXT}\nNow."


@pytest.mark.parametrize("reply", ["", "none", "[1", "]1[", "[" * 10**5], ids=range(5))
def test_what_is_no_list(reply):
    with pytest.raises(ValueError, match=r"^not_json$"):
        json_list(reply)


def test_sentences_are_numbered_from_one():
    assert numbered("A b.  C!\nd") == "[1] A b.\n[2] C!\n[3] d"


def test_a_prompt_needs_a_place_for_the_passage():
    with pytest.raises(ValueError, match=r"mode\.annotator\.prompt: allowed a text with \{passage"):
        Teacher(Scripted({}), THINK, Limits(), "Read.", "k")


@pytest.mark.parametrize("name", ["teacher", "rewriter"])
def test_the_prompts_say_what_is_accepted(tmp_path, name):
    cfg = config(tmp_path, annotator=name)
    validate(cfg)
    options = cfg.mode.annotator
    teacher = instantiate(options, generator=Scripted({}), delimiters=THINK)
    assert isinstance(teacher, Teacher) and teacher.identity()["prompt_kind"] == options.prompt_kind
    assert "3 to 6" in options.prompt and options.prompt.endswith("\n{passage}")
    assert ("<think> and </think>" in options.prompt) == (name == "rewriter")


def test_a_model_of_random_weights_is_refused_by_reason(tmp_path):
    write(tmp_path / "d.jsonl", 3)
    tiny = (
        "model=tiny_causal", "model.num_hidden_layers=1", "mode.max_new_tokens=4",
        "mode.annotator.retries=1",
    )  # fmt: skip
    with pytest.raises(DataError, match=r"no rows of 4 passages \(.*; allowed: another mode\.outp"):
        run(config(tmp_path, *tiny, annotator="teacher"))
    metrics = json.loads((tmp_path / "out" / "manifest.json").read_text())["counts"]
    assert metrics["rejected"] == metrics["passages"] == 4 and metrics["rows"] == 0
    reasons = {name: count for name, count in metrics.items() if name.startswith("rejected/")}
    assert set(reasons) <= {"rejected/cut_off", "rejected/not_json"} and sum(reasons.values()) == 4
    assert metrics["attempts"] == 2.0
    with pytest.raises(ConfigError, match=r"model=nano: not a model that answers"):
        run(config(tmp_path, annotator="teacher"))


def test_what_nobody_answered_may_be_asked_again(tmp_path, monkeypatch):
    write(tmp_path / "d.jsonl", 2)

    def silent(self, passages):
        yield from (Annotated(one.id, error="no answer") for one in passages)

    with monkeypatch.context() as patch:
        patch.setattr(WorkedSums, "annotate", silent)
        with pytest.raises(DataError, match=r"3 passages \(3 failed; .*; allowed: run again for"):
            run(config(tmp_path))
    assert run(config(tmp_path))["rows"] == 2
