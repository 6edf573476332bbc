"""Twenty steps of every algorithm, loss for loss as they were when the file was written.

A change here is a change of the training itself and has to be meant. Then renew the files:

    OMP_NUM_THREADS=1 python -m tests.test_golden
"""

import json
import tempfile
from pathlib import Path

import pytest
import torch

from callbacks.metrics_csv import read_metrics
from tests.runs import ALGORITHMS, fit

GOLDEN = Path(__file__).parent / "golden"
OVERRIDES = ("trainer.max_steps=20", "trainer.val_check_interval=20", "optim.lr=3e-3")


def trajectory(folder: Path, name: str) -> dict:
    """The losses of a run in fp32 on one thread, and the environment they were computed in."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        fit(folder, folder / name, *ALGORITHMS[name], *OVERRIDES)
    finally:
        torch.set_num_threads(threads)
    rows = read_metrics(folder / name / "metrics.csv")
    return {
        "environment": {
            "torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability(),
        },
        "train/loss": [row["train/loss"] for row in rows if "train/loss" in row],
        "val/nll": [row["val/nll"] for row in rows if "val/nll" in row],
    }  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_trajectory(tmp_path, name):
    """Equal to 1e-4; on a failure, compare the environments in the message first."""
    golden = json.loads((GOLDEN / f"{name}.json").read_text())
    found = trajectory(tmp_path, name)
    where = f"written in {golden['environment']}, found in {found['environment']}"
    assert len(golden["train/loss"]) == 20 and len(golden["val/nll"]) == 1
    for metric in ("train/loss", "val/nll"):
        assert found[metric] == pytest.approx(golden[metric], rel=1e-4), where


def renew() -> None:
    """Write the files anew."""
    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for name in ALGORITHMS:
            text = json.dumps(trajectory(Path(folder), name), indent=1)
            (GOLDEN / f"{name}.json").write_text(text + "\n")


if __name__ == "__main__":
    renew()
