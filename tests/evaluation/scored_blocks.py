"""Scored blocks for tests: a handful worked out by hand, and random ones."""

import numpy as np

from evaluation.scorer import ScoredBlocks

# Five blocks of up to three candidates in three documents. At alpha = 1, l + S is
#   0: -1, 1        flips to 1, the truth: right
#   1: -1, 0, -4    flips to 1, but candidate 0 was the truth: wrong
#   2: -1, 0, -2    flips to 1, neither is the truth
#   3: 4            one candidate, the truth
#   4: 0, -3, -2    stays; candidate 2 was the truth
BY_HAND = ScoredBlocks(
    log_q_MC=np.array([[-1, -2, -np.inf], [-1, -2, -3], [-1, -2, -3], [-1, -np.inf, -np.inf],
                       [-1, -3, -4]], dtype=np.float64),
    score_MC=np.array([[0, 3, np.nan], [0, 2, -1], [0, 2, 1], [5, np.nan, 0], [1, 0, 2]],
                      dtype=np.float64),
    score_RMC=np.array([[[0, 4, np.nan], [0, 2, -1], [0, 2, 1], [5, np.nan, 0], [1, 0, 4]],
                        [[0, 2, np.nan], [0, 2, -1], [0, 2, 1], [5, np.nan, 0], [1, 0, 0]]],
                       dtype=np.float64),
    errors_MC=np.array([[1, 0, 0], [0, 1, 2], [1, 2, 3], [0, 0, 0], [1, 1, 0]]),
    valid_MC=np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 0, 0], [1, 1, 1]], dtype=bool),
    entropy_M=np.array([0.5, 1.5, 2.5, 0.1, 2.0]),
    group_M=np.array([7, 7, 8, 9, 9]),
    truth_score_M=np.array([3.0, 0.0, 1.0, 5.0, 2.0]),
)  # fmt: skip


def random_blocks(seed: int, blocks: int = 200, width: int = 4, skill: float = 1.0) -> ScoredBlocks:
    """Candidate 0 is the proposal's best; the score knows the errors as well as `skill` says."""
    rng = np.random.Generator(np.random.Philox(key=seed))
    valid_MC = rng.random((blocks, width)) < 0.8
    valid_MC[:, 0] = True
    log_q_MC = -np.sort(rng.exponential(1.0, (blocks, width)), axis=-1)
    errors_MC = rng.integers(1, 5, (blocks, width))
    truth_M = rng.choice(width + 1, blocks, p=[0.5, *[0.4 / (width - 1)] * (width - 1), 0.1])
    inside_M = truth_M < width
    errors_MC[np.arange(blocks)[inside_M], truth_M[inside_M]] = 0
    noise_RMC = rng.normal(size=(2, blocks, width)).round(1)
    score_RMC = noise_RMC - skill * np.minimum(errors_MC, 2)
    score_MC = score_RMC.mean(0)
    is_truth_MC = valid_MC & (errors_MC == 0)
    truth_score_M = np.where(
        is_truth_MC.any(-1), (score_MC * is_truth_MC).sum(-1), rng.normal(size=blocks).round(1)
    )
    score_MC = np.where(valid_MC, score_MC, np.nan)
    return ScoredBlocks(
        np.where(valid_MC, log_q_MC, -np.inf),
        score_MC,
        score_RMC,
        errors_MC,
        valid_MC,
        rng.exponential(1.0, blocks),
        rng.integers(0, max(blocks // 4, 1), blocks),
        truth_score_M,
        np.stack([truth_score_M, truth_score_M + 0.5]),
    )
