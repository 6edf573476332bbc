"""What users get wrong ends in one line that names it, and in the right exit code."""

import gzip
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from runtime.checkpoint import read_checkpoint
from runtime.run import load_summary
from tests.runs import ALGORITHMS, best, call_main, fit, tiny, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("input")
    fit(folder, folder / "mdlm", "trainer.max_steps=2", "trainer.val_check_interval=2")
    return folder


@pytest.fixture
def says(folder, tmp_path, capfd):
    """Run main with a tiny run's overrides and more; the one line that it leaves on stderr."""

    def run(*overrides: str, code: int = 2, base: tuple[str, ...] | None = None) -> str:
        base = tiny(folder) if base is None else base
        capfd.readouterr()
        found = call_main([*base, f"paths.run_dir={tmp_path}/run", *overrides])
        lines = capfd.readouterr().err.strip().splitlines()
        assert len(lines) == 1, lines
        assert found == code
        return lines[0]

    return run


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["trainer.max_stepz=5"], ["trainer.max_stepz=5: no such key; did you mean max_steps?"]),
        (["optim.lr=fast"], ["optim.lr=fast: wrong value; allowed: a number in (0, inf)"]),
        (["model.length=16.5"], ["model.length=16.5", "an integer >= 1"]),
        (["algo=bd3lm", "block_size=5"],
         ["block_size=5: does not divide model.length=16; allowed: 1, 2, 4, 8, 16"]),
        (["model.n_heads=3"],
         ["model.n_heads=3: does not divide model.hidden_size=16; allowed: 1, 2, 4, 8, 16"]),
        (["trainer.max_steps=0"], ["trainer.max_steps=0: wrong value; allowed: an integer >= 1"]),
        (["trainer.precision=16-mixed"],
         ["trainer.precision=16-mixed: wrong value", "bf16-mixed", "not 16-*", "loss scaler"]),
        (["trainer.precision=16-true"], ["trainer.precision=16-true", "not 16-*"]),
        (["trainer.precision=bf16-true"], ["trainer.precision=bf16-true", "weights stay in fp32"]),
        (["trainer=fsdp"], ["training.ema=0.9: ", "sharded", "allowed: 0, or trainer=ddp"]),
        (["trainer.strategy=fsdp"], ["training.ema=0.9: "]),
        (["mode=paint"], ["mode=paint: no such option; allowed: acceptance_eval, ", "audit, a"]),
        (["algo=gpt"],
         ["algo=gpt: no such option; allowed: ar, bd3lm, dflash, draft_refine, ", "nce"]),
        (["mode=compare", "mode.runs=/absent"], ["mode.runs=/absent: no such folder"]),
        (["mode=compare", "mode.runs=[]"], ["mode.runs=[]: wrong value; allowed: a folder,"]),
        (["mode=ppl_eval"], ["eval.checkpoint_path=null: mode=ppl_eval needs a checkpoint"]),
        (["mode=ppl_eval", "eval.checkpoint_path=absent.ckpt"],
         ["eval.checkpoint_path=absent.ckpt: no such file"]),
        (["checkpointing.resume_from_ckpt=required"], ["checkpointing.resume_from_ckpt=required"]),
        (["data.files=absent.txt"], ["DataError: absent.txt: no such file"]),
        (["data.tokenizer_name_or_path=/absent"], ["tokenizer '/absent': neither bpe nor word"]),
        (["loader.global_batch_size=64"],
         ["the training data has 39 rows, loader.global_batch_size=64"]),
        (["model.length=2048"], ["model.length=2048"]),
        (["noise.eps=2.0"], ["ValueError: ", "noise.eps=2"]),
        (["model.hidden_size=12", "model.n_heads=4"], ["model.hidden_size=12: allowed multiples"]),
        (["optimized_metric=val/loss"], ["optimized_metric=val/loss: mode=train has no such metric",
                                         "val/nll"]),
    ],
)  # fmt: skip
def test_one_line_that_names_it(says, overrides, parts):
    if overrides == ["model.length=2048"]:
        overrides = [*overrides, "data.wrap=true"]
    line = says(*overrides)
    for part in parts:
        assert part in line


def test_jobs_of_a_sweep_do_not_share_a_folder(folder, tmp_path, capfd):
    code = call_main(["--multirun", *tiny(folder), "seed=1,2", f"paths.run_dir={tmp_path}/run",
                      f"hydra.sweep.dir={tmp_path}/sweep"])  # fmt: skip
    said = capfd.readouterr().err
    assert code == 2 and f"paths.run_dir={tmp_path}/run: the jobs of a sweep cannot share" in said
    assert "allowed: hydra.sweep.dir=FOLDER" in said and "Traceback" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu(says):
    line = says("trainer=gpu")
    assert "trainer.accelerator=gpu: no such device here; allowed: auto, cpu" in line


