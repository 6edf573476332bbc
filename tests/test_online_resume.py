"""Runs that learn from their own samples go on where they were left, and are opened again."""

import shutil

import pytest
import torch

from callbacks.metrics_csv import read_metrics
from checkpointing import load_full_state
from decoding.generate import GenerationRequest, GenerationSettings
from decoding.rollout_record import RolloutSettings
from modes.audit import check_rates, check_steps
from objectives import schedules
from online import OnlineAlgorithm
from policy import ThoughtPolicy
from runtime.full_state import full_states, step_of
from tests.online_runs import fit, interrupt, report, state, table
from tests.runs import last
from tests.support import equal

# Stops behind step 4: a validation is just done, and the second batch of two updates.
RUNS = {
    "frozen": ("algo=rlmt_paper", "checkpointing.full_state_every_n_steps=2"),
    "periodic": (
        "algo=rlmt_seed", "algo.updates=2", "algo.reference={kind:periodic,every:3,decay:0.9}",
    ),
    "ema": ("algo=rlmt_paper", "algo.reference={kind:ema,every:1,decay:0.5}", "training.ema=0.9",
            "algo.top_p=0.9"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With runs of six steps that nothing interrupted."""
    folder = tmp_path_factory.mktemp("online")
    for name, overrides in RUNS.items():
        fit(folder, folder / name, *overrides)
    return folder


@pytest.mark.parametrize("name", RUNS)
def test_stopped_and_resumed_is_the_unbroken_run(folder, tmp_path, name):
    interrupt(folder, tmp_path, 4, *RUNS[name])
    assert last(tmp_path)["global_step"] == 4
    assert report(tmp_path)["stopped_reason"] == "stopped by SIGTERM"
    assert [row["step"] for row in report(tmp_path)["history"]] == [1, 2, 3, 4]
    fit(folder, tmp_path, *RUNS[name])
    assert equal(state(tmp_path), state(folder / name))
    assert table(tmp_path) == table(folder / name) and len(table(tmp_path)) == 8
    assert report(tmp_path) == report(folder / name)


def test_what_a_checkpoint_keeps_of_the_reference(folder):
    """Weights that differ from the policy's, in the way of their kind."""
    kept = {name: state(folder / name) for name in RUNS}
    for name in RUNS:
        online, policy = kept[name]["online"], kept[name]["state_dict"]
        assert online["reference"]["steps"] == 6
        assert (
            online["numbers"]["baseline_tokens"] > 0
            and "previous/all_one_group_rate" in (online["numbers"])
        )
        same = all(map(torch.equal, online["reference"]["weights"], policy.values()))
        assert same == (name == "periodic"), "taken over at step 6, or never"


def test_from_a_full_state_in_a_folder_of_its_own(folder, tmp_path):
    states = full_states(folder / "frozen" / "checkpoints")
    assert [step_of(path) for path in states] == [2, 4, 6]
    found = load_full_state(states[1])
    assert isinstance(found.model, ThoughtPolicy) and found.step == 4
    elsewhere = shutil.copytree(states[1], tmp_path / "four")
    resumed = f"checkpointing.resume_ckpt_path={elsewhere}"
    fit(folder, tmp_path / "run", *RUNS["frozen"], resumed)
    assert equal(state(tmp_path / "run"), state(folder / "frozen"))
    rows = [row for row in table(folder / "frozen") if row["step"] > 4]
    assert table(tmp_path / "run") == rows


def test_a_finished_run_does_nothing(folder, tmp_path):
    run = shutil.copytree(folder / "ema", tmp_path / "again")
    files = ("metrics.csv", "metrics.json", "checkpoints/last.ckpt")
    before = [(run / name).read_bytes() for name in files]
    found = fit(folder, run, *RUNS["ema"])
    assert found["steps"] == 6 and "tokens_per_s" not in found and "val/nll" in found
    assert [(run / name).read_bytes() for name in files] == before


@pytest.mark.parametrize("name", RUNS)
def test_rates_follow_the_steps_of_the_optimiser(folder, name):
    """Whatever the number of updates; by hand: two steps up, then half a cosine."""
    rows = read_metrics(folder / name / "metrics.csv")
    rates = [(row["step"], row["lr"]) for row in rows if "lr" in row]
    wanted = [0.5e-2, 1e-2, 1e-2, 0.853553e-2, 0.5e-2, 0.146447e-2]
    assert [rate for _, rate in rates] == pytest.approx(wanted, rel=1e-5)
    assert check_rates(rates).passed and check_steps([int(step) for step, _ in rates], 1).passed
    kept = last(folder / name)
    assert kept["lr_schedulers"][0]["last_epoch"] == 6
    assert kept["lr_schedulers"][0]["_last_lr"] == pytest.approx([0.0], abs=1e-12)


@pytest.mark.parametrize("times", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_the_checker_finds_a_schedule_that_steps_too_often(folder, tmp_path, monkeypatch, times):
    """Once per rank or per piece, on a schedule that rises again: the mistake of others."""
    original = OnlineAlgorithm._update

    def stepped_too_often(self, experience):
        original(self, experience)
        for _ in range(times - 1):
            self.lr_schedulers().step()

    monkeypatch.setattr(OnlineAlgorithm, "_update", stepped_too_often)
    monkeypatch.setattr(schedules, "_progress", lambda step, total, _: step / total)
    fit(folder, tmp_path, "trainer.max_steps=4", "lr_scheduler.warmup_steps=0")
    rates = [(row["step"], row["lr"]) for row in table(tmp_path) if "lr" in row]
    assert not check_rates(rates).passed


def test_opens_with_nothing_else(folder):
    """A model that is opened answers, samples thoughts, and asks for no judge."""
    path = folder / "ema" / "checkpoints" / "last.ckpt"
    raw = ThoughtPolicy.load_from_checkpoint(path, weights="raw")
    kept = last(folder / "ema")
    assert equal(dict(raw.state_dict()), kept["state_dict"])
    model = ThoughtPolicy.load_from_checkpoint(path)
    assert all(map(torch.equal, model.trained_parameters(), kept["ema"]["shadow_params"]))
    assert model.reference is None and model._reward is None
    assert model._reference_state is None, "as large as the model, and nobody asks for it"
    settings = RolloutSettings(model.delimiter("open"), model.delimiter("close"),
                               (model.special.eos,), 5, 4)  # fmt: skip
    prompt = [*model.tokenizer.encode("Question: 1 + 2 =\nAnswer:"), model.delimiter("open")]
    first, second = model.rollouts(settings).sample([("a", prompt)], 2)
    assert first.sampled_ids != second.sampled_ids and len(first.suffix_ids) <= 4
    settings = GenerationSettings(max_new_tokens=4, temperature=0.0)
    request = GenerationRequest("b", prompt_ids=prompt)
    answer = next(model.generator(settings, device="cpu").generate([request]))
    assert answer.error is None and 1 <= len(answer.token_ids) <= 4
