"""The clip search inside runs: what it sets, logs, stores, and how it resumes."""

import os
import signal

import pytest
import torch

from callbacks import clip_search
from callbacks.clip_search import ClipSearch
from callbacks.metrics_csv import read_metrics
from diffusion import MDLM, BlockLosses, Diffusion
from objectives.corruption import FULL_INTERVAL, MaskingProcess
from objectives.noise import LogLinear
from runtime.errors import ConfigError
from tests.runs import WEIGHTED, best, fit, last, state
from tests.support import equal
from tests.test_training import in_child, start_child, table

SEARCH = ("algo=bd3lm", "block_size=4", "algo.clip_search_widths=[0.5,0.75]",
          "algo.clip_search_delta=0.25")  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def searched(folder):
    fit(folder, folder / "searched", *SEARCH)
    return folder / "searched"


def searches(run_dir):
    return [row for row in read_metrics(run_dir / "metrics.csv") if "clip/low" in row]


def test_every_validation_sets_the_interval_of_least_variance(searched):
    rows = searches(searched)
    assert [row["step"] for row in rows] == [4, 8]
    for row in rows:
        found = {k.removeprefix("clip/var "): v for k, v in row.items() if k.startswith("clip/var")}
        names = ["0.001-1", "0.001-0.5", "0.25-0.75", "0.5-1", "0.001-0.75", "0.25-1"]
        assert list(found) == names
        assert min(found, key=found.get) == f"{row['clip/low']:g}-{row['clip/high']:g}"
    assert last(searched)["sampling_interval"] == [rows[-1]["clip/low"], rows[-1]["clip/high"]]
    assert last(searched)["sampling_interval"] != list(FULL_INTERVAL)
    assert (searched / "clip_search.png").stat().st_size > 1000


def test_the_next_steps_train_on_the_chosen_interval(folder, tmp_path, monkeypatch):
    seen, original = [], MDLM.corrupt

    def corrupt(self, batch, step):
        noise = self.process.draw(self.maskable_places(batch), batch["position"], (step,))
        seen.append((step, self.process.interval, noise.time_BK.min(), noise.time_BK.max()))
        return original(self, batch, step)

    monkeypatch.setattr(MDLM, "corrupt", corrupt)
    fit(folder, tmp_path, *SEARCH)
    chosen = tuple(searches(tmp_path)[0][f"clip/{end}"] for end in ("low", "high"))
    for step, interval, least, most in seen:
        assert interval == (FULL_INTERVAL if step < 4 else chosen)
        assert interval[0] <= least and most <= interval[1]


def test_a_checkpoint_remembers_the_interval(searched):
    model = Diffusion.load_from_checkpoint(best(searched))
    assert list(model.process.interval) == last(searched)["sampling_interval"]


def test_fixed_clipping_only_measures(folder, tmp_path):
    fit(folder, tmp_path, *SEARCH, "algo.fix_clipping=true")
    assert last(tmp_path)["sampling_interval"] == list(FULL_INTERVAL)
    ends = [(row["clip/low"], row["clip/high"]) for row in searches(tmp_path)]
    assert ends == [pytest.approx(FULL_INTERVAL)] * 2


def test_without_widths_nothing_is_searched(folder, tmp_path):
    fit(folder, tmp_path, "algo=bd3lm", "block_size=4")
    assert not searches(tmp_path) and not (tmp_path / "clip_search.png").exists()


def count_passes(monkeypatch, folder, run_dir, *overrides):
    """Forward passes per search over the first four rows, which are one batch."""
    passes, original = [], MDLM.block_losses

    def block_losses(self, batch, counter, interval):
        passes.append(counter)
        return original(self, batch, counter, interval)

    monkeypatch.setattr(MDLM, "block_losses", block_losses)
    fit(folder, run_dir, *SEARCH, "callbacks.clip_search.num_rows=4", *overrides)
    return len(passes) / len(searches(run_dir))


def test_number_of_forward_passes(folder, tmp_path, monkeypatch):
    exact = ("callbacks.clip_search.method=exact",)
    assert count_passes(monkeypatch, folder, tmp_path / "exact", *exact) == 6
    assert count_passes(monkeypatch, folder, tmp_path / "binned") == 3


