"""The weights of the reference: how they follow by hand, in place and back, kept and restored."""

import inspect

import pytest
import torch
from torch import nn

from models.reference import OPTIONS, ReferenceWeights


def parameters(*values):
    return [nn.Parameter(torch.tensor([value, 2 * value])) for value in values]


def stepped(reference, policy, steps):
    """After steps of the policy that each add one to every weight."""
    for _ in range(steps):
        with torch.no_grad():
            for weight in policy:
                weight += 1.0
        reference.follow(policy)
    return [weight.tolist() for weight in reference.weights]


def test_frozen_stays():
    policy = parameters(1.0)
    assert stepped(ReferenceWeights(policy, "frozen"), policy, 3) == [[1.0, 2.0]]


def test_periodic_is_taken_over_every_so_many_steps():
    policy = parameters(1.0)
    reference = ReferenceWeights(policy, "periodic", every=2)
    assert [stepped(reference, policy, 1) for _ in range(5)] == [
        [[1.0, 2.0]], [[3.0, 4.0]], [[3.0, 4.0]], [[5.0, 6.0]], [[5.0, 6.0]],
    ]  # fmt: skip
    # A copy: what the policy does next it does alone.
    assert reference.weights[0].data_ptr() != policy[0].data_ptr()


def test_average_by_hand():
    policy = parameters(1.0)
    found = stepped(ReferenceWeights(policy, "ema", decay=0.75), policy, 2)
    # 1, then 0.75 * 1 + 0.25 * 2, then 0.75 * 1.25 + 0.25 * 3
    assert found[0] == pytest.approx([1.6875, 2.6875])
    copied = ReferenceWeights(policy, "ema", decay=0.0)
    assert stepped(copied, policy, 1) == [weight.tolist() for weight in policy]


def test_in_place_and_back_also_after_an_error():
    layer = nn.Linear(3, 2)
    policy = list(layer.parameters())
    reference = ReferenceWeights(policy, "frozen")
    x = torch.randn(4, 3)
    start = layer(x)
    with torch.no_grad():
        for weight in policy:
            weight += 1.0
    now, kept = layer(x), [weight.detach().clone() for weight in policy]
    places = [weight.data_ptr() for weight in policy]
    with reference.in_place(policy):
        assert torch.equal(layer(x), start)
    assert torch.equal(layer(x), now) and all(map(torch.equal, policy, kept))
    with pytest.raises(KeyError), reference.in_place(policy):
        raise KeyError
    assert all(map(torch.equal, policy, kept))
    assert [weight.data_ptr() for weight in policy] == places
    assert list(layer.parameters()) == policy


def test_in_place_under_autocast():
    """Autocast keeps a rounded copy of every weight that it has seen."""
    layer, x = nn.Linear(3, 2), torch.randn(4, 3)
    policy = list(layer.parameters())
    reference = ReferenceWeights(policy, "frozen")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        start = layer(x)
        torch.clear_autocast_cache()
        policy[0] += 1.0
        now = layer(x)
        with reference.in_place(policy):
            assert torch.equal(layer(x), start) and not torch.equal(start, now)
        assert torch.equal(layer(x), now)


def test_state_is_a_copy_and_comes_back():
    policy = parameters(1.0, 5.0)
    reference = ReferenceWeights(policy, "periodic", every=2)
    stepped(reference, policy, 3)
    state = reference.state_dict()
    rest = stepped(reference, policy, 2)
    again = parameters(4.0, 8.0)
    for weight, other in zip(again, parameters(1.0, 5.0), strict=True):
        weight.data = other.data + 3.0
    fresh = ReferenceWeights(again, "periodic", every=2)
    fresh.load_state_dict(state)
    assert fresh.steps == 3 and stepped(fresh, again, 2) == rest
    assert state["steps"] == 3 and state["weights"][0].tolist() == [3.0, 4.0]


def test_of_another_model():
    state = ReferenceWeights(parameters(1.0), "frozen").state_dict()
    with pytest.raises(ValueError, match="not of the shapes of the trained weights"):
        ReferenceWeights(parameters(1.0, 2.0), "frozen").load_state_dict(state)
    with pytest.raises(ValueError, match="not of the shapes"):
        ReferenceWeights([nn.Parameter(torch.zeros(3))], "frozen").load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"kind": "last"}, "algo.reference.kind=last: allowed frozen, periodic, ema"),
        ({"kind": "periodic", "every": 0}, "every=0, decay=0.999; allowed every >= 1"),
        ({"kind": "ema", "decay": 1.0}, "decay=1.0; allowed every >= 1 and decay in"),
    ],
)
def test_bad_options(options, said):
    with pytest.raises(ValueError, match=said):
        ReferenceWeights(parameters(1.0), **options)


def test_the_options_that_are_named():
    assert tuple(inspect.signature(ReferenceWeights).parameters)[1:] == OPTIONS
