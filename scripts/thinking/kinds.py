"""What the arms of the study think, and what it brings them: from the rollouts of the gate.

    python scripts/thinking/kinds.py GATE_FOLDER OUT_FOLDER

Writes OUT_FOLDER/thought_kinds.md and .json. A thought on a sum is

    idle    it says what is asked (`4 terms to add up`), as half of those that were learned do
    right   it works the sum out, every partial sum as it should be
    wrong   it works something out that is not that
    other   neither

Shares are of all thoughts of an arm, rewards of those that were judged; 95 % by bootstrap over
documents.
"""

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.errors import DataError  # noqa: E402
from data.storage import atomic_file  # noqa: E402
from data.worked_sums import sums_of, worked  # noqa: E402
from evaluation.benchmark_report import markdown  # noqa: E402
from evaluation.gate import documents_of, groups_of  # noqa: E402
from evaluation.gate_report import digits  # noqa: E402
from evaluation.grouped import Measure  # noqa: E402
from modes.gate_folder import read_arms  # noqa: E402

KINDS = ("idle", "right", "wrong", "other")
_IDLE = re.compile(r"\d+ terms to add up")
HEADER = ["Arm", "Thought", "Samples", "Share", "95 %", "Reward", "95 %"]
Row = Mapping[str, Any]


class Kind(NamedTuple):
    """Thoughts of one kind of an arm: how many, their share of all, and their mean reward."""

    arm: str
    kind: str
    samples: int
    share: Measure
    reward: Measure


def kind_of(prefix: str, thought: str) -> str:
    """One of `KINDS`, of a thought on the last sum of a prefix.

    Raises:
        DataError: there is no sum.
    """
    sums = sums_of(prefix)
    if not sums:
        raise DataError(f"prefix {prefix!r:.60}: no sum; allowed: one that ends with A + B - C =")
    if _IDLE.fullmatch(thought.strip()):
        return "idle"
    if thought.strip() == worked(sums[-1][1]):
        return "right"
    return "wrong" if "=" in thought else "other"


def kinds_of(arm: str, rows: Sequence[Row]) -> list[Kind]:
    """Those that an arm has, in the order of `KINDS`."""
    documents = documents_of(rows)
    groups = groups_of([documents[row["prefix_id"]] for row in rows])
    found_M = np.array([kind_of(row["prefix"], row["thought"]) for row in rows])
    judged_M = np.array([row["reward"] is not None for row in rows])
    reward_M = np.array([row["reward"] or 0.0 for row in rows])
    kinds = []
    for kind in KINDS:
        here_M = found_M == kind
        if here_M.any():
            share, reward = groups.ratio(here_M), groups.ratio(here_M * reward_M, here_M * judged_M)
            kinds.append(Kind(arm, kind, int(here_M.sum()), share, reward))
    return kinds


def cells(kinds: Sequence[Kind]) -> list[list[str]]:
    """The rows of the table."""
    return [
        [one.arm, one.kind, f"{one.samples:,d}", *_cells(one.share), *_cells(one.reward)]
        for one in kinds
    ]


def _cells(measure: Measure) -> list[str]:
    low, high = digits(measure.low, 3), digits(measure.high, 3)
    return [digits(measure.value, 3), "-" if measure.low is None else f"[{low}, {high}]"]


def write_kinds(gate: Path, out: Path) -> None:
    """The table of a gate's arms.

    Raises:
        DataError: a folder without arms, or prefixes without sums.
    """
    arms = read_arms([gate])
    if not arms:
        raise DataError(f"{gate}: no arms/*.jsonl; allowed: the folder of a mode=reward_gate")
    kinds = [kind for arm, rows in arms.items() for kind in kinds_of(arm, rows)]
    out.mkdir(parents=True, exist_ok=True)
    notes = "Shares are of all thoughts of an arm; 95 % draws documents."
    with atomic_file(out / "thought_kinds.md", "OUT_FOLDER") as file:
        file.write(f"# What is thought\n\n{markdown(HEADER, cells(kinds))}\n{notes}\n".encode())
    plain = [
        one._asdict() | {"share": one.share._asdict(), "reward": one.reward._asdict()}
        for one in kinds
    ]
    with atomic_file(out / "thought_kinds.json", "OUT_FOLDER") as file:
        file.write(json.dumps(plain, indent=1).encode())


def main() -> None:
    """Write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("gate", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    write_kinds(options.gate, options.out)


if __name__ == "__main__":
    main()