@pytest.mark.parametrize("method", ["exact", "binned"])
def test_killed_in_the_middle_of_a_search_and_resumed_equals_straight(folder, tmp_path, method):
    """SIGKILL between two forward passes of the search at step 8, after one batch was drawn."""
    overrides = (*WEIGHTED, f"callbacks.clip_search.method={method}")
    fit(folder, tmp_path / "straight", *overrides)

    def die_while_searching():
        original, drawn = MDLM.block_losses, []

        def block_losses(self, batch, counter, interval):
            drawn.append(counter)
            if counter[0] == 8 and len([c for c in drawn if c[0] == 8]) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, batch, counter, interval)

        MDLM.block_losses = block_losses  # in the forked child alone
        fit(folder, tmp_path / "run", *overrides)

    process = start_child(die_while_searching)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert last(tmp_path / "run")["global_step"] == 6
    in_child(fit, folder, tmp_path / "run", *overrides)
    assert equal(state(tmp_path / "run"), state(tmp_path / "straight"))
    assert table(tmp_path / "run") == table(tmp_path / "straight")
    assert state(tmp_path / "run")["sampling_interval"] != list(FULL_INTERVAL)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["algo=ar", "algo.var_min=true", "algo.clip_search_widths=[0.5]"], "no masking rates"),
        ([*SEARCH[:1], "block_size=2", "algo.clip_search_widths=[0.3]", "training.resample=true"],
         r"algo\.clip_search_widths=\[0\.3\]: .*no number of masked tokens out of block_size=2"),
        ([*SEARCH, "callbacks.clip_search.method=fast"], "method=fast: allowed binned, exact"),
        ([*SEARCH, "callbacks.clip_search.draws=0"], r"clip_search\.draws=0: allowed 1 or more"),
    ],
)  # fmt: skip
def test_bad_options_are_named(folder, tmp_path, overrides, message):
    with pytest.raises(ConfigError, match=message):
        fit(folder, tmp_path, *overrides)


def test_a_chosen_interval_far_from_the_full_one_is_plotted(tmp_path):
    """The picture needs no run: a table with two searches, one value missing."""
    path = tmp_path / "metrics.csv"
    path.write_text(
        "step,clip/low,clip/high,clip/var 0.001-1,clip/var 0.5-1\n"
        "4,0.001,1.0,2.0,\n8,0.5,1.0,2.0,1.0\n"
    )
    clip_search.plot_searches(path, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 1000
    path.write_text("step,val/nll\n4,2.0\n")
    clip_search.plot_searches(path, tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_the_first_rows_are_searched_however_they_are_cut():
    seen = []

    class Seen(TwoBatches):
        def block_losses(self, batch, counter, interval):
            seen.append(batch["index"].tolist())
            return super().block_losses(0, (0, 0, 0), interval)

    callback = ClipSearch([0.5], num_rows=3, draws=1)
    callback.list_intervals(TwoBatches())
    for rows in ([1, 3], [0, 2], [4, 5]):
        callback.draw(Seen(), {"index": torch.tensor(rows), "draws": []}, step=0, batch_idx=0)
    assert seen == [[1], [0, 2]]


def test_a_search_without_a_finite_variance_changes_nothing(folder, tmp_path, monkeypatch):
    original = MDLM.block_losses

    def block_losses(self, batch, counter, interval):
        found = original(self, batch, counter, interval)
        return found._replace(loss_N=found.loss_N * float("nan"))

    monkeypatch.setattr(MDLM, "block_losses", block_losses)
    fit(folder, tmp_path, *SEARCH)
    assert not searches(tmp_path) and last(tmp_path)["sampling_interval"] == list(FULL_INTERVAL)


class TwoBatches:
    """A model whose two blocks per batch lose what the test says."""

    process = MaskingProcess(LogLinear(), 4, seed=0)
    device = torch.device("cpu")
    losses = {0: [[1.0, 3.0], [2.0, 2.0]], 1: [[0.0, 4.0], [5.0, 7.0]]}  # noqa: RUF012

    def block_losses(self, batch, counter, interval):
        number = int(batch["index"]) if isinstance(batch, dict) else batch
        loss = torch.tensor(self.losses[number][counter[2]])
        return BlockLosses(torch.zeros(2), loss, torch.ones(2), torch.ones(2), None)

    def gather(self, values):
        return values


def test_exact_statistics_are_those_of_the_batches():
    callback = ClipSearch([0.5], method="exact", delta=0.9)
    callback.list_intervals(TwoBatches())
    for number in (0, 1):
        batch = {"index": torch.tensor([number])}
        callback.draw(TwoBatches(), batch, step=0, batch_idx=number)
    assert callback.variances(TwoBatches()).tolist() == [(2.0 + 8.0) / 2, (0.0 + 2.0) / 2]
