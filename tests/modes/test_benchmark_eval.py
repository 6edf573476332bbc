"""mode=benchmark_eval: every item answered once, graded, counted; killed and resumed."""

import json
import signal
import subprocess
import sys
import time

import pytest

from data.journal import Journal
from decoding.generate import GenerationRequest, GenerationSettings
from decoding.local import LocalGenerator
from evaluation.statistics import wilson_interval
from models.tiny_causal import tiny_causal
from modes import benchmark_eval
from modes.benchmark_eval import run
from runtime.errors import ConfigError
from runtime.run import load_summary
from runtime.validation import validate
from tests.benchmark_runs import GYM, TINY, configured, gsm8k_files, gym, rows_of
from tests.decoding.servers import answer_server
from tests.small import small_model
from tests.support import ROOT, command, compose_config, environment

pytest.importorskip("reasoning_gym", reason="needs the package reasoning_gym")


def test_rows_are_the_answers_of_the_model_in_the_order_of_the_items(tmp_path, capsys):
    cfg = configured(tmp_path / "run")
    metrics = run(cfg)
    rows = rows_of(tmp_path / "run" / "items.jsonl")
    assert [row["id"].split("/")[1] for row in rows] == ["chain_sum"] * 6 + ["leg_counting"] * 6
    (task,) = benchmark_eval.tasks_of(cfg).values()
    prompts = task.make_prompts()
    target = tiny_causal(num_hidden_layers=2, dtype="float64")
    settings = GenerationSettings(max_new_tokens=20, stop_strings=("\nQuestion:",))
    generator = LocalGenerator(target, settings)
    for prompt, row in zip(prompts, rows, strict=True):
        (expected,) = generator.generate([GenerationRequest(prompt.id, prompt=prompt.text)])
        words = expected.text.split()
        right = bool(words) and words[-1] == prompt.row["answer"]
        assert row == {
            "id": prompt.id, "task": "reasoning_gym", "prompt_hash": prompt.hash,
            "num_prompt_tokens": len(prompt.text.encode()), "text": expected.text,
            "num_tokens": expected.num_tokens, "finish": expected.finish,
            "work": {"nfe": float(expected.num_tokens)}, "error": None,
            "extracted": words[-1] if words else None, "correct": right,
            "reason": "the last word" if words else "no words",
        }  # fmt: skip
        assert prompt.text.count("Question: ") == 3 and prompt.text.endswith("\nAnswer:")
    name = "benchmark/reasoning_gym"
    correct = sum(row["correct"] for row in rows)
    assert (metrics[f"{name}/low"], metrics[f"{name}/high"]) == wilson_interval(correct, 12)
    assert (metrics[f"{name}/items"], metrics[f"{name}/correct"]) == (12, correct)
    assert metrics[f"{name}/accuracy"] == correct / 12 and metrics[f"{name}/errors"] == 0
    capped = sum(row["finish"] == "length" for row in rows)
    assert metrics[f"{name}/capped_rate"] == capped / 12
    assert metrics[f"{name}/tokens_per_forward"] == 1.0 and metrics[f"{name}/tokens_per_s"] > 0
    assert metrics[f"{name}/nfe"] == sum(row["num_tokens"] for row in rows) / 12
    out = capsys.readouterr().out
    assert "Wilson 95 %" in out and "| reasoning_gym | 12 |" in (
        tmp_path / "run" / "benchmark.md"
    ).read_text()  # fmt: skip


def test_done_is_done_and_another_grader_judges_the_same_answers(tmp_path, monkeypatch):
    first = run(configured(tmp_path))
    content = (tmp_path / "items.jsonl").read_bytes()
    monkeypatch.setattr(LocalGenerator, "_prefill", None)  # nothing may be answered again
    again = run(configured(tmp_path))
    assert (tmp_path / "items.jsonl").read_bytes() == content
    assert {key: first[key] for key in again} == again
    assert first.keys() - again.keys() == {"benchmark/reasoning_gym/tokens_per_s"}
    run(configured(tmp_path, f"+{GYM}.grader.ignore_case=true", "mode.label=again"))
    found = json.loads((tmp_path / "benchmark.json").read_text())
    assert found["label"] == "again"
    assert found["benchmarks"]["reasoning_gym"]["grader"] == {"last word": True}


