"""mode=sft_eval and mode=sft_table: what a checkpoint has learned, and arms side by side."""

import json

import pytest

from evaluation.degeneration import repeated_share
from modes import sft_eval, sft_table
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.block_runs import build, fit
from tests.support import compose_config
from tests.thoughts import thoughts

STEPS = ("trainer.max_steps=3", "trainer.val_check_interval=3", "training.ema=0")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A training, and its evaluation."""
    folder = tmp_path_factory.mktemp("sft")
    trained = fit(folder, folder / "train", "sft_thoughts", *STEPS, data=thoughts)
    return folder, trained, evaluate(folder, "eval", f"mode.run={folder}/train")


def evaluate(folder, name, *overrides, train="train"):
    cfg = compose_config(
        "mode=sft_eval", f"eval.checkpoint_path={folder}/{train}/checkpoints/last.ckpt",
        "trainer=cpu", "trainer.enable_progress_bar=false", f"paths.cache_dir={folder}/cache",
        "mode.num_samples=6", "mode.max_new_tokens=12", "mode.prompt_tokens=8",
        "loader.eval_global_batch_size=8", *overrides, run_dir=folder / name,
    )  # fmt: skip
    validate(cfg)
    return sft_eval.run(cfg)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_losses_are_those_of_the_training_and_of_the_rows(runs):
    folder, trained, found = runs
    for name in ("raw", "selected"):
        rows = lines(folder / "eval" / "rows.jsonl")
        nats, tokens = (sum(row[f"{of}_{name}"] for row in rows) for of in ("nll", "tokens"))
        assert found[f"val_loss_{name}"] == pytest.approx(nats / tokens)
        for ending in ("", "_batch_mean"):
            wanted = trained[f"val/loss_{name}{ending}"]
            assert found[f"val_loss_{name}{ending}"] == pytest.approx(wanted, rel=1e-5)
        assert found[f"tokens_{name}"] == tokens and 0 < found[f"val_loss_{name}_se"] < 1
    assert found["primary_metric"] == found["val_loss_selected"] != found["val_loss_raw"]
    assert found["nll_thought"] == pytest.approx(trained["val/nll_thought"], rel=1e-5)
    assert found["rows"] == len(rows) and found["thought_documents"] == 6


def test_what_training_cost_is_merged(runs):
    folder, _, found = runs
    cost = json.loads((folder / "train" / "throughput.json").read_text())
    for name in ("tokens_seen", "tok_per_sec", "available_mem_gib_min"):
        assert found[name] == cost[name]
    with pytest.raises(ConfigError, match=r"nowhere/throughput\.json: cannot be read .*mode\.run="):
        evaluate(folder, "lost", f"mode.run={folder}/nowhere")


def test_generations_are_kept_with_their_repetition(runs):
    folder, _, found = runs
    written = lines(folder / "eval" / "generations.jsonl")
    assert [row["id"] for row in written] == list("012345")
    # Beginnings have no thoughts in them: "line N is ..." and a thought.
    assert all(0 < len(row["prompt"]) <= 8 and row["prompt"][0] > 3 for row in written)
    rates = [repeated_share(row["tokens"], 4) for row in written if len(row["tokens"]) >= 4]
    assert found["repetition_4gram_rate_generated"] == pytest.approx(sum(rates) / len(rates))
    assert found["repetition_4gram_texts_generated"] == len(rates)
    _, data, _ = build(folder, "sft_thoughts", data=thoughts)
    documents = data.rows("validation").take(range(len(data.rows("validation"))))["segment"]
    assert found["repetition_4gram_texts_data"] == (documents.max(1) + 1).sum() > found["rows"]
    metrics = json.loads((folder / "eval" / "metrics.json").read_text())
    assert metrics["arm"] == "eval" and metrics["checkpoint"].endswith("last.ckpt")
    assert {name: metrics[name] for name in found} == found


def test_arms_make_a_table(runs, capsys):
    folder, _, found = runs
    more = evaluate(folder, "other", "mode.label=think", "mode.num_samples=0", "eval.limit_rows=4")
    assert "repetition_4gram_rate_generated" not in more and more["rows"] == 4
    cfg = compose_config(
        "mode=sft_table", f"mode.runs=[{folder}/eval,{folder}/other/metrics.json]",
        run_dir=folder / "table",
    )  # fmt: skip
    validate(cfg)
    metrics = sft_table.run(cfg)
    assert metrics["val_loss_raw/eval"] == found["val_loss_raw"]
    assert metrics["val_loss_raw/think"] == more["val_loss_raw"]
    said, text = capsys.readouterr().out, (folder / "table" / "sft_table.md").read_text()
    for cell in (f"{found['val_loss_raw']:.6f}", f"{found['tokens_seen']:,}", "think"):
        assert cell in said and cell in text
    cfg = compose_config("mode=sft_table", f"mode.runs={folder}/none*", run_dir=folder / "table")
    with pytest.raises(ConfigError, match=r"none\*: nothing there; allowed: folders of finished"):
        sft_table.run(cfg)


def test_only_its_own_checkpoints(runs, monkeypatch):
    monkeypatch.setattr(sft_eval, "open_checkpoint", lambda cfg: (object(), cfg))
    with pytest.raises(ConfigError, match="algo=mdlm: mode=sft_eval evaluates checkpoints of algo"):
        evaluate(runs[0], "refused")
