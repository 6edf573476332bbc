"""Reveal rules: on hand-made clocks and probabilities, and against a known joint distribution."""

import itertools

import pytest
import torch

from decoding.categorical import keyed_uniform64
from decoding.reveal import (
    Ancestral,
    Confidence,
    EntropyBound,
    FirstHitting,
    TopK,
)
from objectives.noise import Cosine, LogLinear, Power
from tests.decoding.toy_models import Oracle, sample_oracle

CLOCK = torch.tensor([[0.1, 0.9, 0.5, 0.95], [0.2, 0.3, 0.25, 0.99]], dtype=torch.float64)
MASKED = torch.tensor([[True, True, True, True], [True, False, True, True]])


def test_first_hitting_goes_from_late_clocks_to_early_ones():
    plan = FirstHitting().plan(CLOCK, MASKED, LogLinear())
    assert plan.tolist() == [[3, 1, 2, 0], [2, -1, 1, 0]]
    pairs = FirstHitting(2).plan(CLOCK, MASKED, LogLinear())
    assert pairs.tolist() == [[1, 0, 1, 0], [1, -1, 0, 0]]


def test_ancestral_skips_empty_steps_of_each_sequence():
    """Four steps of log-linear noise: [0.75, 1), [0.5, 0.75), [0.25, 0.5), [0, 0.25)."""
    plan = Ancestral(4).plan(CLOCK, MASKED, LogLinear())
    assert plan.tolist() == [[2, 0, 1, 0], [2, -1, 1, 0]]
    # p(t) = sqrt(t) moves the edges to 0.866, 0.707 and 0.5.
    assert Ancestral(4).plan(CLOCK, MASKED, Power(0.5)).tolist() == [[2, 0, 1, 0], [1, -1, 1, 0]]


@pytest.mark.parametrize("schedule", [LogLinear(), LogLinear(1e-3), Power(0.5), Cosine()])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 1000])
def test_ancestral_reveals_everything_for_any_number_of_steps(schedule, num_steps):
    clock = keyed_uniform64((num_steps,), torch.arange(50), 20)
    clock[0, :2] = torch.tensor([0.0, 1 - 2**-53])
    masked = clock < 0.8
    masked[0] = True
    plan = Ancestral(num_steps).plan(clock, masked, schedule)
    assert torch.equal(plan >= 0, masked) and plan.max() < num_steps
    for row in plan:
        steps = row[row >= 0].unique().tolist()
        assert steps == list(range(len(steps))), "steps without gaps"


def test_ancestral_reveals_at_the_rate_of_the_reverse_process():
    """Of 20000 positions masked at t, a share (p(t) - p(s)) / p(t) is revealed on the way to s."""
    clock = keyed_uniform64((9,), torch.arange(1000), 20)
    step = Ancestral(4).plan(clock, torch.ones_like(clock, dtype=torch.bool), Cosine())
    p = Cosine().probability(torch.linspace(1, 0, 5, dtype=torch.float64)).tolist()
    for number in range(4):
        left = int((step >= number).sum())
        rate = int((step == number).sum()) / left
        expected = (p[number] - p[number + 1]) / p[number]
        assert rate == pytest.approx(expected, abs=4 * (0.25 / left) ** 0.5)