def test_a_higher_limit_goes_on_and_a_limit_of_its_own_goes_first(tmp_path):
    assert run(configured(tmp_path, "mode.limit=3"))["benchmark/reasoning_gym/items"] == 3
    before = rows_of(tmp_path / "items.jsonl")
    assert "3 items; the complete benchmark has 12" in (tmp_path / "benchmark.md").read_text()
    metrics = run(configured(tmp_path, "mode.limit=3", f"{GYM}.limit=5"))
    assert metrics["benchmark/reasoning_gym/items"] == 5
    assert rows_of(tmp_path / "items.jsonl")[:3] == before
    assert len(rows_of(tmp_path / "partial.jsonl")) == 5


CHANGES = {
    f"{GYM}.max_new_tokens=21": r"settings\.max_new_tokens=20, now 21; allowed: the same, or",
    "mode.temperature=0.5": r"settings\.seed=null, now 1",
    "mode.thinking=true": r"settings\.thinking=false, now true",
    "model.seed=1": r"model\.fingerprint=\"\w+\", now \"\w+\"",
    f"{GYM}.shots=1": r"prompts\.shots=2, now 1",
    f"{GYM}.format=chat": r"prompts\.format=\"text\", now \"chat\"",
    f"{GYM}.prompts.seed=2": r"prompts\.exemplars\.seed=1, now 2",
    f"{GYM}.stop=[x]": r"settings\.stop_strings=\[\"\\nQuestion:\"\], now \[\"x\"\]",
}


def test_other_answers_are_refused(tmp_path):
    run(configured(tmp_path, "mode.limit=1"))
    before = (tmp_path / "conditions.json").read_bytes()
    for change, message in CHANGES.items():
        begun = rf"paths\.run_dir=.*: reasoning_gym was begun with {message}"
        with pytest.raises(ConfigError, match=begun):
            run(configured(tmp_path, "mode.limit=1", change))
    assert (tmp_path / "conditions.json").read_bytes() == before
    # Greedy answers depend on neither.
    items = f"{GYM}.prompts.seed=1"
    run(configured(tmp_path, "mode.limit=1", "seed=2", items, "mode.batch_size=1"))


def test_several_benchmarks_in_one_run_and_one_more_later(tmp_path):
    both = "benchmark=[reasoning_gym,gsm8k]"
    files = gsm8k_files(tmp_path)
    run(configured(tmp_path / "run", "mode.limit=2"))
    metrics = run(configured(tmp_path / "run", *files, "mode.limit=2", which=both))
    rows = rows_of(tmp_path / "run" / "items.jsonl")
    assert [row["task"] for row in rows] == ["reasoning_gym"] * 2 + ["gsm8k"] * 2
    assert {key.split("/")[1] for key in metrics} == {"reasoning_gym", "gsm8k"}
    cfg = configured(tmp_path / "run", *files, which=both)
    prompt = benchmark_eval.tasks_of(cfg)["gsm8k"].make_prompts()[0].text
    solved = [f"Question: What is {n} + 1?\nAnswer: It is {n + 1}.\n#### {n + 1}" for n in range(4)]
    assert prompt == "\n\n".join([*solved, "Question: What is 100 + 1?\nAnswer:"])
    # Of one alone the other's answers stay.
    run(configured(tmp_path / "run", "mode.limit=2"))
    assert len(rows_of(tmp_path / "run" / "partial.jsonl")) == 4


def test_two_benchmarks_with_an_item_of_one_name(tmp_path):
    files = gsm8k_files(tmp_path)
    cfg = configured(tmp_path, *files, which="benchmark=[reasoning_gym,gsm8k]")
    cfg.benchmark.reasoning_gym = {**cfg.benchmark.gsm8k, "name": "reasoning_gym"}
    with pytest.raises(ConfigError, match=r"both have an item 'gsm8k/0'; allowed: item sets"):
        run(cfg)
    cfg.benchmark.reasoning_gym.name = "gsm8k"
    with pytest.raises(ConfigError, match=r"benchmark\.\w+\.name=gsm8k: another one is called so"):
        run(cfg)


def test_an_item_without_room_is_wrong_and_counted(tmp_path):
    cfg = configured(tmp_path, "model.max_position_embeddings=300")
    metrics = run(cfg)
    rows = rows_of(tmp_path / "items.jsonl")
    failed = [row for row in rows if row["error"] is not None]
    assert 0 < len(failed) < 12 and metrics["benchmark/reasoning_gym/errors"] == len(failed)
    assert metrics["benchmark/reasoning_gym/items"] == 12
    for row in failed:
        assert "allowed 1 .. 299" in row["error"] and row["correct"] is False
        assert (row["text"], row["reason"], row["extracted"]) == ("", "no answer", None)
    partial = {row["id"] for row in rows_of(tmp_path / "partial.jsonl")}
    assert partial == {row["id"] for row in rows if row["error"] is None}


