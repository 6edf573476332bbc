"""Two ranks train the draft that one trains, whatever the objective normalises by."""

import torch

from callbacks.metrics_csv import read_metrics
from tests.draft_runs import answered_rows, fit
from tests.runs import last
from tests.test_two_ranks import DDP, launch

OBJECTIVES = ("kd", "survival_eal")
STEPS = ("trainer.max_steps=4", "trainer.val_check_interval=4")


def train_everything(rank, folder, out):
    for name in OBJECTIVES:
        fit(folder, out / f"{name}-two", f"objective={name}", *DDP, *STEPS)


def test_two_ranks_are_one(tmp_path):
    answered_rows(tmp_path)
    for name in OBJECTIVES:
        fit(tmp_path, tmp_path / f"{name}-one", f"objective={name}", *STEPS, "loader.batch_size=8")
    launch(train_everything, tmp_path, tmp_path)
    for name in OBJECTIVES:
        one, two = (tmp_path / f"{name}-{ranks}" for ranks in ("one", "two"))
        for key, value in last(one)["state_dict"].items():
            torch.testing.assert_close(
                last(two)["state_dict"][key], value, rtol=2e-4, atol=2e-5, msg=f"{name} {key}"
            )
        for mine, theirs in zip(
            *(read_metrics(folder / "metrics.csv") for folder in (one, two)), strict=True
        ):
            for key in mine:
                assert abs(mine[key] - theirs[key]) <= 1e-3 * max(1.0, abs(mine[key])), key
        if name == "survival_eal":
            shares = [last(folder)["weight_share"] for folder in (one, two)]
            assert abs(shares[0] - shares[1]) < 1e-5 and 0 < shares[0] < 1
