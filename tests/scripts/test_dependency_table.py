"""The table of depth weights: its numbers by hand from made-up runs."""

import pytest

from scripts import dependency_table as table
from scripts.dependency_table import BASELINE, Variant

HEAVY = Variant(1.0)


def result(variant, seed, nll, good):
    depths = {f"nll/depth_{d}": nll + d for d in range(table.DEEPEST + 1)}
    return {
        "variant": variant._asdict(), "seed": seed,
        "mdlm": {"nll": nll + 1, **depths}, "bd3lm": {"nll": nll, **depths},
        "samples": {"grammatical_rate": good / 100},
    }  # fmt: skip


RESULTS = [
    result(variant, seed, nll, 10 * seed)
    for variant in table.VARIANTS
    for seed, nll in ((1, 3.0 - 0.1 * (variant == HEAVY)), (2, 3.4 - 0.3 * (variant == HEAVY)))
]


def test_differences_are_paired_by_seed():
    found = table.difference(RESULTS, HEAVY, "bd3lm")
    assert found == pytest.approx([-0.1, -0.3])
    cells = table.row(RESULTS, HEAVY)
    assert cells[:4] == (1.0, "dependency", "root", pytest.approx(3.0))
    # mean -0.2, s / sqrt(2) = 0.1, t(1) = 12.706
    assert cells[5:7] == ("-0.2000", "[-1.4706, +1.0706]")
    assert cells[7:9] == cells[5:7], "the control has the baseline's numbers here"
    assert cells[-2:] == ("15.0%", "[-48.5%, 78.5%]")
    assert table.row(RESULTS, BASELINE)[5:9] == (None,) * 4
    assert table.row(RESULTS, Variant(1.0, "random"))[7:9] == (None, None)


def test_a_run_that_is_missing_takes_its_pair_along():
    some = [r for r in RESULTS if not (r["seed"] == 1 and r["variant"] == HEAVY._asdict())]
    assert table.difference(some, HEAVY, "bd3lm") == pytest.approx([-0.3])


def test_depths_and_picture(tmp_path):
    text = table.depth_table(RESULTS, "bd3lm")
    assert "-0.200" in text and "+0.000" in text
    table.plot(RESULTS, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000
