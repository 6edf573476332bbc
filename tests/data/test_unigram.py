"""Unigram cross-entropy against a hand computation."""

import math

import numpy as np
import pytest

from data.arrow import cache_path, open_or_build
from data.blocks import IDS, LENGTH
from data.unigram import unigram_cross_entropy


def rows(folder, split, ids, lengths):
    key = {"source": "toy", "split": split, "length": len(ids[0]), "wrap": False}

    def build(report):
        report.rows = len(ids)
        yield {IDS: np.array(ids, np.uint32), LENGTH: np.array(lengths)}

    return open_or_build(cache_path(folder, key), key, 4, build)


def test_hand_computation(tmp_path):
    train = rows(tmp_path, "train", [[1, 2, 2], [1, 0, 0]], [3, 1])
    held_out = rows(tmp_path, "validation", [[1, 3, 0]], [2])
    # Scored in training: 1 2 2 1, so p = (1, 3, 3, 1) / 8; held out: 1 3.
    expected = -(math.log(3 / 8) + math.log(1 / 8)) / 2
    assert unigram_cross_entropy(train, held_out, 4) == pytest.approx(expected)
    # Without the first position: 2 2, so p = (1, 1, 3, 1) / 6; held out: 3.
    entropy = unigram_cross_entropy(train, held_out, 4, ignore_bos=True)
    assert entropy == pytest.approx(-math.log(1 / 6))
    # With padding: 1 2 2 1 0 0, so p = (3, 3, 3, 1) / 10; held out: 1 3 0.
    entropy = unigram_cross_entropy(train, held_out, 4, score_padding=True)
    assert entropy == pytest.approx(-(2 * math.log(0.3) + math.log(0.1)) / 3)
    # First training row only: 1 2 2, so p = (1, 2, 3, 1) / 7.
    entropy = unigram_cross_entropy(train, held_out, 4, max_train_rows=1)
    assert entropy == pytest.approx(-(math.log(2 / 7) + math.log(1 / 7)) / 2)
