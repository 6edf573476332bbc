"""The published counts in the recipes fit each other, which no run at full size can show here."""

import re

from tests.support import ROOT

FOLDER = ROOT / "scripts" / "dflash"


def counts(stage: str, name: str = "counts") -> dict[str, int]:
    """The first assignment in a script: that of the full size."""
    found = re.search(rf"^{name}='{{(.*)}}'$", (FOLDER / f"{stage}.sh").read_text(), re.MULTILINE)
    assert found is not None
    pairs = (part.split(":") for part in found[1].split(","))
    return {group: int(rows) for group, rows in pairs}


def test_the_anchors_of_m1_9_are_there():
    m1_5, m1_6, anchors = counts("m1_5"), counts("m1_6"), counts("m1_9", "anchors")
    assert anchors == {"code": 30_000, "chat": 30_000}
    for group, rows in anchors.items():
        assert rows <= m1_5[group] + m1_6[group]
        assert rows <= counts("m1_9")[group]
    assert "$OUT/m1_5/set/rows.jsonl,$OUT/m1_6/set/rows.jsonl" in (FOLDER / "m1_9.sh").read_text()


def test_published_steps_follow_from_the_counts():
    """Epochs of 64 conversations; the published totals differ from the sums by 18 and 9 rows."""
    for stage, epochs, steps in (("m1_5", 3, 17_536), ("m1_6", 3, 10_501), ("m1_9", 3, 10_493)):
        assert abs(sum(counts(stage).values()) * epochs / 64 - steps) < 1
