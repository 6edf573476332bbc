"""The picture of training runs of thoughts."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from evaluation.rlmt_plot import PANELS, plot_runs, running_mean, series


def test_the_running_mean_looks_back():
    found = running_mean(np.array([1.0, 3.0, 8.0, 1.0]), window=2)
    np.testing.assert_allclose(found, [1.0, 2.0, 5.5, 4.5])
    assert len(running_mean(np.array([]))) == 0


def test_steps_without_a_number_are_gaps():
    history = [{"kl": 0.5}, {"kl": "nan"}, {}, {"kl": 0.25}]
    steps, values = series(history, "kl")
    assert steps.tolist() == [1, 4] and values.tolist() == [0.5, 0.25]


def test_a_panel_for_what_was_measured_and_a_line_for_each_run(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **_: kept.append(self))
    runs = {
        "paper": [{"reward_mean": 0.25, "kl": 0.0}, {"reward_mean": 0.75, "kl": 0.1}],
        "seed": [{"reward_mean": 0.5}],
    }
    assert plot_runs(tmp_path / "a.png", runs) == ["reward_mean", "kl"]
    reward, kl = kept[0].axes
    assert reward.get_ylabel() == PANELS["reward_mean"]
    thick = {line.get_label(): line.get_ydata() for line in reward.get_lines()}
    assert thick["paper"] == pytest.approx([0.25, 0.5]) and thick["seed"] == pytest.approx([0.5])
    assert {line.get_label() for line in kl.get_lines()} >= {"paper"}
    assert "seed" not in {line.get_label() for line in kl.get_lines()}


def test_nothing_measured_draws_nothing(tmp_path):
    assert plot_runs(tmp_path / "a.png", {"none": []}) == []
    assert not (tmp_path / "a.png").exists()
