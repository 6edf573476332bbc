"""mode=sft_eval and mode=sft_table: what a checkpoint has learned, and arms side by side."""

import json
from functools import partial

import pytest

from data.errors import DataError
from data.thoughts import Delimiters, Insertion, splice
from evaluation.degeneration import repeated_share
from modes import sft_eval, sft_table
from runtime.errors import ConfigError
from runtime.validation import validate
from tests.block_runs import build, fit
from tests.support import compose_config
from tests.thoughts import THINK, thoughts

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
    refused = f"think vs eval is not compared: not the same validation rows, 4 and {found['rows']}"
    assert refused in text
    assert "95 % of Delta" not in text and not any("delta" in name for name in metrics)
    cfg = compose_config("mode=sft_table", f"mode.runs={folder}/none*", run_dir=folder / "table")
    with pytest.raises(ConfigError, match=r"none\*: nothing there; allowed: folders of finished"):
        sft_table.run(cfg)


def table(folder, *names):
    """The table of some evaluations: its metrics, its text and its JSON."""
    out = folder / "_".join(names)
    listed = ",".join(f"{folder}/{name}" for name in names)
    cfg = compose_config("mode=sft_table", f"mode.runs=[{listed}]", run_dir=out)
    validate(cfg)
    metrics = sft_table.run(cfg)
    written = json.loads((out / "sft_table.json").read_text())
    return metrics, (out / "sft_table.md").read_text(), written


def test_arms_are_compared_in_pairs_row_by_row(runs):
    folder, _, found = runs
    longer = ("trainer.max_steps=9", "trainer.val_check_interval=9", "training.ema=0")
    fit(folder, folder / "longer", "sft_thoughts", *longer, data=thoughts)
    after = evaluate(folder, "after", "mode.num_samples=0", train="longer")
    evaluate(folder, "again", "mode.num_samples=0")
    metrics, text, written = table(folder, "eval", "after", "again")
    assert written["notes"] == [] and len(written["differences"]) == 6
    for one in written["differences"][:2]:
        loss, (right, left) = one["loss"], (one["right"], one["left"])
        assert (right, left, one["drawn"]) == ("after", "eval", found["rows"])
        assert one["value"] == pytest.approx(after[loss] - found[loss])
        assert one["tokens"] == found[f"tokens_{loss.removeprefix('val_loss_')}"]
        # Six more steps help on every row alike.
        assert one["low"] < one["value"] < one["high"] < 0 and one["p"] < 0.05
        assert metrics[f"delta_{loss}/after-eval"] == one["value"]
        assert metrics[f"delta_{loss}_p/after-eval"] == one["p"]
        assert f"| {one['value']:+.6f} | [{one['low']:+.6f}, {one['high']:+.6f}] |" in text
    # The same checkpoint twice.
    assert metrics["delta_val_loss_raw/again-eval"] == 0.0
    assert metrics["delta_val_loss_selected_p/again-eval"] == 1.0
    assert "Documents are drawn and trainings are not" in text


def test_what_rows_do_not_allow_is_not_compared(runs):
    folder, _, _ = runs
    # Nothing says which of its tokens are thoughts: without thoughts it is a longer text.
    fit(folder, folder / "plain", "sft_thoughts", *STEPS, data=partial(thoughts, marked=False))
    evaluate(folder, "unmarked", "mode.num_samples=0", train="plain")
    metrics, _, written = table(folder, "eval", "unmarked")
    assert written["differences"] == [] and not any("delta" in name for name in metrics)
    assert ["which documents they are" in said for said in written["notes"]] == [True, False]
    # Rows alone are lost; then they are those of another checkpoint.
    lost = folder / "lost_rows"
    lost.mkdir()
    about = json.loads((folder / "eval" / "metrics.json").read_text()) | {"arm": "lost"}
    (lost / "metrics.json").write_text(json.dumps(about))
    _, text, written = table(folder, "eval", "lost_rows")
    assert "as no rows.jsonl stands beside metrics.json: lost" in text
    assert len(written["notes"]) == 1
    (lost / "rows.jsonl").write_bytes((folder / "unmarked" / "rows.jsonl").read_bytes())
    with pytest.raises(DataError, match=r"arm 'lost': val_loss_raw=.* run it again"):
        table(folder, "eval", "lost_rows")


def with_and_without(folder, form):
    """Overrides: documents of which the longest are not the longest with their thoughts."""
    path = folder / "both.jsonl"
    if not path.is_file():
        texts = [f"{n} {'xy ' * (n % 7)}= " for n in range(60)]
        made = [
            (text, splice(text, [Insertion(len(text), "y" * (5 * (n * 5 % 9) + 1))], Delimiters()))
            for n, text in enumerate(texts)
        ]
        path.write_text("".join(
            json.dumps({"id": raw, "source_sha": raw, "raw_text": raw, "augmented_text": augmented})
            + "\n"
            for raw, augmented in made
        ))  # fmt: skip
    return (
        "data=thoughts", f"data.files={path}", "data.valid_fraction=0.4", f"data.form={form}",
        "data.end_suffix=true", THINK,
    )  # fmt: skip


def test_arms_of_two_forms_are_compared_without_thoughts(tmp_path):
    for form in ("raw", "interleaved"):
        data = partial(with_and_without, form=form)
        fit(tmp_path, tmp_path / form, "sft_thoughts", *STEPS, data=data)
        evaluate(tmp_path, f"of_{form}", "mode.num_samples=0", train=form)
    rows = [lines(tmp_path / f"of_{form}" / "rows.jsonl") for form in ("raw", "interleaved")]
    counts = [{row["document"]: row["tokens_raw"] for row in one} for one in rows]
    assert counts[0] == counts[1] and len(set(counts[0].values())) > 2
    # The order of the rows is another one: joined by it, losses would be of unlike texts.
    assert [row["document"] for row in rows[0]] != [row["document"] for row in rows[1]]
    metrics, text, written = table(tmp_path, "of_raw", "of_interleaved")
    (one,) = written["differences"]
    assert (one["loss"], one["joined_by"], one["drawn"]) == (
        "val_loss_raw",
        "document",
        len(counts[0]),
    )
    losses = (metrics[f"val_loss_raw/of_{form}"] for form in ("interleaved", "raw"))
    assert one["value"] == pytest.approx(next(losses) - next(losses))
    assert "Val Loss Selected of of_interleaved vs of_raw is not compared" in text


def test_only_its_own_checkpoints(runs, monkeypatch):
    monkeypatch.setattr(sft_eval, "open_checkpoint", lambda cfg: (object(), cfg))
    with pytest.raises(ConfigError, match="algo=mdlm: mode=sft_eval evaluates checkpoints of algo"):
        evaluate(runs[0], "refused")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_loss_raw": None}, r"two/metrics\.json: arm 'two': no val_loss_raw; allowed"),
        ({"tok_per_sec": "fast"}, r"two/metrics\.json: tok_per_sec='fast' in a table of arms"),
    ],
    ids=["missing", "text"],
)
def test_a_bad_file_is_named(tmp_path, change, message):
    for arm in ("one", "two"):
        names = ("primary_metric", "val_loss_raw", "val_loss_selected")
        found = {"arm": arm, **dict.fromkeys(names, 2.0)} | (change if arm == "two" else {})
        (tmp_path / arm).mkdir()
        (tmp_path / arm / "metrics.json").write_text(json.dumps(found))
    runs = f"mode.runs=[{tmp_path}/one,{tmp_path}/two]"
    with pytest.raises(DataError, match=message):
        sft_table.run(compose_config("mode=sft_table", runs, run_dir=tmp_path / "table"))
