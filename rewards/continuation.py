"""What is judged of a continuation, and what a judge says: of one text, or of two side by side.

A judge sees the prefix, the true continuation and the candidate, and never the thought that led
there. What it does not understand or cannot answer is invalid, which is not the same as bad.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Case:
    """One candidate to be scored.

    Attributes:
        id: of the candidate, for whoever reads the judgement.
        prefix: the text before it.
        reference: how the text goes on in truth.
        candidate: how a model goes on.
    """

    id: str
    prefix: str
    reference: str
    candidate: str


@dataclass(frozen=True)
class Judgement:
    """What is said of a candidate.

    Attributes:
        score: the reward; None: there is no valid judgement.
        reason: one line, where there is none.
    """

    score: float | None
    reason: str = ""


@dataclass(frozen=True)
class Pair:
    """Two candidates in the order in which they are shown.

    Attributes:
        id: of the comparison.
        prefix: the text before both.
        first, second: the candidates.
        reference: how the text goes on in truth, for a judge that reads it.
    """

    id: str
    prefix: str
    first: str
    second: str
    reference: str = ""


@dataclass(frozen=True)
class Preference:
    """Which candidate is the better one.

    Attributes:
        winner: "first", "second" or "tie"; None: there is no valid judgement.
        reason: one line, where there is none.
    """

    winner: str | None
    reason: str = ""


class ContinuationReward(Protocol):
    """Scores continuations one by one."""

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case, in order.

        Raises:
            ValueError: a judge that cannot be reached, or too much of what it says is invalid.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that determine judgements."""
        ...


class PairwiseJudge(Protocol):
    """Compares continuations two at a time."""

    def compare(self, pairs: Sequence[Pair]) -> list[Preference]:
        """One preference per pair, in order, each asked once and as it is shown.

        Raises:
            ValueError: a judge that cannot be reached, or too much of what it says is invalid.
        """
        ...

    def identity(self) -> dict[str, Any]:
        """Plain values that determine preferences."""
        ...
