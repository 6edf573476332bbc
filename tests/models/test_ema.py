"""Moving averages against the recurrence written out."""

import pytest
import torch

from models.ema import ExponentialMovingAverage


def test_follows_the_warmed_up_recurrence():
    """d = min(decay, (1 + n) / (10 + n)) at update n."""
    weight = torch.nn.Parameter(torch.zeros(3))
    ema = ExponentialMovingAverage([weight], 0.9)
    expected = torch.zeros(3)
    for n in range(1, 200):
        weight.data = torch.randn(3)
        ema.update([weight])
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * weight.data
    torch.testing.assert_close(ema.shadow[0], expected)


def test_swap_twice_is_identity_and_keeps_storage():
    """Optimisers and compiled code hold on to the tensors themselves."""
    weight = torch.nn.Parameter(torch.ones(2))
    ema = ExponentialMovingAverage([weight], 0.5)
    weight.data.fill_(3.0)
    pointer = weight.data_ptr()
    ema.swap([weight])
    assert weight.tolist() == [1, 1] and ema.shadow[0].tolist() == [3, 3]
    ema.swap([weight])
    assert weight.tolist() == [3, 3] and weight.data_ptr() == pointer


def test_state_round_trips_and_is_checked():
    """decay, counter, shadows; a state of another model is an error."""
    weight = torch.nn.Parameter(torch.ones(2))
    ema = ExponentialMovingAverage([weight], 0.5)
    ema.update([weight])
    other = ExponentialMovingAverage([torch.nn.Parameter(torch.zeros(2))], 0.1)
    other.load_state_dict(ema.state_dict())
    assert (other.decay, other.num_updates) == (0.5, 1)
    assert torch.equal(other.shadow[0], ema.shadow[0])
    wrong = ExponentialMovingAverage([torch.nn.Parameter(torch.zeros(3))], 0.1)
    with pytest.raises(ValueError, match="1 tensors do not match the 1 parameters"):
        wrong.load_state_dict(ema.state_dict())
    with pytest.raises(ValueError, match=r"training\.ema=1\.0"):
        ExponentialMovingAverage([weight], 1.0)
