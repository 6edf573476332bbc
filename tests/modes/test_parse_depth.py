"""mode=parse_depth: what it counts, that it survives a kill, and that training reads its depths."""

import json
import re
import shlex
import shutil
import time
from pathlib import Path

import pytest
from omegaconf import open_dict

from data.errors import DataError
from dataloader import LanguageData
from modes import ppl_eval
from modes.parse_depth import run, shard_of
from opening import evaluation_data
from runtime.errors import ConfigError
from runtime.run import load_summary
from tests.forks import fork_main, start_main
from tests.runs import best, fit, tiny, write_corpus
from tests.support import ROOT, compose_config

TOY = (
    "data/parse=stanza", "~data.parse.parser", "data.parse.num_processes=1",
    "+data.parse.parser._target_=tests.plugins.toy_parser.ToyParser",
    "data.parse.documents_per_part=10",
)  # fmt: skip


def files(folder):
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def on_text(folder, *overrides):
    if not (folder / "corpus.txt").is_file():
        write_corpus(folder)
    return (
        "mode=parse_depth", "data=text", f"data.files={folder}/corpus.txt", "data.vocab_size=280",
        "data.valid_fraction=0.2", f"paths.cache_dir={folder}/cache", "model.length=16",
        "trainer=cpu", *overrides,
    )  # fmt: skip


def test_parses_what_there_is_and_accounts_for_every_token(tmp_path, capsys):
    cfg = compose_config(*on_text(tmp_path), *TOY, run_dir=tmp_path)
    metrics = run(cfg)
    assert metrics["train/documents"] + metrics["validation/documents"] == 52
    for split in ("train", "validation"):
        found = {k.split("/", 1)[1]: v for k, v in metrics.items() if k.startswith(f"{split}/")}
        assert found["parsed"] == found["sentences"] == found["documents"]
        assert found["empty"] == found["failed"] == found["too_long"] == 0
        assert found["tokens"] == found["tokens_of_words"] + found["tokens_without_word"]
        assert found["accounted_for"] == 1.0 and found["words_per_s"] > 0
    shown = capsys.readouterr().out
    assert "text train: tokens" in shown and "words_without_token" in shown
    again = run(cfg)
    assert again["train/kept_parts"] == again["train/parts"]
    assert "train/words_per_s" not in again


@pytest.mark.parametrize("data", ["grammar", "conllu"])
def test_gold_trees_are_only_looked_at(tmp_path, data):
    (tmp_path / "a.conllu").write_text(
        "".join(f"1\tw{n}\t_\tX\t_\t_\t0\troot\t_\t_\n\n" for n in range(90))
    )
    sizes = ["data.source.num_train=50", "data.source.num_valid=9", "data.source.num_test=0"]
    more = (
        sizes if data == "grammar" else [f"data.files={tmp_path}/a.conllu", "data.vocab_size=300"]
    )
    cfg = compose_config(
        "mode=parse_depth", f"data={data}", *more, f"paths.cache_dir={tmp_path}/cache",
        "model.length=16", "model.n_heads=2", run_dir=tmp_path,
    )  # fmt: skip
    metrics = run(cfg)
    assert metrics["train/accounted_for"] == metrics["validation/accounted_for"] == 1.0
    assert metrics["train/tokens_of_words"] > 50 and metrics["train/words_without_token"] == 0
    total = metrics["train/documents"] + metrics["validation/documents"]
    assert total == (59 if data == "grammar" else 90) and "train/parsed" not in metrics


def test_data_without_trees_is_refused(tmp_path):
    cfg = compose_config(*on_text(tmp_path), run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"data\.parse=null: data=text has no trees in train; al"):
        run(cfg)


def test_splits_that_do_not_exist_are_refused(tmp_path):
    cfg = compose_config(*on_text(tmp_path, "mode.splits=[test]"), *TOY, run_dir=tmp_path)
    with pytest.raises(ConfigError, match=r"mode\.splits=\['test'\]: none of them is in data=text"):
        run(cfg)


