"""Two ranks train what one trains: gradients, weights and metrics of the runs that write blocks."""

import pytest

from callbacks.metrics_csv import read_metrics
from tests.block_runs import fit
from tests.runs import last
from tests.test_algorithm import gradient, largest_difference
from tests.test_two_ranks import DDP, launch

START = "draft_refine"
RUNS = {
    "draft_refine": ("draft_refine", "refine.commit.threshold=0.2"),
    "nce": ("nce", "bon/proposal=softmax_sampling", "bon.score_agg=perround", "bon.rounds=2"),
    "select_each": ("nce", "bon.score_agg=select_each", "refine.commit.threshold=0.3"),
}
STEPS = ("trainer.max_steps=2", "trainer.val_check_interval=2", "trainer.gradient_clip_val=null")
KINDS = {
    # Passes of the first steps: 1 and more, with the same number on both ranks.
    "gradient": (*STEPS, "trainer.max_steps=1", "trainer.val_check_interval=1"),
    "steps": (*STEPS, "trainer.max_steps=4", "optim.lr=1e-3"),
}


def run(folder, out, name, kind, *overrides):
    start = f"training.from_pretrained={folder}/start/checkpoints/last.ckpt"
    fit(folder, out / f"{name}-{kind}", *RUNS[name], start, *overrides, *KINDS[kind])


def train_everything(rank, folder, out):
    for name in RUNS:
        for kind in KINDS:
            run(folder, out, name, kind, *DDP, "loader.batch_size=4")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    fit(folder, folder / "start", START, "trainer.max_steps=4")
    launch(train_everything, folder, folder / "two")
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(folder, name):
    for kind in KINDS:
        run(folder, folder / "one", name, kind, "loader.batch_size=8")
    one, two = ([folder / out / f"{name}-{kind}" for kind in KINDS] for out in ("one", "two"))
    found, wanted = gradient(two[0]), gradient(one[0])
    scale = max(float(part.abs().max()) for part in wanted)
    assert scale > 1e-3 and largest_difference(found, wanted) < 1e-6 * max(1.0, scale)
    weights = [list(last(run_dir)["state_dict"].values()) for run_dir in (two[1], one[1])]
    assert largest_difference(*weights) < 2e-6
    tables = [read_metrics(run_dir / "metrics.csv") for run_dir in (two[1], one[1])]
    assert len(tables[0]) == len(tables[1]) > 2
    for mine, theirs in zip(*tables, strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    assert name == "draft_refine" or any("train/score_peak" in row for row in tables[0])
