"""Tasks whose answer can be looked up: the candidate's equals that of the true continuation.

No process is started and nothing is drawn, so it can be asked thousands of times per step.
"""

import re
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

from rewards.continuation import Case, Judgement, Pair, Preference
from rewards.judges import ByScore
from rewards.verdict import Grader

_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|[+-]?\.\d+")


class VerifiableReward:
    """1 if both answers are equal, 0 if not or if the candidate has none; a `ContinuationReward`.

    Answers are equal letter by letter, white space folded, or as decimal numbers: 1,000 is 1000.0.
    A reference without an answer cannot be judged by, which is invalid, and so is what a grader
    cannot compare.

    Args:
        pattern: regular expression whose last match is the answer, by its first group if it has
            one; None takes what stands before the first line end.
        grader: compares in another way (`rewards.verdict`): an item of the reference's answer with
            the candidate's. Those that ask a process of their own are slower by far.

    Raises:
        ValueError: no regular expression.
    """

    def __init__(self, pattern: str | None = None, grader: Grader | None = None) -> None:
        try:
            self._pattern = None if pattern is None else re.compile(pattern)
        except re.error as error:
            raise ValueError(f"pattern={pattern!r}: {error}; allowed: a regular expression") from (
                error
            )
        self.grader = grader

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case, in order."""
        return [self._one(case) for case in cases]

    def identity(self) -> dict[str, Any]:
        """Where answers are looked for, and who compares them."""
        return {
            "reward": "verifiable",
            "pattern": None if self._pattern is None else self._pattern.pattern,
            "grader": None if self.grader is None else self.grader.fingerprint(),
        }

    def answer(self, text: str) -> str | None:
        """The answer in a text, white space folded; None: it has none."""
        if self._pattern is None:
            found = text.split("\n", 1)[0]
        else:
            matches = list(self._pattern.finditer(text))
            if not matches:
                return None
            found = matches[-1].group(1 if self._pattern.groups else 0) or ""
        return " ".join(found.split()) or None

    def _one(self, case: Case) -> Judgement:
        right, said = self.answer(case.reference), self.answer(case.candidate)
        if right is None:
            return Judgement(None, "the reference has no answer")
        if said is None:
            return Judgement(0.0, "the candidate has no answer")
        if self.grader is None:
            return Judgement(float(same_answer(right, said)))
        verdict = self.grader.grade({"id": case.id, "answer": right}, said)
        if not verdict.decided:
            return Judgement(None, verdict.reason)
        return Judgement(float(verdict.correct), verdict.reason)


def same_answer(one: str, other: str) -> bool:
    """Whether two answers are the same text or the same decimal number."""
    if one == other:
        return True
    numbers = number_of(one), number_of(other)
    return None not in numbers and numbers[0] == numbers[1]


def number_of(text: str) -> Decimal | None:
    """The number that a text is, separators of thousands allowed; None: it is something else."""
    return Decimal(text.replace(",", "")) if _NUMBER.fullmatch(text) else None


class VerifiablePairwise:
    """The candidate with the right answer is better, if only one has it; a `PairwiseJudge`.

    Args:
        pattern, grader: see `VerifiableReward`.
    """

    def __init__(self, pattern: str | None = None, grader: Grader | None = None) -> None:
        self._by_score = ByScore(VerifiableReward(pattern, grader))

    def compare(self, pairs: Sequence[Pair]) -> list[Preference]:
        """One preference per pair, in order."""
        return self._by_score.compare(pairs)

    def identity(self) -> dict[str, Any]:
        """That of the reward."""
        return self._by_score.identity()
