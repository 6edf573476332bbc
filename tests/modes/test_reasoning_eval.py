"""mode=reasoning_eval: samples of every problem, kept as they come, graded outside thoughts."""

import json

import pytest

from data.errors import DataError
from data.journal import Journal
from decoding.generate import GenerationRequest, GenerationResult, GenerationSettings
from decoding.local import LocalGenerator
from evaluation.reasoning_rows import UNCLOSED
from models.tiny_causal import tiny_causal
from modes import benchmark_eval, reasoning_eval
from modes.reasoning_eval import run
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.benchmark_runs import GYM, TINY, gsm8k_files, rows_of
from tests.decoding.servers import answer_server
from tests.reasoning_runs import sampling
from tests.support import compose_config

pytest.importorskip("reasoning_gym", reason="needs the package reasoning_gym")

DELIMITERS = ("model.extra_tokens=['<think>','</think>']",)
THINKING = (*TINY, *DELIMITERS)


def test_rows_are_samples_of_the_model_side_by_side(tmp_path, capsys):
    cfg = sampling(tmp_path)
    metrics = run(cfg)
    rows = rows_of(tmp_path / "one" / "reasoning_gym.jsonl")
    (task,) = benchmark_eval.tasks_of(cfg).values()
    target = tiny_causal(num_hidden_layers=2, dtype="float64")
    settings = GenerationSettings(
        4, temperature=0.6, top_p=0.95, seed=cfg.seed, stop_strings=("\nQuestion:",)
    )
    generator = LocalGenerator(target, settings)
    expected = []
    for prompt in task.make_prompts(2):
        for sample in range(2):
            asked = GenerationRequest(f"{prompt.id}/{sample}", prompt=prompt.text)
            (found,) = generator.generate([asked])
            words = found.text.split()
            expected.append({
                "arm": "one", "benchmark": "reasoning_gym", "id": prompt.id, "sample_idx": sample,
                "gold": prompt.row["answer"], "choices": None,
                "prediction": words[-1] if words else None,
                "correct": bool(words) and words[-1] == prompt.row["answer"],
                "reason": "the last word" if words else "no words", "completion": found.text,
                "completion_tokens": found.num_tokens, "finish_reason": found.finish,
                "seed": cfg.seed, "prompt_sha": prompt.hash,
                "grader_version": rows[0]["grader_version"],
            })  # fmt: skip
    assert rows == expected and len({row["completion"] for row in rows}) == 4
    name = "reasoning/reasoning_gym"
    assert (metrics[f"{name}/samples"], metrics[f"{name}/problems"]) == (4, 2)
    assert metrics[f"{name}/mean"] == metrics["reasoning/macro/mean"] == 0.0
    assert metrics[f"{name}/tokens"] == sum(row["completion_tokens"] for row in rows) / 4
    assert metrics[f"{name}/tokens_per_s"] > 0 and "Macro Mean@2" in capsys.readouterr().out
    said = json.loads((tmp_path / "one" / "reasoning.json").read_text())
    assert said["arm"] == "one" and said["graders"] == {"reasoning_gym": {"last word": False}}
    assert said["benchmarks"]["reasoning_gym"]["samples"] == 4
    assert said["conditions"]["reasoning_gym"]["prefix"] == ""
    assert "2 problems; the complete benchmark has 12" in said["notes"][0]


def test_a_journal_that_was_cut_is_gone_on_with(tmp_path, monkeypatch):
    run(sampling(tmp_path / "unbroken"))
    append, rows = Journal.append, []

    def stop(self, row):
        append(self, row)
        rows.append(row)
        if len(rows) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "append", stop)
        run(sampling(tmp_path / "broken"))
    folder = tmp_path / "broken" / "one"
    assert not (folder / "reasoning_gym.jsonl").exists()
    partial = folder / "partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:-9])  # in the middle of the third line
    kept = partial.read_bytes().splitlines(keepends=True)[:2]
    run(sampling(tmp_path / "broken"))
    lines = partial.read_bytes().splitlines(keepends=True)
    assert lines[:2] == kept and len({json.loads(line)["id"] for line in lines}) == len(lines) == 4
    done = (folder / "reasoning_gym.jsonl").read_bytes()
    assert done == (tmp_path / "unbroken" / "one" / "reasoning_gym.jsonl").read_bytes()


