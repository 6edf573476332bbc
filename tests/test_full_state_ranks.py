"""Full states of two ranks: two go on exactly, another number with new dropout, and says so."""

import logging
from pathlib import Path

import pytest
import torch

from callbacks.metrics_csv import read_metrics
from runtime.checkpoint import read_checkpoint
from runtime.full_state import check_whole, full_states, step_of
from tests.runs import ALGORITHMS, fit, state
from tests.support import equal
from tests.test_two_ranks import DDP, launch

# Dropout, two micro-batches per rank and step, states after 3, 6 and 8 of 8 steps.
STATES = (*ALGORITHMS["mdlm"], "checkpointing.full_state_every_n_steps=3")
TWO = (*STATES, *DDP, "loader.batch_size=2")
NO_DROPOUT = ("model.dropout=0.0",)


def states(run_dir: Path) -> list[Path]:
    return full_states(run_dir / "checkpoints")


def resumed(folder: Path, run_dir: Path, start: Path, *overrides: str) -> None:
    fit(folder, run_dir, *overrides, f"checkpointing.resume_ckpt_path={states(start)[0]}")


def on_two_ranks(rank: int, folder: Path, out: Path) -> None:
    fit(folder, out / "two", *TWO)
    resumed(folder, out / "two-two", out / "two", *TWO)
    if rank == 0:
        handler = logging.FileHandler(out / "warnings.txt", delay=True)
        logging.getLogger("callbacks.exact_resume").addHandler(handler)
    resumed(folder, out / "one-two", out / "one", *TWO, *NO_DROPOUT)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    fit(folder, folder / "one", *STATES, *NO_DROPOUT)
    launch(on_two_ranks, folder, folder)
    return folder


def test_two_ranks_write_one_folder_and_go_on_exactly(out):
    assert [step_of(path) for path in states(out / "two")] == [3, 6, 8]
    for path in states(out / "two"):
        assert check_whole(path)["world_size"] == 2
        assert (path / "rng_rank1.pt").is_file() and not (path / "rng_rank2.pt").exists()
    first, second = read_checkpoint(states(out / "two")[0])["random_states"]
    assert not torch.equal(first["torch"], second["torch"])
    assert equal(state(out / "two-two"), state(out / "two"))
    rows, all_rows = (read_metrics(out / n / "metrics.csv") for n in ("two-two", "two"))
    assert rows == [row for row in all_rows if row["step"] > 3]


def test_one_rank_goes_on_from_two_with_new_dropout_and_says_so(out, caplog):
    with caplog.at_level(logging.WARNING):
        resumed(out, out / "two-one", out / "two", *STATES)
    assert "resumed on 1 ranks what 2 ranks saved: dropout draws new" in caplog.text
    found = state(out / "two-one")
    assert found["global_step"] == 8 and len(found["random_states"]) == 1
    assert not equal(found["state_dict"], state(out / "two")["state_dict"])


def test_two_ranks_go_on_from_one(out):
    """Without dropout they end where the unbroken run does, up to the order of a sum."""
    assert "resumed on 2 ranks what 1 ranks saved" in (out / "warnings.txt").read_text()
    found, expected = state(out / "one-two"), state(out / "one")
    assert len(found["random_states"]) == 2
    for key, value in expected["state_dict"].items():
        torch.testing.assert_close(found["state_dict"][key], value, rtol=0, atol=2e-5, msg=key)
