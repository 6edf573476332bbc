"""A reward that needs no answer to be right: it looks at the letters, and can be made to fail."""

import zlib
from collections.abc import Sequence
from typing import Any

from rewards.continuation import Case, Judgement


class LettersReward:
    """1 or 0 by the letters of a candidate.

    Args:
        invalid: of so many candidates one has no valid judgement; 0: none of them.
        infinite_at: number of the call that rewards without bound; 0: no call does.
    """

    def __init__(self, invalid: int = 0, infinite_at: int = 0) -> None:
        self.invalid, self.infinite_at, self.calls = invalid, infinite_at, 0

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case."""
        self.calls += 1
        if self.calls == self.infinite_at:
            return [Judgement(float("inf"))] * len(cases)
        return [self._one(zlib.crc32(case.candidate.encode())) for case in cases]

    def _one(self, number: int) -> Judgement:
        if self.invalid and number % self.invalid == 0:
            return Judgement(None, "illegible")
        return Judgement(float(number // 7 % 2))

    def identity(self) -> dict[str, Any]:
        """Its options."""
        return {"reward": "letters", "invalid": self.invalid}
