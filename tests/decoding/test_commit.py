"""Commit rules by hand: which places a pass makes final."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from decoding.commit import EntropyBound, PrefixThreshold, Sequential, Threshold, TopK
from objectives.refinement import Prediction

RULES = [PrefixThreshold(0.5), Threshold(0.5), TopK(), EntropyBound(0.5), Sequential()]


def prediction(confidence, entropy=None) -> Prediction:
    confidence = torch.tensor(confidence)
    entropy = torch.zeros_like(confidence) if entropy is None else torch.tensor(entropy)
    token = torch.zeros(confidence.shape, dtype=torch.long)
    nothing = torch.empty(*confidence.shape, 0)
    return Prediction(token, confidence, entropy, nothing.long(), nothing)


def committed(rule, confidence, before, iterations=4, entropy=None) -> list[list[int]]:
    found = rule(prediction(confidence, entropy), torch.tensor(before).bool(), iterations)
    return found.int().tolist()


NONE = [[0, 0, 0, 0]]
SURE = [[0.9, 0.3, 0.6, 0.8]]


def test_a_prefix_ends_at_the_first_unsure_place():
    rule = PrefixThreshold(0.6)
    assert committed(rule, SURE, NONE) == [[1, 0, 0, 0]]
    assert committed(rule, SURE, [[0, 1, 0, 0]]) == [[1, 1, 1, 1]], "a given place is sure"
    assert committed(rule, [[0.1, 0.9, 0.9, 0.9]], NONE) == NONE
    assert committed(PrefixThreshold(0.0), [[0.0] * 4], NONE) == [[1, 1, 1, 1]]
    assert committed(PrefixThreshold(1.0), [[1.0, 0.999, 1.0, 1.0]], NONE) == [[1, 0, 0, 0]]


def test_given_places_behind_an_unsure_one_stay_committed():
    """As a user's turn between two answers may be: nothing else may be in place there."""
    assert committed(PrefixThreshold(0.6), [[0.1] * 4], [[0, 0, 1, 1]]) == [[0, 0, 1, 1]]


def test_a_threshold_takes_every_sure_place_or_the_surest():
    rule = Threshold(0.6)
    assert committed(rule, SURE, NONE) == [[1, 0, 1, 1]]
    assert committed(rule, [[0.1, 0.3, 0.2, 0.3]], NONE) == [[0, 1, 0, 0]]
    # The surest of those that are open.
    assert committed(rule, [[0.5, 0.3, 0.2, 0.4]], [[1, 0, 0, 0]]) == [[1, 0, 0, 1]]


def test_top_k_ends_the_block_with_the_last_pass():
    rule, state = TopK(), NONE
    counts = []
    for confidence in (SURE, [[0.1, 0.7, 0.2, 0.3]], SURE):
        state = committed(rule, confidence, state, iterations=3)
        counts.append(state)
    # ceil(4 / 3) = 2 places a pass.
    assert counts == [[[1, 0, 0, 1]], [[1, 1, 1, 1]], [[1, 1, 1, 1]]]
    assert committed(rule, SURE, NONE, iterations=1) == [[1, 1, 1, 1]]
    assert committed(rule, SURE, NONE, iterations=9) == [[1, 0, 0, 0]]


def test_the_entropy_bound_leaves_the_largest_out():
    entropy = [[0.3, 0.1, 0.6, 0.2]]
    # Sorted .1 .2 .3 .6, and before each 0, .1, .3, .6.
    for bound, found in (
        (0.0, [0, 1, 0, 0]), (0.09, [0, 1, 0, 0]), (0.11, [0, 1, 0, 1]), (0.31, [1, 1, 0, 1]),
        (0.61, [1, 1, 1, 1]),
    ):  # fmt: skip
        assert committed(EntropyBound(bound), SURE, NONE, entropy=entropy) == [found]
    # What is committed already costs nothing.
    before = [[0, 1, 0, 0]]
    assert committed(EntropyBound(0.0), SURE, before, entropy=entropy) == [[0, 1, 0, 1]]
    assert committed(EntropyBound(0.21), SURE, before, entropy=entropy) == [[1, 1, 0, 1]]


def test_sequential_takes_the_leftmost_open_place():
    assert committed(Sequential(), SURE, NONE) == [[1, 0, 0, 0]]
    assert committed(Sequential(), SURE, [[1, 0, 1, 0]]) == [[1, 1, 1, 0]]
    assert committed(Sequential(), SURE, [[1, 1, 1, 1]]) == [[1, 1, 1, 1]]


probabilities = st.lists(st.floats(0, 1, width=32), min_size=5, max_size=5)


@given(probabilities, st.lists(st.booleans(), min_size=5, max_size=5))
def test_whatever_is_committed_stays_and_one_place_is_added(confidence, before):
    entropy = [[-math.log(max(p, 1e-6)) for p in confidence]]
    for rule in RULES:
        found = rule(prediction([confidence], entropy), torch.tensor([before]), 5)
        assert (found | ~torch.tensor([before])).all()
        # Only the rule that commits anew in every pass may wait.
        assert not rule.keeps or found.sum() >= min(5, sum(before) + 1)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: PrefixThreshold(1.5), r"refine\.commit\.threshold=1\.5: allowed \[0, 1\]"),
        (lambda: Threshold(-0.1), r"refine\.commit\.threshold=-0\.1"),
        (lambda: EntropyBound(-1.0), r"refine\.commit\.bound=-1\.0: allowed \[0, inf\)"),
        (lambda: EntropyBound(math.nan), r"refine\.commit\.bound=nan"),
    ],
)
def test_wrong_options(build, message):
    with pytest.raises(ValueError, match=message):
        build()
