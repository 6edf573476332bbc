"""reasoning-gym (arXiv:2505.24760): the task itself scores the answer."""

from collections.abc import Iterator
from typing import Any

from rewards.extraction import after_cue, boxed, first_line, last_line, tagged
from rewards.judge import Judge
from rewards.math_answers import check_limits, versions
from rewards.verdict import NO_ANSWER, Item, Verdict, needed

# Scores lie in [0, 1]; less than this is part of an answer, or only its form.
LEAST_SCORE = 0.99
_LONGEST_ANSWER = 4000
_MARKS = "*`$\"'"


class ReasoningGymGrader:
    """An answer is right if its task scores it `LEAST_SCORE` or more.

    The answer is the last <answer>...</answer>, or else the last \\boxed{...}, or else what follows
    the last "answer is" or "Answer:", or else the last line. It is scored as it stands and without
    the marks around it, one after the other (`"**4**."`); the best score counts. Tasks that
    evaluate an answer do so in a walled process; an answer written to fool its judge may do that.

    Args:
        timeout_s: limit in seconds of one score.
        memory_mb: limit in MiB of the address space, that of reasoning-gym included.

    Raises:
        ValueError: a limit out of range, reasoning-gym is not installed, or this is not Linux.
    """

    def __init__(self, timeout_s: float | int = 5.0, memory_mb: int = 4096) -> None:
        check_limits("reasoning_gym", timeout_s, memory_mb)
        self._versions = versions("reasoning_gym", ("reasoning_gym", "sympy"))
        self._judge = Judge("rewards.judged_gym", timeout_s, memory_mb)

    def grade(self, item: Item, text: str) -> Verdict:
        """Whether the task scores the answer as right."""
        task = needed(item, "task", "reasoning_gym")
        # Of some tasks no answer is known, only how to check one.
        entry = {
            "question": needed(item, "question", "reasoning_gym"),
            "answer": item.get("answer"),
            "metadata": item.get("metadata", {}),
        }
        answers = readings(text)
        if not answers:
            return NO_ANSWER
        answers = [answer[:_LONGEST_ANSWER] for answer in answers]
        said = self._judge.ask(task=task, answers=answers, entry=entry)
        if said.value is None:
            return Verdict(False, answers[0], said.reason, decided=False)
        score, answer = said.value["score"], answers[said.value["best"]]
        reason = f"score {score:.2f}" if 0 < score < LEAST_SCORE else ""
        return Verdict(score >= LEAST_SCORE, answer, reason)

    def check(self, item: Item) -> None:
        """Raise ValueError unless the item has a task and a question."""
        for field in ("task", "question"):
            needed(item, field, "reasoning_gym")

    def fingerprint(self) -> dict[str, Any]:
        """The limits, the least score, and the versions of what scores."""
        return {
            "grader": "reasoning_gym", "timeout_s": self._judge.timeout_s,
            "memory_mb": self._judge.memory_mb, "least_score": LEAST_SCORE,
            "versions": self._versions,
        }  # fmt: skip

    def close(self) -> None:
        """End the processes that score."""
        self._judge.close()


def readings(text: str) -> list[str]:
    """What may be meant as the answer, the likeliest first; [] if the text is empty."""
    said = tagged(text) or boxed(text)
    if said:
        found = [said]
    else:
        rest = after_cue(text)
        # An answer of several lines begins on the next one.
        found = [first_line(rest), rest] if rest else [last_line(text)]
    return list(dict.fromkeys(peeled for part in found for peeled in _peel(part)))


def _peel(text: str) -> Iterator[str]:
    """A text, and what is left when one kind of marks around it after the other is taken off."""
    while text:
        yield text
        bare = text.removesuffix(".")
        for mark in _MARKS:
            if bare == text:
                bare = text.strip(mark)
        if bare == text:
            return
        text = bare.strip()