@pytest.mark.parametrize(
    ("overrides", "variables", "expected"),
    [
        ((), {}, (0, 1)),
        (("mode.shard=2", "mode.num_shards=3"), {"ID": "7", "COUNT": "9"}, (2, 3)),
        ((), {"ID": "3", "MIN": "0", "MAX": "7", "STEP": "1", "COUNT": "8"}, (3, 8)),
        ((), {"ID": "5", "MIN": "1", "MAX": "7", "STEP": "2", "COUNT": "4"}, (2, 4)),
        # The last place that the user named need not be that of a task: --array=0-9:2.
        ((), {"ID": "8", "MIN": "0", "MAX": "9", "STEP": "2", "COUNT": "5"}, (4, 5)),
    ],
)
def test_shards_are_named_or_those_of_slurm(monkeypatch, overrides, variables, expected):
    in_array(monkeypatch, variables)
    assert shard_of(compose_config("mode=parse_depth", *overrides)) == expected


def in_array(monkeypatch, variables):
    for name in ("ID", "MIN", "MAX", "STEP", "COUNT"):
        monkeypatch.delenv(f"SLURM_ARRAY_TASK_{name}", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", value)


@pytest.mark.parametrize(
    "variables",
    [
        # --array=1,2,9: task by task.
        {"ID": "1", "MIN": "1", "MAX": "9", "STEP": "1", "COUNT": "3"},
        {"ID": "2", "MIN": "1", "MAX": "9", "STEP": "1", "COUNT": "3"},
        {"ID": "9", "MIN": "1", "MAX": "9", "STEP": "1", "COUNT": "3"},
        {"ID": "2", "MIN": "1", "MAX": "9", "COUNT": "3"},
        {"ID": "2", "MIN": "1", "MAX": "9", "STEP": "0", "COUNT": "9"},
    ],
)
def test_an_uneven_array_is_refused(monkeypatch, variables):
    in_array(monkeypatch, variables)
    message = r"SLURM_ARRAY_TASK_ID=\d, .*_MAX=9, .*_COUNT=\d: the tasks .* allowed: .*mode\.shard"
    with pytest.raises(ConfigError, match=message):
        shard_of(compose_config("mode=parse_depth"))


def test_the_array_of_a_sweep_is_no_array_of_shards(tmp_path, call):
    variables = {"ID": "1", "MIN": "0", "MAX": "1", "STEP": "1", "COUNT": "2"}
    arguments = [text for text in toy_run(tmp_path, tmp_path / "c") if "run_dir" not in text]
    done = call(
        "--multirun", *arguments, "data.valid_fraction=0.2,0.3", f"hydra.sweep.dir={tmp_path}/s",
        **{f"SLURM_ARRAY_TASK_{name}": value for name, value in variables.items()},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for job in ("0", "1"):
        metrics = load_summary(tmp_path / "s" / job)["metrics"]
        assert metrics["train/documents"] > 30 and metrics["train/accounted_for"] == 1.0


@pytest.mark.parametrize("given", [("mode.shard=1",), ("mode.shard=2", "mode.num_shards=2")])
def test_half_a_shard_is_refused(given):
    with pytest.raises(ConfigError, match=r"mode\.shard=\d, mode\.num_shards=.*: give both; allow"):
        shard_of(compose_config("mode=parse_depth", *given))


def test_shards_close_the_split_together(tmp_path, capsys):
    def shard(number):
        which = (f"mode.shard={number}", "mode.num_shards=2", "mode.splits=[train]")
        return run(compose_config(*on_text(tmp_path, *which), *TOY, run_dir=tmp_path))

    first = shard(0)
    assert "train/tokens" not in first
    assert "train: not complete before the other shards are done" in capsys.readouterr().out
    second = shard(1)
    assert second["train/accounted_for"] == 1.0
    assert first["train/parts"] + second["train/parts"] == 4
    assert first["train/documents"] + second["train/documents"] > 30


def test_what_was_parsed_is_noted_once_all_splits_are_there(tmp_path):
    def shard(number):
        which = (f"mode.shard={number}", "mode.num_shards=2", "data.valid_fraction=0.05")
        return run(compose_config(*on_text(tmp_path, *which), *TOY, run_dir=tmp_path))

    # Validation is a single part, and complete with the first shard; train is not.
    first = shard(0)
    assert "validation/tokens" in first and "train/tokens" not in first
    assert not (tmp_path / "provenance.json").exists()
    assert "train/tokens" in shard(1) and (tmp_path / "provenance.json").is_file()


def test_the_order_of_splits_does_not_matter_for_what_is_noted(tmp_path):
    for folder, splits in (("a", "[train,validation]"), ("b", "[validation,train]")):
        (tmp_path / folder).mkdir()
        which = (f"mode.splits={splits}", f"paths.cache_dir={tmp_path}/cache-{folder}")
        run(compose_config(*on_text(tmp_path, *which), *TOY, run_dir=tmp_path / folder))
    noted = [json.loads((tmp_path / f / "provenance.json").read_text()) for f in ("a", "b")]
    assert noted[0]["data_fingerprint"] == noted[1]["data_fingerprint"]


def toy_run(folder, cache, *overrides):
    plugins = str(ROOT / "tests" / "plugins" / "configs")
    arguments = on_text(folder, f"paths.cache_dir={cache}", f"paths.run_dir={folder}/run")
    sizes = ("data/parse=toy", "data.parse.documents_per_part=4", "mode.splits=[train]")
    return ("--config-dir", plugins, *arguments, *sizes, *overrides)


@pytest.mark.parametrize("processes", [1, 2])
def test_killed_and_restarted_is_identical(tmp_path, call, processes):
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    done = call(*toy_run(tmp_path, unbroken))
    assert done.returncode == 0, done.stderr
    # The pause lets the kill fall between parts.
    slow = ("data.parse.pause=0.3", f"data.parse.num_processes={processes}")
    process = start_main(*toy_run(tmp_path, broken, *slow), said=tmp_path / "said.txt")
    deadline = time.monotonic() + 90
    while len(list(broken.rglob("part-*.arrow"))) < 3:
        assert process.is_alive() and time.monotonic() < deadline, process.errors()
        time.sleep(0.01)
    process.kill()
    process.wait()
    kept = len(list(broken.rglob("part-*.arrow")))
    assert 3 <= kept < 10 and not list(broken.rglob("index.json"))
    again = toy_run(tmp_path, broken, f"data.parse.num_processes={processes}")
    done = fork_main(*again, said=tmp_path / "said.txt")
    assert done.returncode == 0, done.stderr
    metrics = load_summary(tmp_path / "run")["metrics"]
    assert metrics["train/kept_parts"] >= kept and metrics["train/parts"] == 10
    assert files(broken / "parses") == files(unbroken / "parses")


def test_a_missing_parse_says_what_to_run(tmp_path, call):
    arguments = [text for text in toy_run(tmp_path, tmp_path / "c") if not text.startswith("mode")]
    done = call(*arguments)
    assert done.returncode == 2
    (line,) = (text for text in done.stderr.splitlines() if text.startswith("DataError"))
    assert "the parse of train of 'text' is missing" in line
    assert re.search(
        r"run: python main\.py --config-dir \S+ mode=parse_depth data=text data\.f", line
    )
    assert "data/parse=toy data.parse.documents_per_part=4" in line and "trainer" not in line


def test_the_command_for_the_data_of_a_checkpoint_runs(tmp_path, call):
    plugins = ("--config-dir", str(ROOT / "tests" / "plugins" / "configs"))
    spaced = tmp_path / "my data"
    spaced.mkdir()
    write_corpus(spaced)
    there, here = tmp_path / "there", tmp_path / "here"
    overrides = (
        f"hydra.searchpath=[file://{plugins[1]}]", f"data.files='{spaced}/corpus.txt'",
        "data/parse=toy", "data.parse.documents_per_part=7", f"paths.cache_dir={there}",
    )  # fmt: skip
    run(compose_config(*tiny(tmp_path), *overrides, "mode=parse_depth", run_dir=tmp_path))
    fit(tmp_path, tmp_path / "run", *overrides)
    shutil.rmtree(there)
    done = call(
        *plugins, "mode=depth_eval", f"eval.checkpoint_path={best(tmp_path / 'run')}",
        "trainer=cpu", f"paths.cache_dir={here}", f"paths.run_dir={tmp_path}/eval",
    )  # fmt: skip
    assert done.returncode == 2
    (line,) = (text for text in done.stderr.splitlines() if text.startswith("DataError"))
    folder, text = re.search(r"is missing \((.*)\); run: python main\.py (.*)$", line).groups()
    assert Path(folder).is_relative_to(here / "parses") and not Path(folder).exists()
    done = call(*shlex.split(text), f"paths.run_dir={tmp_path}/parse")
    assert done.returncode == 0, done.stderr
    # The very folder that the evaluation looked into.
    assert (Path(folder) / "index.json").is_file()


def test_training_reads_the_depths_and_evaluation_needs_none(tmp_path):
    write_corpus(tmp_path)
    with pytest.raises(DataError, match="the parse of train of 'text' is missing"):
        fit(tmp_path, tmp_path / "run", *TOY)
    run(compose_config(*on_text(tmp_path), *TOY, run_dir=tmp_path))
    cfg = compose_config(*on_text(tmp_path), *TOY)
    data, plain = LanguageData(cfg), LanguageData(compose_config(*on_text(tmp_path)))
    assert data.fingerprint != plain.fingerprint
    assert data.tokenizer.get_vocab() == plain.tokenizer.get_vocab()
    batch = next(iter(data.train_loader(max_steps=1)))
    assert {"depth", "height"} <= set(batch) and batch["depth"].max() > 0
    assert "depth" not in next(iter(plain.train_loader(max_steps=1)))
    fit(tmp_path, tmp_path / "run", *TOY)
    shutil.rmtree(tmp_path / "cache")
    evaluate = compose_config(
        "mode=ppl_eval", f"eval.checkpoint_path={best(tmp_path / 'run')}", "eval.num_draws=1",
        f"paths.cache_dir={tmp_path}/cache", "trainer=cpu", run_dir=tmp_path / "eval",
    )  # fmt: skip
    (tmp_path / "eval").mkdir()
    assert ppl_eval.run(evaluate)["nll"] > 0


def test_a_configuration_from_before_parsing_still_works(tmp_path):
    cfg = compose_config(*on_text(tmp_path))
    with open_dict(cfg):
        del cfg.data.parse
    data = evaluation_data(cfg, LanguageData(cfg).tokenizer, named=False)
    assert data.parse_store is None and data.source is data.plain_source
    assert len(data.rows("train"))


def test_an_evaluation_reads_the_rows_of_the_training_where_its_splits_are_parsed(tmp_path):
    """One token cache for both; without the parse of the split, text is packed without depths."""
    cfg = compose_config(*on_text(tmp_path), *TOY, run_dir=tmp_path)
    run(cfg)
    trained = LanguageData(cfg)
    again = evaluation_data(cfg, trained.tokenizer, named=False)
    assert again.rows("train").path == trained.rows("train").path
    assert "depth" in again.rows("validation").names
    trained.parse_store.index_path("validation").unlink()
    without = evaluation_data(cfg, trained.tokenizer, named=False)
    assert without.rows("validation").names == ("input_ids",)
