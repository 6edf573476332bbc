"""The table of training runs, rebuilt from rollouts with the published totals."""

from evaluation.rlmt_table import HEADER, rlmt_cells, rlmt_notes, rlmt_row
from evaluation.rollout_metrics import rollout_metrics

STEPS, SAMPLES, LIMIT = 200, 16, 176
# Of 6400 rollouts and 400 groups: successes, those of the last step, mixed groups, artifacts, new
# tokens. They follow from the published means; how they fall on steps is made up here.
TOTALS = {
    "think_base RLMT": (590, 1, 228, 845, 1_125_824, 5488.32),
    "think_phase3 RLMT": (578, 3, 225, 895, 1_125_786, 5448.25),
}
PUBLISHED = {
    "think_base RLMT": "200 null 0.092188 0.031250 0.5700 0.4300 0.4300 0.0000 0.0000 -0.000511"
    " 0.132031 5488.32",
    "think_phase3 RLMT": "200 null 0.090313 0.093750 0.5625 0.4375 0.4375 0.0000 0.0000 -0.000545"
    " 0.139844 5448.25",
}


def spread(total, parts):
    """`total` in whole numbers that differ by at most one."""
    return [total // parts + (place < total % parts) for place in range(parts)]


def history(successes, final, mixed, artifacts, tokens):
    """Metrics of every step: two prefixes with 16 rollouts each."""
    in_group = [*spread(successes - final, mixed - 1), *[0] * (2 * STEPS - mixed), final]
    number = 2 * STEPS * SAMPLES
    new_tokens = spread(tokens, number)
    rows = [
        {
            "prefix_id": str(n // SAMPLES), "reward": float(n % SAMPLES < in_group[n // SAMPLES]),
            "thought": "so", "suffix": "\ufffd" if n < artifacts else "on", "thought_tokens": 48,
            "suffix_tokens": new_tokens[n] - 48, "closed_autonomously": False,
        }
        for n in range(number)
    ]  # fmt: skip
    step = 2 * SAMPLES
    return [
        {"step": n + 1, **rollout_metrics(rows[n * step : (n + 1) * step], float(LIMIT))}
        for n in range(STEPS)
    ]


def run_metrics(arm):
    *counts, wall = TOTALS[arm]
    steps = history(*counts)
    return {
        "arm": arm, "completed_steps": STEPS, "stopped_reason": None, "wall_time_s": wall,
        "final": steps[-1], "history": steps,
    }  # fmt: skip


def test_the_published_table():
    rows = [rlmt_row(run_metrics(arm)) for arm in TOTALS]
    header, cells = rlmt_cells(rows)
    assert header == HEADER
    assert cells == [[arm, *line.split()] for arm, line in PUBLISHED.items()]
    assert rlmt_notes(rows) == []


def test_steps_that_lack_a_number_are_counted():
    known = dict.fromkeys(
        ("mixed_group_rate", "near_zero_group_rate", "all_zero_group_rate", "all_one_group_rate",
         "invalid_judge_rate", "artifact_rate"), 0.5)  # fmt: skip
    steps = [{"step": 1, "reward_mean": 0.25, **known}, {"step": 2, **known}]
    row = rlmt_row({
        "arm": "a", "completed_steps": 2, "stopped_reason": "non-finite loss", "wall_time_s": 1.0,
        "history": steps,
    })  # fmt: skip
    assert row.averages["reward_mean"] == 0.25 and row.final_reward is None
    assert row.averages["response_length_growth"] is None
    ((cells,), notes) = rlmt_cells([row])[1], rlmt_notes([row])
    assert cells[2:5] == ["non-finite loss", "0.250000", "-"] and cells[10] == "-"
    assert "a: 1 of 2 recorded steps have no reward_mean" in notes[0] and len(notes) == 2


def test_a_history_with_gaps_is_said():
    metrics = run_metrics("think_base RLMT")
    row = rlmt_row({**metrics, "history": metrics["history"][::10]})
    assert rlmt_notes([row]) == [
        "think_base RLMT: 20 of 200 steps are recorded"
        " (trainer.log_every_n_steps); means are over these"
    ]


def test_a_run_without_steps():
    empty = {"arm": "a", "completed_steps": 0, "stopped_reason": "x", "wall_time_s": 0.0}
    row = rlmt_row({**empty, "history": []})
    assert row.final_reward is None and set(row.averages.values()) == {None} and row.lacking == {}
    assert rlmt_cells([row])[1][0][3:] == ["-"] * 9 + ["0.00"]
