"""Depths against trees drawn by hand, and heads that are no tree."""

import pytest

from data.depth import MAX_DEPTH, depths_from_heads, tree_features


def test_depths_by_hand():
    # "the old dog that barks sleeps": the <- dog, old <- dog, dog <- sleeps, that <- barks <- dog
    assert depths_from_heads([3, 3, 6, 5, 3, 0]) == (2, 2, 1, 3, 2, 0)
    assert depths_from_heads([]) == ()


@pytest.mark.parametrize(
    ("heads", "message"),
    [([2, 1], "go in a circle"), ([0, 2], "go in a circle"), ([0, 7], "head 7 of a sentence of 2")],
)
def test_heads_that_are_no_tree(heads, message):
    with pytest.raises(ValueError, match=message):
        depths_from_heads(heads)


def test_height_is_at_every_word_and_both_are_bounded():
    assert tree_features([1, 0, 2]) == {"depth": [1, 0, 2], "height": [2, 2, 2]}
    assert tree_features([0, 300]) == {"depth": [0, MAX_DEPTH], "height": [MAX_DEPTH, MAX_DEPTH]}
    assert tree_features([]) == {"depth": [], "height": []}
