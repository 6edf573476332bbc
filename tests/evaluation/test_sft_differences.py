"""Paired differences of losses between arms: hand numbers, a plain bootstrap, refusals."""

import numpy as np
import pytest

from data.errors import DataError
from evaluation.grouped import RESAMPLES, Groups
from evaluation.kind_likelihood import PARTS, RowLikelihoods, losses, plain_row, read_plain_rows
from evaluation.sft_differences import (
    difference_cells,
    difference_metrics,
    loss_differences,
    require_rows_of,
)


def arm(raw, thoughts=None, tokens=None, index=None, documents=None):
    """Rows with these nats of text; with thoughts, of so many nats, 3 tokens more in each."""
    raw = np.asarray(raw, dtype=float)
    tokens = np.full(len(raw), 4.0) if tokens is None else np.asarray(tokens, dtype=float)
    none = np.zeros(len(raw))
    nats = {"raw": raw, "text": raw, "selected": raw}
    counts = {"raw": tokens, "text": tokens, "selected": tokens}
    if thoughts is not None:
        nats |= {"thought": np.asarray(thoughts, dtype=float), "selected": raw + thoughts}
        counts |= {"thought": none + 1, "delimiter": none + 2, "selected": tokens + 3}
    table = [np.stack([of.get(part, none) for part in PARTS], -1) for of in (nats, counts)]
    index = np.arange(len(raw)) if index is None else np.asarray(index)
    return RowLikelihoods(index, *table, None if documents is None else np.asarray(documents))


def test_hand_numbers():
    found, remarks = loss_differences({
        "left": arm([4.0, 9.0, 2.0], tokens=[2, 6, 2]),
        "right": arm([3.0, 8.0, 2.0], tokens=[2, 6, 2]),
    })  # fmt: skip
    assert remarks == [] and [one.loss for one in found] == ["val_loss_raw", "val_loss_selected"]
    one = found[0]
    assert (one.right, one.left, one.joined_by) == ("right", "left", "index")
    assert (one.drawn, one.tokens) == (3, 10)
    assert one.value == pytest.approx((3 + 8 + 2) / 10 - (4 + 9 + 2) / 10)
    # All of a resample is the first row, of 2 tokens; or the last, on which the arms are alike.
    assert (one.low, one.high) == pytest.approx((-1 / 2, 0.0))
    # Of two rows that differ, chance has both signs alike half of the time.
    assert one.p == 0.5
    header, (cells, _) = difference_cells(found)
    assert dict(zip(header, cells, strict=True)) == {
        "Comparison": "right vs left", "Loss": "Val Loss Raw", "Delta": "-0.200000",
        "95 % of Delta": "[-0.500000, +0.000000]", "p": "0.5", "Drawn": "3 rows", "Tokens": "10",
    }  # fmt: skip
    assert difference_metrics(found[:1]) == {
        "delta_val_loss_raw/right-left": one.value, "delta_val_loss_raw_low/right-left": one.low,
        "delta_val_loss_raw_high/right-left": one.high, "delta_val_loss_raw_p/right-left": one.p,
    }  # fmt: skip


def noisy(shift, seed, rows=200):
    """Two arms that are `shift` nats per token apart, on rows that differ by far more."""
    draw = np.random.default_rng(seed)
    tokens = draw.integers(2, 30, rows)
    hard = tokens * draw.uniform(1, 5, rows)
    noise = draw.normal(0, 0.3, rows)
    return arm(hard, tokens=tokens), arm(hard + tokens * shift + noise, tokens=tokens)


def test_the_interval_is_a_plain_bootstrap_of_two_ratios():
    left, right = noisy(0.03, seed=1)
    (one, _), _ = loss_differences({"left": left, "right": right})
    draw, values = np.random.default_rng(2), []
    for _ in range(4000):
        pick = draw.integers(0, 200, 200)
        ours, theirs = (
            rows.part("raw")[0][pick].sum() / rows.part("raw")[1][pick].sum()
            for rows in (right, left)
        )
        values.append(ours - theirs)
    assert (one.low, one.high) == pytest.approx(np.quantile(values, [0.025, 0.975]), abs=3e-4)
    means = [losses(rows, 8)["loss_raw"] for rows in (right, left)]
    assert one.value == pytest.approx(means[0] - means[1])


