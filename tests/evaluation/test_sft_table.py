"""The table of fine-tuned arms: the published one from its numbers, to the digit."""

import pytest

from data.errors import DataError
from evaluation.sft_table import evidence_table, remarks, sft_table

KEYS = (
    "arm", "primary_metric", "val_loss_raw", "val_loss_selected", "repetition_4gram_rate_data",
    "tokens_seen", "tok_per_sec", "available_mem_gib_min",
)  # fmt: skip
NUMBERS = (
    ("raw_base SFT", 2.694593, 2.694593, 2.694593, 0.020321, 4036608, 2729.53, 94.94),
    ("think_base SFT", 2.792869, 2.707164, 2.792869, 0.019397, 4035285, 3284.51, 69.78),
    ("think_phase3 SFT", 2.788120, 2.708099, 2.788120, 0.019397, 4035285, 3298.08, 68.65),
)
PUBLISHED = """\
Arm Primary Metric Val Loss Raw Val Loss Selected Repetition 4-gram Rate Tokens Seen \
Throughput tok/s Min Available Mem GiB
raw_base SFT 2.694593 2.694593 2.694593 0.020321 4,036,608 2729.53 94.94
think_base SFT 2.792869 2.707164 2.792869 0.019397 4,035,285 3284.51 69.78
think_phase3 SFT 2.788120 2.708099 2.788120 0.019397 4,035,285 3298.08 68.65"""


def arms():
    return [dict(zip(KEYS, numbers, strict=True)) for numbers in NUMBERS]


def test_the_published_table():
    header, rows = sft_table(arms())
    assert "\n".join(" ".join(line) for line in (header, *rows)) == PUBLISHED


def test_what_an_arm_does_not_say_is_a_dash():
    header, rows = sft_table([{**arms()[0], "tok_per_sec": None}])
    assert dict(zip(header, rows[0], strict=True))["Throughput tok/s"] == "-"
    header, rows = evidence_table([{**arms()[0], "rows": 512, "val_loss_raw_se": 0.0125}])
    cells = dict(zip(header, rows[0], strict=True))
    assert (cells["Rows"], cells["Raw SE"], cells["Selected SE"]) == ("512", "0.012500", "-")


def test_arms_on_other_rows_are_said_to_be():
    raw, think, phase3 = arms()
    assert remarks([raw, think]) == remarks([raw | {"rows": 8}, think]) == []
    assert remarks([raw | {"rows": 8}, think | {"rows": 8}]) == []
    (said,) = remarks([raw | {"rows": 8}, think | {"rows": 4}, phase3])
    assert said.endswith("cannot be compared: raw_base SFT 8, think_base SFT 4")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"val_loss_raw": None}, "arm 'x': no val_loss_raw; allowed: metrics.json of mode=sft_ev"),
        ({"arm": "raw_base SFT"}, "two arms are called 'raw_base SFT'"),
        ({"tokens_seen": "many"}, "tokens_seen='many' in a table of arms: allowed: a number"),
        ({"arm": ["a"]}, r"arm=\['a'\] in a table of arms: allowed: a text"),
    ],
    ids=["missing", "twice", "text", "list"],
)
def test_arms_that_make_no_table(change, message):
    with pytest.raises(DataError, match=message):
        sft_table([arms()[0], {**arms()[1], "arm": "x", **change}])
