"""mode=harness_eval: from a configuration to the harness's numbers, a row per item beside them."""

import json
import math
import subprocess
import sys

import pytest
import torch

pytest.importorskip("lm_eval", reason="needs lm_eval: pip install -r requirements-extra.txt")

import evaluation.harness_run
from data.errors import DataError
from decoding.likelihood import continuation_likelihoods
from decoding.local import LocalGenerator
from models.tiny_causal import tiny_causal
from modes import harness_eval
from modes.harness_eval import run
from runtime.errors import ConfigError
from runtime.run import load_summary
from runtime.validation import validate
from tests.evaluation.harness_tasks import CHOICES, NAMES, QUESTIONS, TEXTS, write_tasks
from tests.support import ROOT, compose_config, environment

TINY = ("model=tiny_causal", "model.num_hidden_layers=2", "model.dtype=float64", "trainer=cpu")
TARGET = tiny_causal(num_hidden_layers=2, dtype="float64")


def options(folder, *overrides, tasks=NAMES):
    return (
        "mode=harness_eval", f"mode.tasks=[{','.join(tasks)}]", f"mode.include_path={folder}",
        "mode.batch_size=4", *overrides,
    )  # fmt: skip


def configured(folder, *overrides, **which):
    write_tasks(folder)
    cfg = compose_config(*options(folder, *TINY, *overrides, **which), run_dir=folder / "run")
    validate(cfg)
    return cfg


