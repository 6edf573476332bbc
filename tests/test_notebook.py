"""The notebooks run from their own folder and from the root, and are what their .py twins say."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from tests import block_runs
from tests.draft_runs import fit
from tests.forks import Fork
from tests.runs import best
from tests.support import ROOT, compose_config, environment

jupytext = pytest.importorskip("jupytext")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = ROOT / "notebooks"
# What a notebook prints, and how many pictures it has.
EXPECTED = {
    "best_of_block": (("the truth, read as clean text", "within its reach", "the score alone"), 4),
    "look_inside": (("▢", "the original", "nats per token over"), 4),
    "one_thought": (("prefixes, mean reward", "training and sampling differ", "swapped"), 3),
    "speculative_block": (("REFUSED", "the target's own", "tau = "), 1),
}
TWINS = sorted(path.stem for path in NOTEBOOKS.glob("*.py"))
LARGEST_NOTEBOOK = 200_000  # bytes: outputs are not kept


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """What each notebook opens, trained for a few steps."""
    draft, scorer = tmp_path_factory.mktemp("draft"), tmp_path_factory.mktemp("scorer")
    fit(draft, draft / "run")
    block_runs.fit(scorer, scorer / "run", "nce", "bon.rounds=2")
    found = {
        "best_of_block": best(scorer / "run"),
        "look_inside": look_inside(tmp_path_factory),
        "one_thought": one_thought(tmp_path_factory),
        "speculative_block": best(draft / "run"),
    }
    assert sorted(found) == TWINS == sorted(EXPECTED)
    return found


def look_inside(tmp_path_factory):
    """Four steps of the default model, made small, on the data that the notebook shows."""
    from modes import train

    folder = tmp_path_factory.mktemp("notebook")
    cfg = compose_config(
        "trainer=cpu", "trainer.max_steps=4", "trainer.val_check_interval=4",
        "trainer.limit_val_batches=1", "trainer.enable_progress_bar=false",
        "+trainer.enable_model_summary=false", "model.length=32", "model.hidden_size=16",
        "model.n_blocks=1", "model.n_heads=2", "loader.global_batch_size=4",
        f"paths.cache_dir={folder / 'cache'}", run_dir=folder / "run",
    )  # fmt: skip
    train.run(cfg)
    return folder / "run" / "checkpoints" / "best.ckpt"


def one_thought(tmp_path_factory):
    """Twelve steps on sums with their working, in a model of a few thousand weights."""
    from modes import train

    folder = tmp_path_factory.mktemp("thought")
    rows = [
        {"id": f"{a}+{b}", "source_sha": f"{a}+{b}", "raw_text": f"{a} + {b} = {a + b}\n",
         "augmented_text": f"{a} + {b} = <think>{a} + {b} = {a + b}</think> {a + b}\n"}
        for a in range(10) for b in range(10)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cfg = compose_config(
        "algo=sft_thoughts", "model=tiny_thinker", "model.hidden_size=32", "model.length=64",
        "model.num_hidden_layers=2", "data=thoughts", f"data.files={folder}/rows.jsonl",
        "data.end_suffix=true", "loader.global_batch_size=4", "optim.lr=1e-2", "training.ema=0",
        "trainer=cpu", "trainer.max_steps=12", "trainer.val_check_interval=12",
        "trainer.limit_val_batches=1", "trainer.enable_progress_bar=false",
        "+trainer.enable_model_summary=false", f"paths.cache_dir={folder / 'cache'}",
        run_dir=folder / "run",
    )  # fmt: skip
    train.run(cfg)
    return best(folder / "run")


def run_script(path, folder):
    """As `python PATH` in a folder; counts the pictures that it shows."""
    import matplotlib.pyplot as plt

    def show():
        pictures.extend(plt.get_fignums())
        plt.close("all")

    pictures: list[int] = []
    plt.switch_backend("Agg")
    plt.show = show
    os.chdir(folder)
    sys.path[:] = [str(path.parent), *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
    GlobalHydra.instance().clear()
    runpy.run_path(str(path), run_name="__main__")
    print("pictures:", len(pictures))


@pytest.mark.parametrize("folder", [ROOT, NOTEBOOKS], ids=["root", "notebooks"])
@pytest.mark.parametrize("name", TWINS)
def test_script_runs(name, folder, checkpoints, tmp_path):
    done = Fork(
        lambda: run_script(NOTEBOOKS / f"{name}.py", folder), tmp_path / "said.txt",
        CHECKPOINT=str(checkpoints[name]),
    )  # fmt: skip
    assert done.wait() == 0, done.errors()
    texts, pictures = EXPECTED[name]
    assert all(text in done.output() for text in texts)
    assert done.output().splitlines()[-1] == f"pictures: {pictures}"


@pytest.mark.slow  # the script of every notebook, which has the same cells, runs by default
@pytest.mark.parametrize("name", TWINS)
def test_notebook_runs_from_its_folder(name, checkpoints, monkeypatch):
    monkeypatch.setenv("CHECKPOINT", str(checkpoints[name]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = jupytext.read(NOTEBOOKS / f"{name}.ipynb")
    client = nbclient.NotebookClient(
        notebook, timeout=120, kernel_name="python3", resources={"metadata": {"path": NOTEBOOKS}}
    )
    client.execute()
    images = [
        output
        for cell in notebook.cells
        for output in cell.get("outputs", [])
        if "image/png" in output.get("data", {})
    ]
    assert len(images) == EXPECTED[name][1]


def run_in_a_copy(name, tmp_path):
    """What the script of a notebook prints in a copy of the checkout, where it finds no outputs."""
    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name not in ("outputs", "notebooks"):
            (tmp_path / path.name).symlink_to(path)
    shutil.copytree(NOTEBOOKS, tmp_path / "notebooks")
    done = subprocess.run(
        [sys.executable, f"notebooks/{name}.py"],
        cwd=tmp_path,
        env=environment(MPLBACKEND="Agg", PALIMPSEST_CACHE=str(tmp_path / "cache")),
        capture_output=True,
        text=True,
        timeout=540,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_best_of_block_trains_a_chain_where_there_is_none(tmp_path):
    """Its scorer finds some truths."""
    said = run_in_a_copy("best_of_block", tmp_path)
    assert (tmp_path / "outputs/best_of_block/nce/checkpoints/best.ckpt").is_file()
    gains = [float(gain) for gain in re.findall(r" ([+-][0-9.]+) \[", said)]
    assert gains[0] == 0.0 and max(gains) > 0.0, "by alpha, the first of which is 0"


@pytest.mark.slow
def test_one_thought_trains_a_model_where_there_is_none(tmp_path):
    """It gets some sums right behind its own thoughts, and its gradient step prefers those."""
    said = run_in_a_copy("one_thought", tmp_path)
    assert (tmp_path / "outputs/one_thought/sft/checkpoints/last.ckpt").is_file()
    gap = float(re.search(r"differ by at most (\S+) nats", said)[1])
    moves = re.findall(r"^\w+ +[0-9.]+ +(-?[0-9.]+) +(-?[0-9.]+)$", said, re.MULTILINE)
    means = dict(re.findall(r"^(own|blank|swapped) +\d+ +\d+ +([0-9.]+) ", said, re.MULTILINE))
    assert gap < 1e-4 and len(moves) == len(means) == 3
    assert all(float(rewarded) > float(unrewarded) for rewarded, unrewarded in moves)
    assert float(means["own"]) > float(means["swapped"])


@pytest.mark.parametrize("name", TWINS)
def test_twins_agree(name):
    """`jupytext --sync notebooks/NAME.py` brings them together again."""
    script = jupytext.read(NOTEBOOKS / f"{name}.py")
    notebook = jupytext.read(NOTEBOOKS / f"{name}.ipynb")
    assert [(cell.cell_type, cell.source) for cell in script.cells] == [
        (cell.cell_type, cell.source) for cell in notebook.cells
    ]
    assert (NOTEBOOKS / f"{name}.ipynb").stat().st_size < LARGEST_NOTEBOOK
