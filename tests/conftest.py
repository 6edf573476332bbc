"""One thread per test process, and models that several test files use.

Sums are added up in an order that depends on the number of threads, so only runs with the same
number can be equal to the bit; a forked process would otherwise have another number than its
parent.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"

import functools
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import omegaconf
import pytest
from filelock import FileLock
from hypothesis import settings
from omegaconf.grammar_parser import parse

# To wait for the disk proves nothing here: what is written outlives a killed process, and no test
# cuts the power. Tests of what is written through, and when, put their own in its place.
os.fsync = lambda descriptor: None
# The same few interpolations are parsed over and over.
omegaconf.base.parse = omegaconf._utils.parse = functools.lru_cache(maxsize=10_000)(parse)
# How long an example takes says more about the machine than about the code.
settings.register_profile("palimpsest", deadline=None)
settings.load_profile("palimpsest")

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def call(capfd) -> Callable[..., subprocess.CompletedProcess]:
    """`run_main` without a process: main.py starts anew inside this one, seconds of imports less.

    What only a process of its own can show (signals, kills, imports) needs `run_main`.
    """
    from tests.runs import call_main

    def run(*arguments: str, **variables: str) -> subprocess.CompletedProcess:
        capfd.readouterr()
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(ROOT)
            for name, value in variables.items():
                patch.setenv(name, value)
            code = call_main(arguments)
        said = capfd.readouterr()
        return subprocess.CompletedProcess(arguments, code, said.out, said.err)

    return run


@pytest.fixture(scope="session")
def stanza_models(tmp_path_factory, worker_id) -> Path:
    """A folder with a miniature Stanza tokenizer, tagger and parser of the grammar's sentences.

    Trained by Stanza's own code, once for all test processes: some ten seconds of one core.
    """
    pytest.importorskip("stanza", reason="needs the package stanza")
    from tests.forks import Fork

    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "stanza_models"
    sizes = ["--sentences=600", "--held-out=0.1", "--width=48", "--steps=45", "--rate=0.015",
             "--dropout=0.1"]  # fmt: skip

    def train() -> None:
        sys.argv = ["train_stanza.py", "grammar", "--out", str(folder), *sizes]
        runpy.run_path(str(ROOT / "scripts" / "train_stanza.py"), run_name="__main__")

    with FileLock(f"{folder}.lock"):
        if not (folder / "resources.json").is_file():
            done = Fork(train, base / "stanza.txt")
            assert done.wait() == 0, done.errors()
    return folder
