"""A reward that knows no language: what it says of a text follows from the text's bytes."""

import zlib
from collections.abc import Sequence
from typing import Any

from rewards.continuation import Case, Judgement


class ByteReward:
    """1 or 0 by a checksum of the candidate; of a ninth of all texts it makes nothing.

    Args:
        salt: another one judges otherwise.
    """

    def __init__(self, salt: str = "") -> None:
        self.salt = salt

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case, in order."""
        return [self.one(case.candidate) for case in cases]

    def one(self, text: str) -> Judgement:
        """Of a candidate."""
        number = zlib.crc32((self.salt + text).encode())
        if number % 9 == 0:
            return Judgement(None, "no idea")
        return Judgement(float(number % 2))

    def identity(self) -> dict[str, Any]:
        """What it judges by."""
        return {"salt": self.salt}
