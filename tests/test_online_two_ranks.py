"""Two ranks learn from their own samples as one does: rollouts, rates, weights, resume, errors."""

import json

import pytest
import torch

from modes import train
from modes.audit import audit, check_rates, check_steps
from policy import ThoughtPolicy
from runtime.errors import NonFiniteError
from runtime.run import RunFolder
from tests.online_runs import configure, fit, interrupt, state, table
from tests.runs import last
from tests.support import equal
from tests.test_algorithm import gradient, largest_difference
from tests.test_two_ranks import launch

DDP = ("trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_steps=6",
       "trainer.val_check_interval=4", "trainer.log_every_n_steps=1",
       "trainer.enable_progress_bar=false")  # fmt: skip
# Eight rollouts on each of two ranks, in three pieces; one rank has six.
RUNS = {
    "paper": ("algo=rlmt_paper", "algo.rows_per_pass=3", "algo.samples_every=1"),
    "seed": ("algo=rlmt_seed", "algo.rows_per_pass=3", "algo.updates=2"),
}
INVALID = {"invalid": 5}
ONE_STEP = ("trainer.max_steps=1", "trainer.gradient_clip_val=null")
# What Adam makes of rounding grows with the rate.
CALM = ("optim.lr=2e-4",)
MEMORY = "available_mem_gib"


def train_everything(rank, folder, out):
    """All runs of this file on two ranks."""
    paper, seed = ((*RUNS[name], *DDP) for name in RUNS)
    fit(folder, out / "paper", *paper, *CALM, reward=INVALID)
    with_summary(rank, configure(folder, out / "seed", *seed, *CALM, reward=INVALID))
    fit(folder, out / "gradient", *paper, *ONE_STEP, reward=INVALID)
    interrupt(folder, out / "resumed", 4, *seed, *CALM, reward=INVALID)
    fit(folder, out / "resumed", *seed, *CALM, reward=INVALID)
    spoil(rank, folder, out)
    stop(rank, folder, out)


def with_summary(rank, cfg):
    """A run in a folder with all that main leaves there."""
    if rank:
        train.run(cfg)
        return
    kept = RunFolder(cfg)
    kept.open()
    kept.close(train.run(cfg))


def spoil(rank, folder, out):
    """Rank 1 meets a reward without bound in step 2; what both say goes to a file."""
    original, met = ThoughtPolicy.judged, {}

    def judged(self, prefixes, rollouts):
        rows = original(self, prefixes, rollouts)
        if rank == 1 and self.trainer.global_step == 2:
            rows[0]["reward"] = float("inf")
        met["model"], met["step"] = self, self.trainer.global_step
        met["before"] = [weight.detach().clone() for weight in self.trained_parameters()]
        return rows

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ThoughtPolicy, "judged", judged)
        with pytest.raises(NonFiniteError) as error:
            fit(folder, out / "bad", *RUNS["paper"], *DDP)
    untouched = all(map(torch.equal, met["model"].trained_parameters(), met["before"]))
    found = {"message": str(error.value), "untouched": untouched, "step": met["step"]}
    (out / f"bad{rank}.json").write_text(json.dumps(found))