def _log_p(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor([rows]).log()


PEAKED = _log_p([[0.5, 0.5, 0.0], [0.95, 0.05, 0.0], [1.0, 0.0, 0.0], [0.8, 0.1, 0.1]])
ALL = torch.ones(1, 4, dtype=torch.bool)
NOT_THE_SURE_ONE = torch.tensor([[True, True, False, True]])


@pytest.mark.parametrize(
    ("rule", "masked", "chosen"),
    [
        (Confidence(0.9), ALL, [1, 2]),
        (Confidence(0.9), NOT_THE_SURE_ONE, [1]),
        (Confidence(0.99), NOT_THE_SURE_ONE, [1]),  # none is sure enough: the best one
        (Confidence(0.0), ALL, [0, 1, 2, 3]),
        (TopK(1), ALL, [2]),
        (TopK(3), ALL, [1, 2, 3]),
        (TopK(2), NOT_THE_SURE_ONE, [1, 3]),
        (TopK(9), ALL, [0, 1, 2, 3]),
        # Entropies: 0.693, 0.199, 0, 0.639 nats; sums without the largest: 0, 0, 0.199, 0.837.
        (EntropyBound(0.0), ALL, [1, 2]),
        (EntropyBound(0.19), ALL, [1, 2]),
        (EntropyBound(0.2), ALL, [1, 2, 3]),
        (EntropyBound(0.84), ALL, [0, 1, 2, 3]),
        (EntropyBound(0.0), NOT_THE_SURE_ONE, [1]),
    ],
)
def test_adaptive_rules_on_hand_made_probabilities(rule, masked, chosen):
    found = rule.choose(PEAKED, masked) & masked
    assert found[0].nonzero()[:, 0].tolist() == chosen


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: FirstHitting(0), "tokens_per_step=0"),
        (lambda: TopK(0), "tokens_per_step=0"),
        (lambda: Ancestral(0), "num_steps=0"),
        (lambda: Confidence(1.5), "confidence_threshold=1.5"),
        (lambda: EntropyBound(-1.0), "entropy_bound=-1.0"),
    ],
)
def test_bad_options_are_named(build, name):
    with pytest.raises(ValueError, match=f"sampling.{name}: allowed"):
        build()


@pytest.fixture(scope="module")
def joint() -> torch.Tensor:
    """A strongly dependent distribution of three tokens over three letters."""
    logits = 2.0 * torch.randn(3, 3, 3, generator=torch.Generator().manual_seed(4))
    return logits.double().flatten().softmax(0).view(3, 3, 3)


def chi_square(canvas, joint: torch.Tensor) -> float:
    """Pearson's statistic of the samples against the joint distribution: 26 degrees of freedom."""
    a, b, c = canvas.x_BL.T
    observed = ((a * 3 + b) * 3 + c).bincount(minlength=27).double()
    expected = joint.flatten() * len(canvas.x_BL)
    return float(((observed - expected).square() / expected).sum())


# The 99.9 % quantile of chi-square with 26 degrees of freedom.
LIMIT = 54.05


@pytest.mark.parametrize("rule", [FirstHitting(), Ancestral(3000), TopK(1), EntropyBound(0.0)])
def test_one_at_a_time_samples_the_true_joint_distribution(rule, joint):
    canvas = sample_oracle(Oracle(joint), rule, num_samples=1500)
    assert chi_square(canvas, joint) < LIMIT


def test_many_at_a_time_samples_the_product_of_marginals(joint):
    """The same statistic tells the difference, so the test above can fail."""
    canvas = sample_oracle(Oracle(joint), FirstHitting(3), num_samples=1500)
    assert canvas.nfe == 1
    assert chi_square(canvas, joint) > 10 * LIMIT
    axes = range(3)
    marginals = [joint.sum([other for other in axes if other != axis]) for axis in axes]
    product = torch.stack(
        [
            marginals[0][a] * marginals[1][b] * marginals[2][c]
            for a, b, c in itertools.product(range(3), repeat=3)
        ]
    ).view(3, 3, 3)
    assert chi_square(canvas, product) < LIMIT


@pytest.mark.parametrize(
    "rule", [FirstHitting(2), Ancestral(2), Confidence(0.8), TopK(2), EntropyBound(0.3)]
)
def test_every_rule_leaves_no_mask(rule, joint):
    canvas = sample_oracle(Oracle(joint), rule, num_samples=40)
    assert (canvas.x_BL < 3).all()
    assert 1 <= canvas.nfe <= 3


def test_an_independent_model_is_sampled_exactly_from_a_single_pass():
    marginals = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.1, 0.8], [0.3, 0.3, 0.4]]).double()
    joint = torch.einsum("a,b,c->abc", *marginals)
    canvas = sample_oracle(Oracle(joint), Ancestral(1), num_samples=1500)
    assert canvas.nfe == 1 and chi_square(canvas, joint) < LIMIT