def test_a_difference_far_below_the_spread_of_rows_is_found():
    (one, _), _ = loss_differences(dict(zip("ab", noisy(0.03, seed=3), strict=True)))
    assert 0 < one.low < one.value < one.high and one.p == 1 / RESAMPLES
    ps = [
        loss_differences(dict(zip("ab", noisy(0.0, seed), strict=True)))[0][0].p
        for seed in range(10, 50)
    ]
    assert sum(p <= 0.05 for p in ps) <= 6 and max(ps) > 0.8


def test_an_arm_and_itself():
    found, _ = loss_differences({"a": arm([3.1, 2.2], [1.0, 0.3]), "b": arm([3.1, 2.2], [1, 0.3])})
    for one in found:
        assert (one.value, one.low, one.high, one.p) == (0.0, 0.0, 0.0, 1.0)


def test_one_row_has_no_interval():
    (one, _), _ = loss_differences({"a": arm([3.0]), "b": arm([5.0])})
    assert (one.value, one.low, one.high, one.p) == (0.5, None, None, None)
    cells = difference_cells([one])[1][0]
    assert cells[2:5] == ["+0.500000", "-", "-"]
    assert difference_metrics([one]) == {"delta_val_loss_raw/b-a": 0.5}


def test_all_pairs_in_the_order_of_the_arms_and_the_own_format_only_within_a_form():
    found, remarks = loss_differences({
        "raw": arm([3.0, 2.0, 1.0], documents=[0, 1, 2]),
        "think": arm([2.0, 2.0, 1.0], [1.0, 1.0, 1.0], documents=[0, 1, 2]),
        "more": arm([2.0, 2.0, 2.0], [0.0, 1.0, 1.0], documents=[0, 1, 2]),
    })  # fmt: skip
    assert [(one.right, one.left, one.loss) for one in found] == [
        ("think", "raw", "val_loss_raw"), ("more", "raw", "val_loss_raw"),
        ("more", "think", "val_loss_raw"), ("more", "think", "val_loss_selected"),
    ]  # fmt: skip
    assert [one.value for one in found] == pytest.approx([-1 / 12, 0.0, 1 / 12, 0.0])
    assert [one.tokens for one in found] == [12, 12, 12, 21]
    assert remarks == [
        f"Val Loss Selected of {name} vs raw is not compared: 3 of 3 documents differ in their"
        " number of tokens of each kind"
        for name in ("think", "more")
    ]
    assert difference_cells(found)[1][0][5] == "3 documents"


def test_forms_are_joined_by_document_whatever_the_order_of_their_rows():
    draw = np.random.default_rng(5)
    tokens, hard, order = draw.integers(3, 40, 100), draw.uniform(1, 5, 100), draw.permutation(100)
    number = np.arange(100)
    raw = arm(tokens * hard, tokens=tokens, documents=number)
    nats = (tokens * (hard - 0.02))[order]
    think = arm(nats, np.ones(100), tokens=tokens[order], documents=number[order])
    (one,), (said,) = loss_differences({"raw": raw, "think": think})
    assert (one.value, one.low, one.high) == pytest.approx((-0.02, -0.02, -0.02))
    assert (one.joined_by, one.drawn, one.p) == ("document", 100, 1 / RESAMPLES)
    assert said.startswith("Val Loss Selected of think vs raw")
    # By index they would be 100 pairs of unlike documents.
    lost = think._replace(document_R=None)
    found, (said, _) = loss_differences({"raw": raw, "think": lost})
    assert found == [] and said.endswith("rows.jsonl does not say of both which documents they are")
    # As many tokens of text in every row prove nothing, for they may be of other documents.
    found, remarks = loss_differences({"raw": arm([3, 2]), "think": arm([2, 3], [1, 1])})
    assert found == [] and len(remarks) == 2


def test_rows_of_a_document_are_drawn_together():
    # Two documents of two rows each: the left one in another order.
    left = arm([1.0, 2.0, 3.0, 4.0], tokens=[2, 3, 4, 5], documents=[7, 7, 9, 9])
    right = arm([4.5, 2.5, 2.0, 1.5], tokens=[5, 4, 3, 2], documents=[9, 9, 7, 7])
    (one, _), _ = loss_differences({"left": left, "right": right})
    assert (one.drawn, one.tokens) == (2, 14)
    assert one.value == pytest.approx(0.5 / 14)
    # A quarter of the resamples each have one document alone: 7, by 0.5 of 5 tokens, and 9, by 0.
    assert (one.low, one.high) == pytest.approx((0.0, 0.1)) and one.p == 1.0