def test_more_samples_go_on_and_done_is_done(tmp_path, monkeypatch):
    run(sampling(tmp_path))
    path = tmp_path / "one" / "reasoning_gym.jsonl"
    before = rows_of(path)
    run(sampling(tmp_path, "mode.samples=3", "mode.limit=3"))
    rows = rows_of(path)
    assert [row["sample_idx"] for row in rows] == [0, 1, 2] * 3
    assert [row for row in rows[:6] if row["sample_idx"] < 2] == before
    monkeypatch.setattr(LocalGenerator, "_prefill", None)  # nothing may be answered again
    run(sampling(tmp_path, f"+{GYM}.grader.ignore_case=true"))
    again = rows_of(path)
    assert again[0]["grader_version"] != before[0]["grader_version"]
    assert [row["completion"] for row in again] == [row["completion"] for row in before]


def test_two_arms_in_one_folder(tmp_path):
    run(sampling(tmp_path))
    first = (tmp_path / "one" / "reasoning.json").read_bytes()
    run(sampling(tmp_path, "mode.arm=two", "model.seed=3"))
    assert (tmp_path / "one" / "reasoning.json").read_bytes() == first
    second = rows_of(tmp_path / "two" / "reasoning_gym.jsonl")
    assert {row["arm"] for row in second} == {"two"}
    assert [row["completion"] for row in second] != [
        row["completion"] for row in rows_of(tmp_path / "one" / "reasoning_gym.jsonl")
    ]


CHANGES = {
    "model.seed=1": r"model\.fingerprint=\"\w+\", now \"\w+\"; allowed: the same, or another",
    "mode.max_new_tokens=5": r"settings\.max_new_tokens=4, now 5",
    f"{GYM}.shots=1": r"prompts\.shots=2, now 1",
    f"{GYM}.stop=[x]": r"settings\.stop_strings=\[\"\\nQuestion:\"\], now \[\"x\"\]",
}


def test_other_answers_are_refused(tmp_path):
    run(sampling(tmp_path, "mode.limit=1"))
    for change, message in CHANGES.items():
        begun = rf"paths\.run_dir=.*/one: reasoning_gym was begun with {message}"
        with pytest.raises(ConfigError, match=begun):
            run(sampling(tmp_path, "mode.limit=1", change))
    (tmp_path / "one" / "partial.jsonl").unlink()
    with pytest.raises(ConfigError, match=r"/one: results without partial\.jsonl, the answers"):
        run(sampling(tmp_path, "mode.limit=1"))


def gsm8k_alone(folder, *overrides):
    files = gsm8k_files(folder)
    which = "benchmark=[reasoning_gym,gsm8k]"
    cfg = sampling(folder / "run", *files, *overrides, which=which)
    cfg.benchmark = {"gsm8k": cfg.benchmark.gsm8k}
    return cfg


def test_one_more_benchmark_and_the_average_of_both(tmp_path):
    run(sampling(tmp_path / "run"))
    metrics = run(gsm8k_alone(tmp_path))
    tokens = [metrics[f"reasoning/{name}/tokens"] for name in ("reasoning_gym", "gsm8k", "macro")]
    assert tokens[2] == pytest.approx(sum(tokens[:2]) / 2)
    assert sum(key.endswith("/tokens_per_s") for key in metrics) == 1
    with pytest.raises(ConfigError, match=r"mode\.samples=3: .*/reasoning_gym\.jsonl has 2 sample"):
        run(gsm8k_alone(tmp_path, "mode.samples=3"))
    path = tmp_path / "run" / "one" / "gsm8k.jsonl"
    rows = [row | {"arm": "x"} for row in rows_of(path)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match=r"/one: has rows of arm=x; allowed: of arm=one alone"):
        run(sampling(tmp_path / "run"))


def test_a_sample_without_an_answer_is_named(tmp_path):
    cfg = sampling(tmp_path, "mode.limit=12", "model.max_position_embeddings=300")
    message = r"benchmark=reasoning_gym: \d+ of 24 samples have no answer, 'reasoning_gym/\w+/held_"
    with pytest.raises(DataError, match=message + r".*/0' first: .*allowed 1 \.\. 299.*run again"):
        run(cfg)
    assert not (tmp_path / "one" / "reasoning_gym.jsonl").exists()


