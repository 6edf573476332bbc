"""Two ranks learn from preferences what one learns, also where a rank has nothing to learn from."""

import pytest

from callbacks.metrics_csv import read_metrics
from tests.online_runs import UNLIKE
from tests.runs import last
from tests.test_algorithm import largest_difference
from tests.test_preference import fit
from tests.test_two_ranks import DDP, launch

# Two rewards of 0 or 1 are equal half of the time: such a prefix is skipped, and its rank is idle.
FEW = ("algo.samples=1", "loader.global_batch_size=2", "algo.rows_per_pass=2")
STEPS = ("trainer.max_steps=6", "trainer.val_check_interval=6", "optim.lr=1e-3")
LETTERS = "+reward._target_=tests.plugins.letters_reward.LettersReward"
ALGORITHMS = ("online_dpo", "rf_nll")


def run(folder, run_dir, name, *more):
    fit(folder, run_dir, LETTERS, *FEW, *more, *STEPS, name=name, judge=())


def train_both(rank, folder, out):
    for name in ALGORITHMS:
        run(folder, out / name, name, *DDP)


@pytest.mark.slow
def test_two_ranks_are_one(tmp_path):
    for name in ALGORITHMS:
        run(tmp_path, tmp_path / "one" / name, name)
    launch(train_both, tmp_path, tmp_path / "two")
    for name in ALGORITHMS:
        runs = [tmp_path / ranks / name for ranks in ("two", "one")]
        weights = [list(last(run_dir)["state_dict"].values()) for run_dir in runs]
        assert largest_difference(*weights) < 2e-6
        tables = [read_metrics(run_dir / "metrics.csv") for run_dir in runs]
        assert len(tables[0]) == len(tables[1]) >= 6
        for mine, theirs in zip(*tables, strict=True):
            assert mine.keys() == theirs.keys()
            known = mine.keys() - {*UNLIKE}
            assert {one: mine[one] for one in known} == pytest.approx(
                {one: theirs[one] for one in known}, rel=1e-5, abs=1e-6
            )
        kept = [row["train/kept_prefixes"] for row in tables[0] if "train/kept_prefixes" in row]
        assert name == "rf_nll" or 1 in kept
