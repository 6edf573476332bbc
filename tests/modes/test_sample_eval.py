"""mode=sample_eval on checkpoints of small random models."""

import json
from pathlib import Path

import pytest

from data.errors import DataError
from decoding.reveal import Ancestral, EntropyBound, FirstHitting, TopK
from evaluation import samples
from modes.sample_eval import first_documents, run, sampling_config
from runtime.errors import ConfigError
from tests.grammar_runs import LENGTH, save_checkpoint
from tests.small import small_model
from tests.support import compose_config


def sample_run(tmp_path: Path, out: str, *overrides: str) -> tuple[dict, list[dict]]:
    """Metrics and rows of a run in the mode."""
    path, run_dir = tmp_path / "best.ckpt", tmp_path / out
    mode = ("mode=sample_eval", f"eval.checkpoint_path={path}", "trainer=cpu", *overrides)
    more = ("loader.eval_global_batch_size=4", f"paths.cache_dir={tmp_path}")
    metrics = run(compose_config(*mode, *more, run_dir=run_dir))
    lines = (run_dir / "samples.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in lines]


@pytest.mark.parametrize("algo", ["mdlm", "bd3lm", "ar"])
def test_samples_are_kept_and_measured(tmp_path, capsys, algo):
    block = ["block_size=4"] if algo == "bd3lm" else []
    save_checkpoint(tmp_path, f"algo={algo}", *block)
    metrics, rows = sample_run(tmp_path, "one", "sampling.num_sample_batches=2")
    assert len(rows) == metrics["num_samples"] == 8
    assert [row["sample"] for row in rows] == list(range(8))
    assert {row["batch"] for row in rows} == {0, 1}
    assert all(row["length"] == len(row["ids"]) == LENGTH for row in rows)
    assert all(row["stop_reason"] == "length" and row["seed"] == 1 for row in rows)
    assert metrics["nfe"] == 2 * 15 and metrics["tokens_per_forward"] == 1.0
    assert metrics["nfe_per_sample"] == 15 and {row["nfe"] for row in rows} == {15}
    assert metrics["stopped/length"] == 1.0 and metrics["tokens_per_s"] > 0
    assert 0 <= metrics["grammatical_rate"] <= 1 and metrics["grammatical_rate_high"] > 0
    assert 0 < metrics["distinct_1"] <= 1 and metrics["entropy"] > 0
    assert "gen_ppl" not in metrics and "mauve" not in metrics
    printed = capsys.readouterr().out
    assert rows[0]["text"] in printed and "tokens_per_forward" in printed


def test_samples_do_not_depend_on_the_batch_size(tmp_path):
    save_checkpoint(tmp_path, "algo=bd3lm", "block_size=4")
    options = ("sampling.tokens_per_step=2", "sampling.nucleus_p=0.9")
    _, four = sample_run(tmp_path, "four", "sampling.batch_size=4", *options)
    many = ("sampling.batch_size=1", "sampling.num_sample_batches=4")
    metrics, single = sample_run(tmp_path, "single", *many, *options)
    assert [row["ids"] for row in four] == [row["ids"] for row in single]
    assert metrics["nfe"] == 4 * 8
    assert metrics["tokens_per_forward"] == pytest.approx(15 / 8)


def test_length_prompt_and_variable_length(tmp_path):
    save_checkpoint(tmp_path, "algo=bd3lm", "block_size=4")
    _, rows = sample_run(tmp_path, "a", "sampling.length=24", "sampling.prompt='the dog'")
    assert all(row["text"].startswith("the dog") and row["length"] == 24 for row in rows)
    metrics, rows = sample_run(
        tmp_path, "b", "sampling.var_length=true", "sampling.num_sample_batches=20"
    )
    ended = [row for row in rows if row["stop_reason"] == "eos"]
    assert metrics["stopped/eos"] == len(ended) / len(rows) > 0
    assert all(row["length"] <= LENGTH for row in ended)


def test_generative_perplexity_is_asked_of_the_named_model(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, "algo=mdlm")
    asked = []

    def score(texts, name, device):
        asked.append((len(texts), name))
        return {"gen_ppl": 12.0}

    monkeypatch.setattr("modes.sample_eval.generative_perplexity", score)
    metrics, _ = sample_run(tmp_path, "out", "eval.generative_model=some/model")
    assert metrics["gen_ppl"] == 12.0 and asked == [(4, "some/model")]


def test_sampling_needs_no_training_text(tmp_path):
    """A checkpoint of a text that is not on this machine speaks all the same."""
    save_checkpoint(tmp_path)
    other = ("data=text", "data.files=absent.txt")
    _, rows = sample_run(tmp_path, "out", *other, "sampling.batch_size=2")
    assert len(rows) == 2


def test_samples_are_kept_when_measuring_them_fails(tmp_path):
    """A scorer that does not exist costs the score, not the samples."""
    save_checkpoint(tmp_path)
    with pytest.raises(DataError, match=r"eval\.generative_model=/absent"):
        sample_run(tmp_path, "out", "eval.generative_model=/absent", "sampling.batch_size=2")
    assert len((tmp_path / "out" / "samples.jsonl").read_text().splitlines()) == 2


def test_mauve_without_its_package_is_refused_before_sampling(tmp_path, monkeypatch):
    monkeypatch.setattr("modes.sample_eval.mauve_is_installed", lambda: False)
    save_checkpoint(tmp_path, "algo=mdlm")
    with pytest.raises(ConfigError, match=r"eval\.mauve=true: needs the package mauve-text"):
        sample_run(tmp_path, "out", "eval.mauve=true")
    assert samples.mauve_is_installed() in (True, False)


def test_nothing_to_generate_is_an_error(tmp_path):
    save_checkpoint(tmp_path, "algo=mdlm")
    with pytest.raises(ConfigError, match="num_sample_batches=0"):
        sample_run(tmp_path, "out", "sampling.num_sample_batches=0")


@pytest.mark.parametrize(
    ("overrides", "rule", "attributes"),
    [
        ([], FirstHitting, {"tokens_per_step": 1}),
        (["sampling.tokens_per_step=3"], FirstHitting, {"tokens_per_step": 3}),
        (["sampling.first_hitting=false"], Ancestral, {"num_steps": 1000}),
        (["sampling.first_hitting=false", "algo.T=7"], Ancestral, {"num_steps": 7}),
        (["sampling/strategy=top_k", "sampling.tokens_per_step=2"], TopK, {"tokens_per_step": 2}),
        (
            ["sampling/strategy=entropy_bound", "sampling.entropy_bound=0.5"],
            EntropyBound,
            {"bound": 0.5},
        ),
    ],
)
def test_strategies_come_from_the_configuration(overrides, rule, attributes):
    strategy = sampling_config(compose_config(*overrides)).strategy
    assert isinstance(strategy, rule) and vars(strategy) == attributes


def test_a_document_ends_at_its_first_end_of_text():
    model = small_model()
    pad, bos, eos = 0, 1, 2
    rows = [[bos, 5, 6, eos, 7, pad], [bos, 5, 6, 7], [eos, 5, eos, 6]]
    assert first_documents(rows, model) == ["a b", "a b c", "a"]
