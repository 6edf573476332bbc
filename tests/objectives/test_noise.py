"""Schedules: end points, monotonicity, and weight = p'(t) / p(t)."""

import pytest
import torch

from objectives.noise import Cosine, Logarithmic, LogLinear, Power

SCHEDULES = [LogLinear(), LogLinear(1e-3), Power(2.0), Power(0.5), Cosine(), Logarithmic()]
IDS = ["loglinear", "loglinear_eps", "square", "square_root", "cosine", "log"]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
def test_endpoints_and_monotone(schedule):
    """p(0) = 0, p(1) = 1 (1 - eps with eps), increasing."""
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)
    p = schedule.probability(t)
    top = 1 - getattr(schedule, "eps", 0.0)
    assert p[0] == pytest.approx(0, abs=1e-12)
    assert p[-1] == pytest.approx(top, abs=1e-12)
    assert (p.diff() > 0).all()


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
def test_weight_is_the_logarithmic_derivative(schedule):
    """Against automatic differentiation of log p(t)."""
    t = torch.linspace(0.01, 1, 100, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(schedule.probability(t).log().sum(), t)
    torch.testing.assert_close(schedule.weight(t.detach()), slope, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=IDS)
def test_bound_does_not_depend_on_the_schedule(schedule):
    """E_t[weight * P(k of n masked)] = 1/k for every schedule: the integral of p^(k-1)(1-p)^(n-k).

    With eps the integral stops at 1 - eps, which changes it by less than n eps.
    """
    t = (torch.arange(200_000, dtype=torch.float64) + 0.5) / 200_000
    p, weight = schedule.probability(t), schedule.weight(t)
    n = 4
    for k in range(1, n + 1):
        binomial = torch.lgamma(torch.tensor([n + 1.0, k + 1.0, n - k + 1.0]).double())
        choose = (binomial[0] - binomial[1] - binomial[2]).exp()
        integral = (weight * choose * p**k * (1 - p) ** (n - k)).mean()
        assert float(integral) == pytest.approx(1 / k, abs=5e-3)


def test_bad_parameters_are_named():
    """The message names key, value and what is allowed."""
    with pytest.raises(ValueError, match=r"noise\.eps=1\.5: allowed 0 <= eps < 1"):
        LogLinear(1.5)
    with pytest.raises(ValueError, match=r"noise\.exponent=0\.0: allowed exponent > 0"):
        Power(0.0)