def test_thoughts_are_not_graded_but_their_tokens_count(tmp_path, monkeypatch):
    """A model that thinks first, and does not always come to an end."""
    said = ["<think>it is 7</think> A: {gold}", "<think>it is {gold}", "{gold} <think>sure</think>",
            "no"]  # fmt: skip

    class Scripted:
        def identity(self):
            return {"target": "scripted"}

        def generate(self, requests):
            for request in requests:
                problem, _, sample = request.id.rpartition("/")
                text = said[int(sample)].format(gold=golds[problem])
                yield GenerationResult(request.id, text, num_tokens=len(text), finish="stop")

    cfg = sampling(tmp_path, "mode.samples=4")
    (task,) = benchmark_eval.tasks_of(cfg).values()
    golds = {prompt.id: prompt.row["answer"] for prompt in task.make_prompts()}
    model = benchmark_eval.Model(lambda settings: Scripted(), None)
    monkeypatch.setattr(reasoning_eval, "open_model", lambda cfg: (model, cfg))
    metrics = run(cfg)
    rows = rows_of(tmp_path / "one" / "reasoning_gym.jsonl")
    assert [row["correct"] for row in rows] == [True, False, True, False] * 2
    assert [row["reason"] == UNCLOSED for row in rows] == [False, True, False, False] * 2
    assert [row["prediction"] for row in rows[:4]] == [rows[0]["gold"], None, rows[0]["gold"], "no"]
    assert all(row["completion_tokens"] == len(row["completion"]) for row in rows)
    assert rows[0]["completion"].startswith("<think>it is 7</think>")
    name = "reasoning/reasoning_gym"
    assert (metrics[f"{name}/mean"], metrics[f"{name}/any"]) == (0.5, 1.0)
    # Of four samples two are right, so two drawn miss them in one case of six.
    assert metrics[f"{name}/pass_at_2"] == pytest.approx(5 / 6)
    notes = json.loads((tmp_path / "one" / "reasoning.json").read_text())["notes"]
    assert "reasoning_gym: 2 of 8 completions end within a thought and have no answer" in notes


def test_the_prompt_opens_the_thought(tmp_path):
    cfg = sampling(tmp_path, "mode.prefix_thought=true", model=THINKING)
    run(cfg)
    rows = rows_of(tmp_path / "one" / "reasoning_gym.jsonl")
    (task,) = benchmark_eval.tasks_of(cfg).values()
    prompt = task.make_prompts()[0]
    target = tiny_causal(num_hidden_layers=2, dtype="float64", extra_tokens=("<think>", "</think>"))
    settings = GenerationSettings(4, temperature=0.6, top_p=0.95, seed=cfg.seed)
    asked = GenerationRequest(f"{prompt.id}/0", prompt=prompt.text + "<think>")
    (found,) = LocalGenerator(target, settings).generate([asked])
    assert rows[0]["completion"] == found.text and rows[0]["prompt_sha"] != prompt.hash
    assert rows[0]["reason"] == UNCLOSED and rows[0]["prediction"] is None
    with pytest.raises(ConfigError, match=r"prefix=\"<think>\", now \"\""):
        run(sampling(tmp_path, model=THINKING))


def test_a_thought_that_the_prompt_cannot_open(tmp_path):
    with pytest.raises(ConfigError, match=r"mode\.open=<think>: 7 tokens of this model; allow"):
        run(sampling(tmp_path, "mode.prefix_thought=true"))
    chat = (f"{GYM}.format=chat", "mode.prefix_thought=true")
    with pytest.raises(ConfigError, match=r"prefix_thought=true: benchmark\.reasoning_gym\.format"):
        run(sampling(tmp_path, *chat, model=THINKING))


def test_a_server_is_asked_for_every_sample(tmp_path):
    with answer_server(tmp_path) as server:
        model = (
            "mode/backend=server", f"mode.backend.base_url={server.url}", "mode.backend.model=toy",
            "mode.backend.token_ids=none", "trainer=cpu",
        )  # fmt: skip
        run(sampling(tmp_path / "run", "mode.limit=1", "mode.samples=3", model=model))
        ((prompt, body),) = server.seen("bodies").items()
        assert server.seen("attempts") == {prompt: 3}
    assert (body["temperature"], body["top_p"], body["max_tokens"]) == (0.6, 0.95, 4)
    assert len(rows_of(tmp_path / "run" / "one" / "reasoning_gym.jsonl")) == 3


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("mode.samples=0", r"mode\.samples=0: .*an integer >= 1"),
        ("mode.arm=a/b", r"mode\.arm=a/b: .*the name of a folder"),
        ("mode.arm=..", r"mode\.arm=\.\.: .*the name of a folder"),
        ("mode.prefix_thought=1", r"mode\.prefix_thought=1: .*true, false"),
    ],
)
def test_wrong_values(bad, message):
    with pytest.raises(ConfigError, match=message):
        validate(compose_config("mode=reasoning_eval", *TINY, bad))


def test_samples_that_would_all_be_the_same(tmp_path):
    with pytest.raises(ConfigError, match=r"mode\.temperature=0: all 2 samples of a problem would"):
        run(sampling(tmp_path, "mode.temperature=0"))
    run(sampling(tmp_path, "mode.temperature=0", "mode.samples=1"))
    with pytest.raises(ConfigError, match=r"mode\.close=<think>: allowed: another one than"):
        run(sampling(tmp_path, "mode.close='<think>'"))