def samples(folder):
    lines = (folder / "run" / "samples.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def ids(text):
    return TARGET.tokenizer.encode(text)


@torch.no_grad()
def log_likelihood(prompt, continuation):
    """Under the model of transformers, token after token."""
    read = torch.tensor([[*prompt, *continuation]])
    logprobs = TARGET.model(read).logits[0, :-1].log_softmax(-1)
    chosen = logprobs[torch.arange(len(logprobs)), read[0, 1:]]
    return float(chosen[len(prompt) - 1 :].sum())


def test_numbers_are_those_of_plain_computations(tmp_path, capsys):
    metrics = run(configured(tmp_path))
    right = []
    for row in CHOICES:
        values = [log_likelihood(ids(row["question"]), ids(f" {c}")) for c in row["choices"]]
        right.append(float(values.index(max(values)) == row["label"]))
    accuracy = sum(right) / 6
    assert 0 < accuracy < 1
    nats = sum(log_likelihood([TARGET.tokenizer.eos_token_id], ids(t["text"])) for t in TEXTS)
    size = sum(len(t["text"].encode()) for t in TEXTS)
    assert metrics == {
        "truncated": 0, "failed": 0,
        "own_answers/exact_match": 0.0, "own_answers/exact_match_stderr": 0.0,
        "own_answers/items": 6,
        "own_choices/acc": pytest.approx(accuracy),
        "own_choices/acc_stderr": pytest.approx(math.sqrt(accuracy * (1 - accuracy) / 5)),
        "own_choices/items": 6,
        "own_texts/bits_per_byte": pytest.approx(-nats / size / math.log(2), abs=1e-6),
        "own_texts/items": 3,
    }  # fmt: skip
    assert "own_choices" in capsys.readouterr().out
    by_task = {name: [row for row in samples(tmp_path) if row["task"] == name] for name in NAMES}
    assert [row["acc"] for row in by_task["own_choices"]] == right
    assert [row["doc"] for row in by_task["own_answers"]] == QUESTIONS
    for row in by_task["own_answers"]:
        prompt = torch.tensor([ids(row["doc"]["question"])])
        answer = TARGET.model.generate(prompt, max_new_tokens=12, do_sample=False)
        whole = TARGET.tokenizer.decode(answer[0, prompt.shape[1] :], skip_special_tokens=True)
        assert row["resps"] == [[whole.split("\u0014")[0].split("q")[0]]]
        assert row["answers"][0]["num_tokens"] == row["answers"][0]["work"]["nfe"] <= 12
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["results"]["own_choices"]["acc,none"] == pytest.approx(accuracy)
    assert results["model"] == "tiny_causal" and results["lm_eval"].startswith("0.4.")


def test_options_reach_the_harness(tmp_path):
    more = ("mode.limit=2", "mode.num_fewshot=1", "mode.gen_kwargs={max_gen_toks:3}")
    # Examples come from the same items where a task names no others.
    metrics = run(configured(tmp_path, *more, tasks=["own_answers"]))
    assert metrics["own_answers/items"] == 2
    rows = samples(tmp_path)
    assert [row["answers"][0]["num_tokens"] for row in rows] == [3, 3]
    for row in rows:
        ((prompt, asked),) = row["arguments"]
        example, _, question = prompt.rpartition("\n\n")
        assert question == row["doc"]["question"]
        assert example in {f"{other['question']} {other['answer']}" for other in QUESTIONS}
        assert asked["max_gen_toks"] == 3 and asked["until"] == ["\u0014", "q"]


def test_prompts_may_be_chats(tmp_path):
    more = ("mode.apply_chat_template=true", "mode.system_instruction=Count", "mode.limit=1")
    run(configured(tmp_path, *more, tasks=["own_answers"]))
    (row,) = samples(tmp_path)
    turns = [
        {"role": "system", "content": "Count"},
        {"role": "user", "content": row["doc"]["question"]},
    ]
    assert ids(row["arguments"][0][0]) == TARGET.chat_ids(turns)


class Answers:
    """An algorithm that answers as the target does."""

    def as_target(self):
        return TARGET

    def generator(self, settings, batch_size=32, device=None):
        return LocalGenerator(TARGET, settings, batch_size, device=device)

    def loglikelihood(self, pairs):
        return continuation_likelihoods(TARGET, pairs)

    def to(self, device):
        return self

    def eval(self):
        return self


def test_a_checkpoint_answers_by_its_algorithm(tmp_path, monkeypatch):
    expected = run(configured(tmp_path))
    cfg = configured(tmp_path, f"eval.checkpoint_path={tmp_path}/a.ckpt")
    monkeypatch.setattr(harness_eval, "open_to_answer", lambda cfg: (Answers(), cfg))
    assert run(cfg) == pytest.approx(expected)
    monkeypatch.setattr(harness_eval, "open_to_answer", lambda cfg: (object(), cfg))
    with pytest.raises(ConfigError, match=r"a\.ckpt: algo=mdlm cannot answer prompts; allowed"):
        run(cfg)


def test_what_is_not_there_is_told_in_one_line(tmp_path, monkeypatch):
    # The harness's own tasks take ten seconds to list.
    only_own = evaluation.harness_run.TaskManager

    def quick(include_path=None, include_defaults=False):
        return only_own(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(evaluation.harness_run, "TaskManager", quick)
    with pytest.raises(DataError, match=r"mode.tasks=no_such: no such task; allowed: .*lm_eval ls"):
        run(configured(tmp_path, tasks=["no_such"]))
    cfg = configured(tmp_path)
    (tmp_path / "own_texts.jsonl").unlink()
    with pytest.raises(DataError, match=r"own_texts: cannot be loaded \(FileNotFoundError: "):
        run(cfg)
    with pytest.raises(DataError, match=r"mode\.include_path=/not/there: no such folder"):
        run(configured(tmp_path, "mode.include_path=/not/there"))
    code = (tmp_path / "own_answers.yaml").read_text() + "unsafe_code: true\n"
    cfg = configured(tmp_path, tasks=["own_answers"])
    (tmp_path / "own_answers.yaml").write_text(code)
    with pytest.raises(DataError, match=r"own_answers: it runs what .*mode.allow_code=true"):
        run(cfg)
    with pytest.raises(ConfigError, match="model=nano: not a model that answers; allowed: tiny"):
        run(compose_config(*options(tmp_path), run_dir=tmp_path / "run"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package lm_eval; pip install -r requirements"):
        run(configured(tmp_path))


def test_a_metric_that_runs_code_has_its_leave_when_its_task_is_loaded(tmp_path, monkeypatch):
    """As tasks/humaneval of lm_eval does, which tries its metric where it is imported."""
    write_tasks(tmp_path)
    (tmp_path / "own_code.py").write_text(
        "import os\n\nif os.getenv('HF_ALLOW_CODE_EVAL', 0) != '1':\n"
        "    raise ValueError('no leave')\n\n\ndef as_it_is(doc):\n    return doc['question']\n"
    )
    task = (
        (tmp_path / "own_answers.yaml")
        .read_text()
        .replace('"{{question}}"', "!function own_code.as_it_is")
    )
    more = ("mode.limit=1", "mode.gen_kwargs={max_gen_toks:2}")
    # Undone at the end, also of what the run sets.
    monkeypatch.setenv("HF_ALLOW_CODE_EVAL", "0")
    cfg = configured(tmp_path, *more, tasks=["own_answers"])
    (tmp_path / "own_answers.yaml").write_text(task + "unsafe_code: true\n")
    with pytest.raises(DataError, match=r"cannot be loaded \(.*no leave\)"):
        run(cfg)
    cfg.mode.allow_code = True
    assert run(cfg)["own_answers/items"] == 1


@pytest.mark.slow
def test_two_processes_share_the_items(tmp_path):
    write_tasks(tmp_path)
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    end = [f"paths.run_dir={tmp_path}/run", "mode.batch_size=2"]
    # An odd number of items: the second rank is padded.
    arguments = [*options(tmp_path, *TINY, "mode.limit=5"), *end]
    done = subprocess.run(
        [*launcher, "--nproc_per_node=2", str(ROOT / "main.py"), *arguments],
        cwd=tmp_path, env=environment(), capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    shared = load_summary(tmp_path / "run")["metrics"]
    rows = samples(tmp_path)
    alone = run(configured(tmp_path, "mode.limit=5"))
    assert shared == pytest.approx(alone)
    told = [(row["id"], row.get("answers")) for row in samples(tmp_path)]
    assert [(row["id"], row.get("answers")) for row in rows] == told
    assert sum(answers is not None for _, answers in told) == 5