def at_server(server):
    return (
        "mode/backend=server", f"mode.backend.base_url={server.url}", "mode.backend.model=toy",
        "mode.backend.token_ids=none", "trainer=cpu",
    )  # fmt: skip


def test_a_server_gets_the_text_and_the_stop_strings(tmp_path):
    with answer_server(tmp_path) as server:
        cfg = configured(tmp_path / "run", f"{GYM}.format=text", model=at_server(server))
        run(cfg)
        bodies = server.seen("bodies")
    rows = rows_of(tmp_path / "run" / "items.jsonl")
    (task,) = benchmark_eval.tasks_of(cfg).values()
    for prompt, row in zip(task.make_prompts(), rows, strict=True):
        assert bodies[prompt.text]["stop"] == ["\nQuestion:"]
        assert bodies[prompt.text]["max_tokens"] == 20 and row["num_prompt_tokens"] is None
        assert row["text"] == prompt.text.upper()[:20] and row["work"] is None
    with answer_server(tmp_path / "run") as server:
        cfg = configured(tmp_path / "chat", f"{GYM}.format=chat", model=at_server(server))
        run(cfg)
        assert "stop" not in next(iter(server.seen("bodies").values()))
    assert json.loads((tmp_path / "run" / "benchmark.json").read_text())["benchmarks"]


