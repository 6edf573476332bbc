"""Losses by format and kind: hand numbers, and rows of two processes."""

import numpy as np
import pytest

from evaluation.kind_likelihood import PARTS, batch_mean, by_kind, from_table, losses, plain_row

# index; nats of selected, raw, text, thought, delimiter, after_thought; tokens of the same.
TABLE = np.array(
    [
        [2, 9.0, 8.0, 5.0, 4.0, 0.0, 2.0, 5, 4, 3, 1, 1, 1],
        [0, 6.0, 3.0, 3.0, 2.0, 1.0, 1.0, 6, 2, 2, 2, 2, 2],
        [1, 4.0, 4.0, 4.0, 0.0, 0.0, 0.0, 2, 2, 2, 0, 0, 0],
    ]
)  # fmt: skip


def test_losses_are_sums_over_sums_and_means_of_groups():
    found = losses(from_table(TABLE), 2)
    assert found == pytest.approx({
        "loss_raw": 15 / 8, "loss_raw_batch_mean": (7 / 4 + 8 / 4) / 2,
        "loss_selected": 19 / 13, "loss_selected_batch_mean": (10 / 8 + 9 / 5) / 2,
        "nll_text": 12 / 7, "nll_thought": 6 / 3, "nll_delimiter": 1 / 3, "nll_after_thought": 1.0,
    })  # fmt: skip


def test_rows_of_two_processes_are_those_of_one():
    # In the order in which ranks hold them: rows 0, 2, ... and 1, 3, ...
    draw = np.random.default_rng(0)
    whole = np.column_stack([np.arange(9), draw.random((9, 6)), draw.integers(1, 9, (9, 6))])
    split = np.concatenate([whole[0::2], whole[1::2]])
    one, two = from_table(whole), from_table(split)
    for mine, theirs in zip(one, two, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    assert losses(one, 4) == losses(two, 4)


def test_what_rows_do_not_have_is_not_reported():
    plain = TABLE[2:]
    assert set(by_kind(from_table(plain))) == {"text"}
    assert losses(from_table(plain), 8)["loss_raw"] == losses(from_table(plain), 8)["loss_selected"]
    # A group without tokens has no mean.
    assert batch_mean(np.array([3.0, 0.0]), np.array([2.0, 0.0]), 1) == 1.5


def test_a_row_for_a_file():
    row = plain_row(from_table(TABLE), 0)
    assert row["index"] == 0 and row["nll_thought"] == 2.0 and row["tokens_selected"] == 6
    assert len(row) == 1 + 2 * len(PARTS)
