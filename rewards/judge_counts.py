"""How often a judge was asked and how often in vain, and when that is often enough to stop."""

from collections import Counter, deque
from dataclasses import dataclass, field

from rewards.judge_backends import Reply
from rewards.judge_prompts import category


class JudgeError(ValueError):
    """A judge that does not judge; one line with its name, the counts and the last reason."""


@dataclass
class JudgeCounts:
    """Questions and what became of them, since the judge was made.

    Attributes:
        asked: questions, repeats and those answered from the cache included.
        valid: answers among the allowed ones.
        cached: answers that cost nothing.
        invalid: questions without an answer, by kind of failure.
    """

    asked: int = 0
    valid: int = 0
    cached: int = 0
    invalid: Counter[str] = field(default_factory=Counter)

    def add(self, reply: Reply, cached: bool) -> None:
        """A question has its reply."""
        self.asked += 1
        self.cached += cached
        if reply.answer is None:
            self.invalid[category(reply.reason)] += 1
        else:
            self.valid += 1

    def metrics(self) -> dict[str, float]:
        """asked, valid, cached, invalid, and invalid/KIND; invalid_rate if anything was asked."""
        total = self.invalid.total()
        found: dict[str, float] = {
            "asked": self.asked, "valid": self.valid, "cached": self.cached, "invalid": total,
        }  # fmt: skip
        found |= {f"invalid/{kind}": count for kind, count in sorted(self.invalid.items())}
        return found | ({"invalid_rate": total / self.asked} if self.asked else {})


class StopRule:
    """Ends a run whose judge fails; cached answers do not count.

    Args:
        name: of the judge.
        max_invalid_rate: the largest share of the last `window` questions without a valid answer.
        window: how many that are.
        max_failures: so many in a row are too many.

    Raises:
        ValueError: an option outside its range.
    """

    def __init__(self, name: str, max_invalid_rate: float, window: int, max_failures: int) -> None:
        if not 0.0 <= max_invalid_rate <= 1.0 or min(window, max_failures) < 1:
            raise ValueError(
                f"judge {name}: max_invalid_rate={max_invalid_rate}, window={window},"
                f" max_failures={max_failures}; allowed: a rate in [0, 1], and integers >= 1"
            )
        self.name, self.max_invalid_rate = name, max_invalid_rate
        self.max_failures = max_failures
        self._last: deque[bool] = deque(maxlen=window)
        self._in_a_row = 0

    def add(self, reply: Reply) -> None:
        """A question was asked just now, with this reply.

        Raises:
            JudgeError: that was one invalid answer too many.
        """
        failed = reply.answer is None
        self._last.append(failed)
        self._in_a_row = self._in_a_row + 1 if failed else 0
        if self._in_a_row >= self.max_failures:
            self._stop(f"{self._in_a_row} in a row", f"max_failures={self.max_failures}", reply)
        rate = sum(self._last) / len(self._last)
        if failed and len(self._last) == self._last.maxlen and rate > self.max_invalid_rate:
            share = f"{sum(self._last)} of the last {len(self._last)}"
            self._stop(share, f"max_invalid_rate={self.max_invalid_rate}", reply)

    def _stop(self, much: str, limit: str, reply: Reply) -> None:
        raise JudgeError(
            f"judge {self.name}: {much} questions without a valid answer ({limit}); the last:"
            f" {reply.reason}"
        )