def test_full_rows_of_two_forms_are_told_by_kind():
    # 7 tokens each: of text alone, or 4 of text.
    rows = {"raw": arm([3.0, 2.0], tokens=[7, 7]), "think": arm([3.0, 2.0], [1.0, 1.0])}
    counts = [one.part("selected")[1].tolist() for one in rows.values()]
    found, remarks = loss_differences(rows)
    assert counts[0] == counts[1] and found == [] and len(remarks) == 2


@pytest.mark.parametrize(
    ("other", "remark"),
    [
        (arm([1.0, 2.0, 3.0]), "not the same validation rows, 3 and 2 of which 2 are of both"),
        (arm([1.0, 2.0], index=[1, 2]), "not the same validation rows, 2 and 2 of which 1 are of"),
        (
            arm([1.0, 2.0], tokens=[4, 5]),
            "1 of 2 rows differ in their number of tokens of each kind",
        ),
    ],
    ids=["more", "others", "another text"],
)
def test_other_rows_are_not_compared(other, remark):
    found, remarks = loss_differences({"a": arm([1.0, 2.0]), "b": other})
    assert found == [] and "b vs a is not compared: " + remark in remarks[0]


def test_arms_without_rows():
    rows = arm([1.0, 2.0])
    assert loss_differences({"a": None}) == ([], [])
    found, (said,) = loss_differences({"a": None, "b": None})
    assert found == [] and said.endswith("no rows.jsonl stands beside metrics.json: a, b")
    found, (said,) = loss_differences({"a": rows, "b": None, "c": rows})
    assert {(one.right, one.left) for one in found} == {("c", "a")} and said.endswith("json: b")


def test_rows_of_a_file_are_those_that_were_written():
    rows = arm([3.25, 2.0, 1.5], [1.0, 0.5, 0.1], [3, 4, 5], index=[2, 5, 7], documents=[3, 1, 0])
    plain = [(f"rows.jsonl:{n + 1}", plain_row(rows, n)) for n in range(3)]
    for mine, theirs in zip(read_plain_rows(reversed(plain)), rows, strict=True):
        np.testing.assert_array_equal(mine, theirs)
    # One row of several documents, or of nobody knows which.
    some = {name: value for name, value in plain[2][1].items() if name != "document"}
    assert read_plain_rows([*plain[:2], (plain[2][0], some)]).document_R is None
    for change, message in (
        ({"index": 5}, r"rows.jsonl:3: a second row of index=5; allowed: one each"),
        ({"nll_raw": None}, r"rows.jsonl:3: nll_raw=None; allowed: a number"),
        ({"nll_raw": float("nan")}, r"rows.jsonl:3: nll_raw=nan; allowed: a number"),
        ({"document": "x"}, r"rows.jsonl:3: document='x'; allowed: a number"),
    ):
        with pytest.raises(DataError, match=message):
            read_plain_rows([*plain[:2], (plain[2][0], {**plain[2][1], **change})])


def test_rows_of_another_evaluation_are_refused():
    rows = arm([3.0, 2.0], [1.0, 1.0])
    said = {"arm": "x", "val_loss_raw": 5 / 8, "val_loss_selected": 7 / 14}
    require_rows_of(said, rows)
    with pytest.raises(DataError, match=r"'x': val_loss_selected=0.6 in metrics.json, 0.5 by rows"):
        require_rows_of(said | {"val_loss_selected": 0.6}, rows)
    with pytest.raises(DataError, match=r"val_loss_raw=0.625 in metrics.json, nan by rows.jsonl"):
        require_rows_of(said, read_plain_rows([]))


def test_resamples_without_a_token_are_left_out():
    # Two rows have tokens, thirty have none: about one resample in eight has nothing below.
    nats, tokens, none = np.zeros(32), np.zeros(32), np.zeros(32)
    nats[:2], tokens[:2] = [1.0, -2.0], 4.0
    groups = Groups(np.arange(32))
    measure, p = groups.difference(nats, none, tokens)
    draws = [
        (one - 2 * two) / (4 * (one + two)) for one, two in groups.times_DG[:, :2] if one + two
    ]
    assert 0.8 * RESAMPLES < len(draws) < 0.95 * RESAMPLES
    assert p == pytest.approx(2 * np.mean(np.array(draws) >= 0))
    assert measure == pytest.approx((-1 / 8, *np.quantile(draws, [0.025, 0.975]), 8.0))