def stop(rank, folder, out):
    """Rank 1 is short of memory: both end behind the step."""
    with pytest.MonkeyPatch.context() as patch:
        free = float(2**30 * (1 if rank else 9))
        patch.setattr("online.available_memory", lambda device: ("host", free))
        # Random bytes would have other alerts, which both ranks see.
        patch.setattr("online.alerts", lambda found, *_: ["short"] * (found[MEMORY] < 4))
        overrides = ("algo.enforce_stop_conditions=true",)
        found = fit(folder, out / "short", *RUNS["paper"], *DDP, *overrides)
    (out / f"short{rank}.json").write_text(json.dumps(found["steps"]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    for name, overrides in RUNS.items():
        fit(folder, folder / "one" / name, *overrides, *CALM, reward=INVALID)
    launch(train_everything, folder, folder / "two")
    return folder


def rates(run_dir):
    return [(row["step"], row["lr"]) for row in table(run_dir) if "lr" in row]


@pytest.mark.parametrize("name", RUNS)
def test_two_ranks_are_one(folder, name):
    one, two = (folder / ranks / name for ranks in ("one", "two"))
    weights = [list(last(run)["state_dict"].values()) for run in (one, two)]
    assert largest_difference(*weights) < 1e-6
    references = [last(run)["online"]["reference"]["weights"] for run in (one, two)]
    assert all(map(torch.equal, *references))
    assert largest_difference(weights[0][-1:], references[0][-1:]) > 1e-4, "weights have moved"
    assert len(table(one)) == len(table(two)) == 8
    for mine, theirs in zip(table(two), table(one), strict=True):
        assert mine == pytest.approx(theirs, rel=1e-5, abs=2e-6)
    assert any(0 < row.get("train/invalid_judge_rate", 0) < 1 for row in table(one))


def test_one_gradient(folder, tmp_path):
    fit(folder, tmp_path, *RUNS["paper"], *ONE_STEP, reward=INVALID)
    found, wanted = gradient(folder / "two" / "gradient"), gradient(tmp_path)
    assert max(float(part.abs().max()) for part in wanted) > 1e-2
    assert largest_difference(found, wanted) < 1e-6


def test_the_same_rollouts_of_every_prefix(folder):
    found = {}
    for ranks in ("one", "two"):
        files = sorted((folder / ranks / "paper" / "rollouts").iterdir())
        assert [path.name for path in files] == [f"step_{n:04d}_samples.jsonl" for n in range(6)]
        found[ranks] = [
            sorted(map(json.loads, path.read_text().splitlines()),
                   key=lambda row: (row["prefix_id"], row["k"])) for path in files
        ]  # fmt: skip
    assert found["one"] == found["two"]
    assert [len(rows) for rows in found["one"]] == [16] * 6
    assert len({row["thought"] for rows in found["one"] for row in rows}) > 48


@pytest.mark.parametrize("name", RUNS)
def test_rates_are_those_of_one_rank(folder, name):
    """One per step of the optimiser, whatever the ranks and the pieces of a step."""
    found = rates(folder / "two" / name)
    assert found == rates(folder / "one" / name) and [step for step, _ in found] == [*range(1, 7)]
    values = [rate for _, rate in found]
    assert values.index(max(values)) == 1 and max(values) == pytest.approx(2e-4)
    assert values[2:] == sorted(values[2:], reverse=True) and min(values) == values[-1]
    assert last(folder / "two" / name)["lr_schedulers"][0]["_last_lr"] == pytest.approx([0.0])
    assert check_rates(found).passed and check_steps([int(step) for step, _ in found], 1).passed


def test_the_audit_passes(folder):
    checks = audit(folder / "two" / "seed")
    assert len(checks) == 7 and all(check.passed for check in checks), checks


def test_stopped_and_resumed_is_the_unbroken_run(folder):
    straight, resumed = (folder / "two" / name for name in ("seed", "resumed"))
    assert len(state(straight)["random_states"]) == 2
    assert equal(state(resumed), state(straight)) and table(resumed) == table(straight)


def test_both_ranks_refuse_a_step_that_is_bad_on_one(folder):
    found = [json.loads((folder / "two" / f"bad{rank}.json").read_text()) for rank in (0, 1)]
    assert found[0] == found[1] and found[0]["step"] == 2 and found[0]["untouched"]
    assert found[0]["message"].startswith("non-finite loss at step 2, rows [")
    assert last(folder / "two" / "bad")["global_step"] == 2


def test_ranks_end_together(folder):
    """Also where only one of them sees why."""
    said = json.loads((folder / "two" / "short" / "metrics.json").read_text())
    assert [json.loads((folder / "two" / f"short{rank}.json").read_text()) for rank in (0, 1)] == [
        said["completed_steps"]] * 2  # fmt: skip
    assert said["completed_steps"] == 1
    assert said["stopped_reason"] == "short" and said["final"][MEMORY] == 1.0