# `main.py` whose journal stands still behind a number of rows, so that a kill always comes in time.
STALLING = """
import runpy, sys, time
from data.journal import Journal

append, rows = Journal.append, []

def stall(self, row):
    append(self, row)
    rows.append(row)
    if len(rows) == {count}:
        time.sleep(600)

Journal.append = stall
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def kill_in_the_middle(arguments, partial, rows):
    process = subprocess.Popen(
        [sys.executable, "-c", STALLING.format(count=rows), *command(*arguments)[1:]],
        cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while not partial.is_file() or partial.read_bytes().count(b"\n") < rows:
        assert process.poll() is None and time.monotonic() < deadline, "ended before the kill"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()


def check_resumed(folder, unbroken, kept):
    """Break the last line as a kill inside a write would, then go on."""
    assert not (folder / "items.jsonl").exists()
    partial = folder / "partial.jsonl"
    partial.write_bytes(partial.read_bytes()[:-9])
    before = partial.read_bytes().splitlines(keepends=True)[: kept - 1]
    assert len(before) == kept - 1
    run(configured(folder))
    lines = partial.read_bytes().splitlines(keepends=True)
    assert lines[: kept - 1] == before
    assert len({json.loads(line)["id"] for line in lines}) == len(lines) == 12
    assert (folder / "items.jsonl").read_bytes() == (unbroken / "items.jsonl").read_bytes()


def test_broken_off_and_resumed_nothing_is_lost_or_doubled(tmp_path, monkeypatch):
    run(configured(tmp_path / "unbroken"))
    append, rows = Journal.append, []

    def stop(self, row):
        append(self, row)
        rows.append(row)
        if len(rows) == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Journal, "append", stop)
        run(configured(tmp_path / "broken"))
    check_resumed(tmp_path / "broken", tmp_path / "unbroken", kept=5)


@pytest.mark.slow
def test_killed_and_resumed_nothing_is_lost_or_doubled(tmp_path):
    run(configured(tmp_path / "unbroken"))
    killed = tmp_path / "killed"
    kill_in_the_middle([*gym(), f"paths.run_dir={killed}"], killed / "partial.jsonl", 5)
    check_resumed(killed, tmp_path / "unbroken", kept=5)


def test_an_answer_to_another_prompt_is_not_taken(tmp_path):
    run(configured(tmp_path, "mode.limit=2"))
    row = rows_of(tmp_path / "partial.jsonl")[0]
    (tmp_path / "partial.jsonl").write_text(json.dumps(row | {"prompt_hash": "x"}) + "\n")
    with pytest.raises(ValueError, match="was answered under another prompt"):
        run(configured(tmp_path, "mode.limit=2"))
    with Journal(tmp_path / "partial.jsonl") as journal:
        assert len(journal) == 1
    (tmp_path / "conditions.json").unlink()
    with pytest.raises(ConfigError, match=r"answers without conditions\.json, which says whose"):
        run(configured(tmp_path, "mode.limit=2"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("model.name=x", "~model.mask_token"), "model=x: not a model that answers; allowed: tiny"),
        (("eval.checkpoint_path=a.ckpt", "mode/backend=server", "mode.backend.model=x"),
         r"eval\.checkpoint_path=a\.ckpt: mode/backend=server answers without it"),
    ],
)  # fmt: skip
def test_a_model_that_does_not_answer(tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        run(compose_config(*gym(*overrides), run_dir=tmp_path))
    cfg = compose_config("mode=benchmark_eval", *TINY, run_dir=tmp_path)
    with pytest.raises(
        ConfigError, match="benchmark=null: nothing to answer; allowed: one of gpqa"
    ):
        run(cfg)


def test_a_checkpoint_whose_algorithm_does_not_answer(tmp_path, monkeypatch):
    model = small_model("algo=mdlm")
    monkeypatch.setattr(benchmark_eval, "open_to_answer", lambda cfg: (model, cfg))
    with pytest.raises(ConfigError, match="algo=mdlm: does not answer prompts"):
        run(compose_config(*gym("eval.checkpoint_path=a.ckpt"), run_dir=tmp_path))


@pytest.mark.parametrize(
    "bad", ["mode.workers=0", "mode.label=3", "benchmark=null", "mode.limit=0", "mode.top_p=2"]
)
def test_wrong_values(tmp_path, bad):
    key = bad.partition("=")[0]
    cfg = compose_config("mode=benchmark_eval", *TINY, *([bad] if bad != "benchmark=null" else []))
    if bad == "benchmark=null":
        validate(cfg)
        return
    with pytest.raises(ConfigError, match=key):
        validate(cfg)


def test_a_checkpoint_answers_as_its_algorithm_decodes(tmp_path):
    from modes import train
    from tests.runs import EIGHT_STEPS, best, write_corpus

    corpus = write_corpus(tmp_path)
    cfg = compose_config(
        "experiment=block_text", "algo=draft_refine", *TINY[:2], "model.length=32", "data=text",
        "data.tokenizer_name_or_path=target", "data.join=true", "data.align=4", "data.wrap=false",
        "data.insert_train_eos=true", "data.insert_valid_eos=true", f"data.files={corpus}",
        "data.valid_fraction=0.2", f"paths.cache_dir={tmp_path}/cache", *EIGHT_STEPS,
        "trainer.max_steps=4", run_dir=tmp_path / "train",
    )  # fmt: skip
    train.run(cfg)
    checkpoint = (f"eval.checkpoint_path={best(tmp_path / 'train')}", "trainer=cpu")
    cfg = configured(tmp_path / "run", "mode.limit=2", model=checkpoint)
    metrics = run(cfg)
    rows = rows_of(tmp_path / "run" / "items.jsonl")
    assert [row["work"]["blocks"] for row in rows] == [
        metrics["benchmark/reasoning_gym/work/blocks"]
    ] * 2
    passes = sum(row["work"]["nfe"] for row in rows)
    tokens = sum(row["num_tokens"] for row in rows)
    assert metrics["benchmark/reasoning_gym/tokens_per_forward"] == tokens / passes
    found = json.loads((tmp_path / "run" / "conditions.json").read_text())
    assert found["reasoning_gym"]["model"]["target"] == "tiny_causal:draft_refine"


def test_a_benchmark_of_ones_own_is_a_module_and_a_yaml(tmp_path, call):
    done = call(
        "--config-dir", "tests/plugins/configs", "mode=benchmark_eval", "benchmark=toy_sums",
        *TINY, f"paths.run_dir={tmp_path}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [row["id"] for row in rows_of(tmp_path / "items.jsonl")] == [
        "toy_sums/1", "toy_sums/2", "toy_sums/3",
    ]  # fmt: skip
    metrics = load_summary(tmp_path)["metrics"]
    assert metrics["benchmark/toy_sums/items"] == metrics["benchmark/toy_sums/expected"] == 3


@pytest.mark.slow
def test_a_signal_keeps_the_answers(tmp_path):
    with answer_server(tmp_path, delay_s=0.2) as server:
        arguments = gym(f"paths.run_dir={tmp_path}/run", "mode.batch_size=1",
                        model=at_server(server))  # fmt: skip
        process = subprocess.Popen(
            command(*arguments), cwd=ROOT, env=environment(), stderr=subprocess.PIPE, text=True
        )
        partial = tmp_path / "run" / "partial.jsonl"
        while not partial.is_file() or partial.read_bytes().count(b"\n") < 3:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 143 and "Traceback" not in errors
    assert load_summary(tmp_path / "run")["status"] == "interrupted"
    assert partial.read_bytes().endswith(b"\n")