@pytest.mark.parametrize(
    ("name", "content", "part"),
    [
        ("empty.txt", b"", "empty.txt: the file is empty"),
        ("blank.txt", b"\n \n\n", "blank.txt"),
        ("latin.txt", b"one line\nna\xefve\n", "latin.txt: not UTF-8 at line 2, byte 11"),
        ("short.txt", b"one\ntwo\n", "the training data has 1 rows"),
        (
            "half.jsonl",
            b'{"text": "ab"}\n{"text": "a \\ud83d b"}\n',
            "half.jsonl:2: not a character at place 2 of the text",
        ),
        (
            "bad.txt.gz",
            gzip.compress(b"text", mtime=0)[:10] + b"\xff" * 40,
            "bad.txt.gz: cannot be read",
        ),
        ("corpus.pdf", b"%PDF", "corpus.pdf: unknown type; allowed are .txt, .md and .jsonl"),
    ],
)
def test_files_of_the_user(says, tmp_path, name, content, part):
    (tmp_path / name).write_bytes(content)
    assert part in says(f"data.files={tmp_path / name}")


def test_a_truncated_token_cache(says, tmp_path):
    write_corpus(tmp_path, seed=3)
    fit(tmp_path, tmp_path / "first", "trainer.max_steps=1", "callbacks=none", "logger=none")
    [cache] = (tmp_path / "cache" / "rows").glob("text-train-*.arrow")
    cache.write_bytes(cache.read_bytes()[:-100])
    line = says(base=tiny(tmp_path))
    assert f"DataError: {cache}: it is incomplete, damaged or foreign" in line
    assert "delete it and run again" in line


# Checkpoints that do not fit ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (ALGORITHMS["ar"], ["cannot resume: checkpoint of algo=mdlm, but this run has algo=ar"]),
        (["model.hidden_size=32"], ["cannot resume: misshapen backbone.", "in the checkpoint"]),
        (["model.n_blocks=3"], ["cannot resume: missing backbone.blocks.2"]),
        (["data.vocab_size=20"], ["cannot resume: its tokenizer"]),
        (["loader.global_batch_size=16"], ["loader.global_batch_size=8, this configuration has"]),
        (
            ["model.length=32"],
            ["cannot resume: model.length=32: the checkpoint was trained with 16"],
        ),
        (["optim.lr=1e-5"], ["cannot resume: optim.lr=1e-05: the checkpoint was trained with"]),
        (["seed=9"], ["cannot resume: seed=9: ", "checkpointing.resume_from_ckpt=false"]),
        (["training.ema=0.5"], ["cannot resume: training.ema=0.5: "]),
        (["noise=cosine"], ["cannot resume: noise._target_="]),
        (["data.insert_train_eos=false"], ["cannot resume: the checkpoint was trained on data"]),
    ],
)
def test_resuming_as_something_else(says, folder, overrides, parts):
    line = says(f"checkpointing.resume_ckpt_path={best(folder / 'mdlm')}", *overrides)
    for part in parts:
        assert part in line


def test_evaluating_as_something_else(says, folder, tmp_path):
    base = ("mode=ppl_eval", f"eval.checkpoint_path={best(folder / 'mdlm')}", "trainer=cpu",
            f"paths.cache_dir={folder}/cache")  # fmt: skip
    assert "its weights do not fit" in says("model.hidden_size=64", base=base)
    (tmp_path / "words.txt").write_text("\n".join(f"one {n} two" for n in range(30)))
    other = ("data=text", f"data.files={tmp_path / 'words.txt'}")
    line = says(*other, "data.tokenizer_name_or_path=word", base=base)
    assert "data.tokenizer_name_or_path=word: not the tokenizer that the checkpoint" in line


@pytest.mark.parametrize("size", [0, 0.5, 0.99])
def test_damaged_checkpoints(says, folder, tmp_path, size):
    whole = best(folder / "mdlm").read_bytes()
    path = tmp_path / "damaged.ckpt"
    path.write_bytes(whole[: int(size * len(whole))])
    assert f"CheckpointError: {path}: " in says(f"checkpointing.resume_ckpt_path={path}")


# A disk that is full -----------------------------------------------------------------------------


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """Inside, the system refuses to write more than `size` bytes to a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_no_room_for_a_checkpoint(says, tmp_path):
    with files_no_larger_than(100_000):
        line = says()
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert f"CheckpointError: {path}: cannot be written" in line
    assert "checkpointing.save_dir" in line
    assert load_summary(tmp_path / "run")["status"] == "failed"
    assert not list((tmp_path / "run" / "checkpoints").glob("*"))


def test_a_refused_save_leaves_the_checkpoint_before_it(folder, says, tmp_path):
    fit(folder, tmp_path / "run", "trainer.max_steps=2")
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    with files_no_larger_than(100_000):
        assert "cannot be written" in says()
    assert read_checkpoint(path)["global_step"] == 2
    assert sorted(file.name for file in path.parent.iterdir()) == ["best.ckpt", "last.ckpt"]


def test_no_room_for_the_token_cache(says, tmp_path):
    write_corpus(tmp_path, lines=2000, seed=4)
    with files_no_larger_than(8_000):
        line = says(base=tiny(tmp_path))
    assert "DataError: " in line and "cannot be written" in line and "paths.cache_dir" in line
    assert not list((tmp_path / "cache" / "rows").glob("*.arrow"))
