"""Tiny runs of a scorer: what it starts from, its slots, and its loss one block at a time."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from decoding.block_reader import BlockReader
from decoding.chain import Refined
from scorer import CandidateScorer, Slots
from tests.block_runs import build, fit

SAMPLES = ("bon/proposal=softmax_sampling", "bon.proposal.temperature=0.7")
KINDS = {
    "lastround": ("bon.score_agg=lastround", "bon.rounds=2"),
    "perround": ("bon.score_agg=perround", "bon.rounds=3"),
    # Some blocks, and all of some rows, need one pass more than others.
    "select_each": ("bon.score_agg=select_each", "refine.commit.threshold=0.25"),
    "samples": ("bon.score_agg=perround", "bon.rounds=2", *SAMPLES),
    "corrected": (*SAMPLES, "nce/loss=ranking_corrected", "bon.form=scorer_only"),
    "binary": (*SAMPLES, "nce/loss=binary"),
}


def learned(folder: Path) -> Path:
    """A model that has learned a little of refinement: some candidates are the truth."""
    fit(folder, folder / "draft", "draft_refine", "trainer.max_steps=12")
    return folder


def start(folder: Path) -> str:
    """The override that begins from it."""
    return f"training.from_pretrained={folder}/draft/checkpoints/last.ckpt"


def scorer_of(folder: Path, *overrides: str, **options: Any) -> tuple[CandidateScorer, Any, dict]:
    """A scorer that begins from it, its data and a batch."""
    algorithm, data, batch = build(folder, "nce", start(folder), *overrides, **options)
    algorithm.train()
    return algorithm, data, batch


def rounds_of(
    algorithm: CandidateScorer, batch: dict[str, Any]
) -> tuple[BlockReader, Refined, list[tuple[Slots, Tensor]]]:
    """Slots and scores of every round."""
    reader, refined, found = algorithm.candidates(batch, batch["layout"], algorithm.negatives)
    all_slots = [algorithm.slots(reader, refined, batch["layout"], one) for one in found]
    return (
        reader,
        refined,
        [
            (slots, algorithm.score(slots.hidden_XJSD, slots.tokens_XJS, slots.written_XS))
            for slots in all_slots
        ],
    )


def slow_rows(
    slots: Slots, score_XJ: Tensor, dedup: bool
) -> Iterator[tuple[int, list[int], int, list[float], list[float]]]:
    """Of every block: its number, the slots that count, copies of the truth, scores and log q.

    Copies are found token by token.
    """
    for x in range(len(slots.block_X)):
        places = slots.scored_XS[x]
        seen: list[list[int]] = []
        counted, copies = [0], 0
        truth = slots.tokens_XJS[x, 0, places].tolist()
        for j in range(1, slots.tokens_XJS.shape[1]):
            block = slots.tokens_XJS[x, j, places].tolist()
            if not slots.exists_XJ[x, j]:
                continue
            copies += block == truth
            if block not in seen and not (dedup and block == truth):
                counted.append(j)
            seen.append(block)
        yield x, counted, copies, score_XJ[x].tolist(), slots.log_q_XJ[x].tolist()


def slow_loss(kind: str, counted: list[int], score: list[float], log_q: list[float]) -> float:
    """The loss of a block whose slots `counted` count."""
    if kind == "binary":
        nu = len(counted) - 1
        p = [1 / (1 + math.exp(-(score[j] - math.log(nu)))) for j in counted]
        return -math.log(p[0]) - sum(math.log(1 - one) for one in p[1:])
    value = [score[j] - (log_q[j] if kind == "ranking_corrected" else 0.0) for j in counted]
    return math.log(sum(math.exp(v - value[0]) for v in value))
