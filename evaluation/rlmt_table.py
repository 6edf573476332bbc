"""Training runs of thoughts side by side: means over steps of what every step was measured by."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation.gate_report import digits

HEADER = [
    "Arm", "Completed Steps", "Stopped Reason", "Avg Reward", "Final Reward", "Avg Mixed Groups",
    "Avg Near-Zero Groups", "Avg All-Zero Groups", "Avg All-One Groups", "Invalid Judge",
    "Avg Length Drift", "Avg Artifact Rate", "Wall Time s",
]  # fmt: skip
# Averages over steps in the order of the columns, and their digits.
AVERAGES = {
    "mixed_group_rate": 4, "near_zero_group_rate": 4, "all_zero_group_rate": 4,
    "all_one_group_rate": 4, "invalid_judge_rate": 4, "response_length_growth": 6,
    "artifact_rate": 6,
}  # fmt: skip
REWARD = "reward_mean"


@dataclass(frozen=True)
class RlmtRow:
    """One training run.

    Attributes:
        arm: its name.
        completed_steps: optimiser steps.
        stopped_reason: why it ended early; None: it did not.
        wall_time_s: seconds.
        final_reward: of the last step; None where nothing was judged in it.
        averages: mean over the steps that have it, by name; None where none has.
        lacking: steps that lack it, by name, where there are some.
        recorded: steps that there are numbers of at all.
    """

    arm: str
    completed_steps: int
    stopped_reason: str | None
    wall_time_s: float
    final_reward: float | None
    averages: dict[str, float | None]
    lacking: dict[str, int]
    recorded: int


def rlmt_row(metrics: Mapping[str, Any]) -> RlmtRow:
    """The row of a run's metrics.json: arm, completed_steps, stopped_reason, wall_time_s, history,
    which has a dict of numbers per step."""
    history: Sequence[Mapping[str, float]] = metrics["history"]
    names = (REWARD, *AVERAGES)
    values = {name: [step[name] for step in history if name in step] for name in names}
    return RlmtRow(
        arm=metrics["arm"],
        completed_steps=metrics["completed_steps"],
        stopped_reason=metrics["stopped_reason"],
        wall_time_s=metrics["wall_time_s"],
        final_reward=history[-1].get(REWARD) if history else None,
        averages={name: sum(v) / len(v) if v else None for name, v in values.items()},
        lacking={
            name: len(history) - len(v) for name, v in values.items() if len(v) < len(history)
        },
        recorded=len(history),
    )


def rlmt_cells(rows: Sequence[RlmtRow]) -> tuple[list[str], list[list[str]]]:
    """Header and rows, with the digits of the published table."""
    return HEADER, [
        [
            row.arm, str(row.completed_steps), row.stopped_reason or "null",
            digits(row.averages[REWARD]), digits(row.final_reward),
            *(digits(row.averages[name], places) for name, places in AVERAGES.items()),
            digits(row.wall_time_s, 2),
        ]
        for row in rows
    ]  # fmt: skip


def rlmt_notes(rows: Sequence[RlmtRow]) -> list[str]:
    """What a reader of the averages must know."""
    notes = [
        f"{row.arm}: {row.recorded} of {row.completed_steps} steps are recorded"
        " (trainer.log_every_n_steps); means are over these"
        for row in rows
        if row.recorded != row.completed_steps
    ]
    return notes + [
        f"{row.arm}: {count} of {row.recorded} recorded steps have no {name}; its mean is over the"
        " others"
        for row in rows
        for name, count in row.lacking.items()
    ]
