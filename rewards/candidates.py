"""Candidates for what follows a prefix: tokens and text, where they come from, and rows of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from decoding.rollout_record import Rollout
from rewards.tournament import Scored

SOURCES = ORIGINAL, REWRITE, ROLLOUT = ("original", "rewrite", "rollout")
_NOT_DRAWN = -1
# Candidates, by pool and number in it, that one term of a loss is about.
Lesson = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Candidate:
    """One of a pool.

    Attributes:
        source: one of `SOURCES`.
        tokens: prompt and suffix.
        text: of the suffix, as judges see it.
    """

    source: str
    tokens: Rollout
    text: str


def given(prefix_id: str, prefix_ids: Sequence[int], suffix_ids: Sequence[int]) -> Rollout:
    """A suffix that nobody sampled, in the form of those that were."""
    return Rollout(
        prefix_id, _NOT_DRAWN, list(prefix_ids), [], [], list(suffix_ids), None, None, "stop",
        "stop", False,
    )  # fmt: skip


def cut(lessons: Sequence[Lesson], rows: int) -> Iterator[list[Lesson]]:
    """Pieces of whole lessons with at most so many different candidates each; at least one piece,
    which may be empty."""
    piece: list[Lesson] = []
    known: set[tuple[int, int]] = set()
    for lesson in lessons:
        if piece and len(known | {*lesson}) > rows:
            yield piece
            piece, known = [], set()
        piece.append(lesson)
        known |= {*lesson}
    yield piece


def pool_row(
    prefix_id: str,
    prefix: str,
    pool: Sequence[Candidate],
    scored: Scored,
    lessons: Sequence[Sequence[int]],
    divergence: float | None,
) -> dict[str, Any]:
    """A pool as plain values.

    Args:
        prefix_id, prefix: whose pool it is.
        pool: its candidates.
        scored: what was said of them; a score of nan becomes None.
        lessons: numbers of the candidates that are learned from.
        divergence: of the policy from its reference, in nats per token.
    """
    candidates = [
        {
            "source": one.source,
            "text": one.text,
            "ids": one.tokens.suffix_ids,
            "finish": one.tokens.suffix_finish,
            "retokenised": one.source == REWRITE,
            "score": None if score != score else score,
        }
        for one, score in zip(pool, scored.scores, strict=True)
    ]
    return {
        "prefix_id": prefix_id,
        "prefix": prefix,
        "candidates": candidates,
        "lessons": [list(one) for one in lessons],
        "asked": scored.asked,
        "invalid": scored.invalid,
        "settled": scored.settled,
        "flips": scored.flips,
        "kl": divergence,
    }
