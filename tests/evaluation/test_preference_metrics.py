"""Metrics and alerts of preference learning, by hand."""

import pytest

from evaluation.preference_metrics import pool_metrics, preference_alerts


def candidate(source, score, ids=(1, 2, 3)):
    return {"source": source, "score": score, "ids": list(ids)}


def pool(candidates, lessons, asked=3, invalid=0, settled=0, flips=0, kl=None):
    return {
        "candidates": candidates, "lessons": lessons, "asked": asked, "invalid": invalid,
        "settled": settled, "flips": flips, "kl": kl,
    }  # fmt: skip


POOLS = [
    pool(
        [
            candidate("original", 1.0),
            candidate("rollout", 0.25, [5, 6, 7]),
            candidate("rollout", 0.0, [5, 6]),
            candidate("rewrite", 0.5),
        ],
        [[0, 2]], asked=6, invalid=1, settled=5, flips=2, kl=0.25,
    ),
    pool(
        [candidate("original", 0.0), candidate("rollout", 0.75, [5, 6, 7, 8]),
         candidate("rollout", None, [9])],
        [[1, 0]], settled=3, flips=0, kl=0.75,
    ),
    # Of one nothing is valid, of the other all is equal.
    pool([candidate("original", None), candidate("rollout", None, [])], [], asked=1, invalid=1),
    pool([candidate("original", 0.5), candidate("rollout", 0.5, [5, 6, 7])], [], asked=2),
]  # fmt: skip


def test_metrics_by_hand():
    found = pool_metrics(POOLS)
    rollouts = [[5, 6, 7], [5, 6], [5, 6, 7, 8], [9], [], [5, 6, 7]]
    wanted = {
        "total_prefixes": 4, "kept_prefixes": 2, "kept_rate": 0.5,
        "chosen_is_original_rate": 0.5, "chosen_is_rewrite_rate": 0.0,
        "chosen_is_rollout_rate": 0.5, "rejected_is_original_rate": 0.5,
        "rejected_is_rewrite_rate": 0.0, "rejected_is_rollout_rate": 0.5,
        "original_mean_score": (1 + 0 + 0.5) / 3, "rewrite_mean_score": 0.5,
        "rollout_mean_score": (0.25 + 0 + 0.75 + 0.5) / 4,
        "pool_top_score_mean": (1 + 0.75 + 0.5) / 3,
        "pool_bottom_score_mean": (0 + 0 + 0.5) / 3,
        "pool_spread_mean": (1 + 0.75 + 0) / 3,
        "judge_invalid_rate": 2 / 12, "order_flip_rate": 2 / 8, "kl": 0.5,
        "rollout_tokens": sum(map(len, rollouts)) / 6,
        # 56 67 | 56 | 56 67 78 | 56 67, and 567 | 567 678 | 567.
        "distinct_2": 3 / 8, "distinct_3": 2 / 4,
    }  # fmt: skip
    assert found == pytest.approx(wanted)


def test_what_is_unknown_is_left_out():
    found = pool_metrics([POOLS[2]])
    assert found == pytest.approx(
        {"total_prefixes": 1, "kept_prefixes": 0, "kept_rate": 0, "judge_invalid_rate": 1,
         "rollout_tokens": 0}
    )  # fmt: skip


def test_the_best_alone_is_rejected_by_nobody():
    found = pool_metrics([pool(POOLS[0]["candidates"], [[3]])])
    assert found["chosen_is_rewrite_rate"] == 1 and "rejected_is_rewrite_rate" not in found


GOOD = {
    "pool_spread_mean": 0.3, "chosen_is_rollout_rate": 0.4, "original_mean_score": 0.9,
    "rollout_mean_score": 0.5, "available_mem_gib": 4.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "first", "message"),
    [
        ({"pool_spread_mean": 0.29}, 51, "pool_spread_mean=0.2900: under 0.3"),
        ({"chosen_is_rollout_rate": 0.39}, 201, "chosen_is_rollout_rate=0.3900: under 0.4"),
        ({"original_mean_score": 0.91}, 501, "original_minus_rollout=0.4100: above 0.4"),
        ({"available_mem_gib": 3.5}, 1, "available_mem_gib=3.5000: under 4"),
    ],
    ids=["spread", "rollouts", "gap", "memory"],
)
def test_alerts_begin_at_their_step(changed, first, message):
    assert preference_alerts(GOOD, 10_000) == []
    assert preference_alerts(GOOD | changed, first) == [message]
    assert preference_alerts(GOOD | changed, first - 1) == []
    assert preference_alerts({}, 10_000) == []
