"""Judges that are asked in words: pointwise, pairwise, and what is made of several of them.

Every question is looked up, asked if need be, kept and counted; what comes back invalid is left
out of means, never a silent zero, and too much of it ends the run.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

from rewards.continuation import (
    Case,
    ContinuationReward,
    Judgement,
    Pair,
    Preference,
)
from rewards.judge_backends import Backend, Question, Reply
from rewards.judge_cache import JudgeCache, question_key
from rewards.judge_counts import JudgeCounts, StopRule
from rewards.judge_prompts import JudgePrompt, shortened


class PromptedJudge:
    """What both kinds share: questions out of texts, and their valid answers.

    Args:
        template: what is asked.
        backend: who is asked.
        repeats: how often; every time with another seed. More than one is for judges that sample.
        max_characters: longest text that is shown, of each.
        cache: file of answers that were had before; None keeps them in memory.
        max_invalid_rate, window, max_failures: see `StopRule`.

    Raises:
        ValueError: an option outside its range, or a template of the other kind.
    """

    # The texts that a question has to show, and what an answer may mean.
    shows: tuple[str, ...] = ()
    meanings = ""

    def __init__(
        self,
        template: JudgePrompt,
        backend: Backend,
        repeats: int = 1,
        max_characters: int = 2000,
        cache: str | Path | None = None,
        max_invalid_rate: float = 0.5,
        window: int = 64,
        max_failures: int = 16,
    ) -> None:
        if min(repeats, max_characters) < 1:
            raise ValueError(
                f"judge {template.name}: repeats={repeats}, max_characters={max_characters};"
                " allowed: integers >= 1"
            )
        self.template, self.backend, self.repeats = template, backend, repeats
        self.max_characters = max_characters
        self._check_template()
        self.counts = JudgeCounts()
        self._cache = JudgeCache(cache)
        self._stop = StopRule(template.name, max_invalid_rate, window, max_failures)

    def identity(self) -> dict[str, Any]:
        """Template, backend, and how texts are shown and answers averaged."""
        return {
            **self._asked_of(),
            "repeats": self.repeats,
            "max_characters": self.max_characters,
        }

    def close(self) -> None:
        """Bring the answers to disk."""
        self._cache.close()

    @staticmethod
    def is_meaning(value: Any) -> bool:
        """Whether an answer may have this value."""
        raise NotImplementedError

    def _asked_of(self) -> dict[str, Any]:
        return {**self.template.identity(), "backend": self.backend.identity()}

    def _check_template(self) -> None:
        template = self.template
        missing = [text for text in self.shows if text not in template.texts]
        if missing:
            raise ValueError(
                f"template {template.name!r}: question has no ${missing[0]}; allowed: one that"
                f" shows {' and '.join(f'${text}' for text in self.shows)}"
            )
        for answer, value in template.answers.items():
            if not self.is_meaning(value):
                raise ValueError(
                    f"template {template.name!r}: answers.{answer}={value}; allowed:"
                    f" {self.meanings}"
                )

    def _replies(self, shown: Sequence[Mapping[str, str]]) -> list[list[Reply]]:
        """All replies about every item, one per repeat; questions that are the same are one.

        Raises:
            JudgeError: too many of them are invalid.
            ValueError: whoever is asked cannot be reached.
        """
        identity = self._asked_of()
        known: dict[str, Reply] = {}
        missing: dict[str, Question] = {}
        keys = []
        for texts in shown:
            question = self.template.render(
                {name: shortened(name, text, self.max_characters) for name, text in texts.items()}
            )
            keys.append([question_key(identity, question, n) for n in range(self.repeats)])
            for key in keys[-1]:
                row = self._cache.get(key)
                if row is None:
                    missing[key] = Question(key, question)
                else:
                    known[key] = Reply(row["answer"], said=row["said"])
        replies = known | dict(self._ask(list(missing.values())))
        self._count(keys, replies, paid=set(missing))
        return [[replies[key] for key in of_item] for of_item in keys]

    def _ask(self, questions: Sequence[Question]) -> Iterator[tuple[str, Reply]]:
        """Ask what is not known, keep what is valid as it comes."""
        # Closed at once if the rule stops the run: requests may be under way.
        with closing(self.backend.ask(self.template, questions)) as replies:
            for key, reply in replies:
                if reply.answer is not None:
                    self._cache.put(key, reply.answer, reply.said)
                self._stop.add(reply)
                yield key, reply

    def _count(
        self, keys: Sequence[Sequence[str]], replies: Mapping[str, Reply], paid: set[str]
    ) -> None:
        """Of questions that are the same only the first one was paid for."""
        for key in (key for of_item in keys for key in of_item):
            self.counts.add(replies[key], cached=key not in paid)
            paid.discard(key)


class PromptedReward(PromptedJudge):
    """Scores a candidate by the answers' values: safety, factuality, agreement with the truth.

    score = mean over the valid repeats of value(answer); a `ContinuationReward`.
    """

    shows = ("candidate",)
    meanings = "a number, the score of that answer"

    @staticmethod
    def is_meaning(value: Any) -> bool:
        """Whether this is a score."""
        return isinstance(value, int | float) and not isinstance(value, bool)

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case, in order."""
        shown = [
            {"prefix": one.prefix, "reference": one.reference, "candidate": one.candidate}
            for one in cases
        ]
        return [self._mean(replies) for replies in self._replies(shown)]

    def _mean(self, replies: Sequence[Reply]) -> Judgement:
        scores = [self.template.answers[one.answer] for one in replies if one.answer is not None]
        if not scores:
            return Judgement(None, replies[0].reason)
        return Judgement(sum(scores) / len(scores))


class PromptedPreference(PromptedJudge):
    """Says which of two candidates is better; a `PairwiseJudge`.

    Of several repeats the majority counts, and where there is none it is a tie.
    """

    shows = ("first", "second")
    meanings = "first, second, tie"

    @staticmethod
    def is_meaning(value: Any) -> bool:
        """Whether this is a winner."""
        return value in ("first", "second", "tie")

    def compare(self, pairs: Sequence[Pair]) -> list[Preference]:
        """One preference per pair, in order, as it is shown."""
        shown = [
            {
                "prefix": one.prefix, "reference": one.reference, "first": one.first,
                "second": one.second,
            }
            for one in pairs
        ]  # fmt: skip
        return [self._majority(replies) for replies in self._replies(shown)]

    def _majority(self, replies: Sequence[Reply]) -> Preference:
        said = [self.template.answers[one.answer] for one in replies if one.answer is not None]
        if not said:
            return Preference(None, replies[0].reason)
        lead = said.count("first") - said.count("second")
        return Preference("tie" if lead == 0 else "first" if lead > 0 else "second")


class CombinedReward:
    """The sum of several rewards (safety + quality, factuality + quality); a `ContinuationReward`.

    Invalid as soon as one of them is.

    Args:
        parts: the rewards by name.

    Raises:
        ValueError: there are none.
    """

    def __init__(self, parts: Mapping[str, ContinuationReward]) -> None:
        if not parts:
            raise ValueError("reward.parts={}: nothing to add up; allowed: {NAME: reward, ...}")
        self.parts = dict(parts)

    def judge(self, cases: Sequence[Case]) -> list[Judgement]:
        """One judgement per case, in order."""
        judged = {name: part.judge(cases) for name, part in self.parts.items()}
        return [_sum({name: of[n] for name, of in judged.items()}) for n in range(len(cases))]

    def identity(self) -> dict[str, Any]:
        """Those of the parts."""
        return {
            "reward": "sum",
            "parts": {name: part.identity() for name, part in self.parts.items()},
        }


def _sum(judged: Mapping[str, Judgement]) -> Judgement:
    total = 0.0
    for name, judgement in judged.items():
        if judgement.score is None:
            return Judgement(None, f"{name}: {judgement.reason}")
        total += judgement.score
    return Judgement(total)


class ByScore:
    """Of two candidates the one with the higher reward is better; a `PairwiseJudge`.

    Equal rewards are a tie, and an invalid one makes no preference.
    """

    def __init__(self, reward: ContinuationReward) -> None:
        self.reward = reward

    def compare(self, pairs: Sequence[Pair]) -> list[Preference]:
        """One preference per pair, in order; where it is shown plays no part."""
        first = [Case(f"{one.id}/1", one.prefix, one.reference, one.first) for one in pairs]
        second = [Case(f"{one.id}/2", one.prefix, one.reference, one.second) for one in pairs]
        judged = self.reward.judge([*first, *second])
        halves = zip(judged[: len(pairs)], judged[len(pairs) :], strict=True)
        return [_higher(one, other) for one, other in halves]

    def identity(self) -> dict[str, Any]:
        """That of the reward."""
        return {"judge": "by score", "reward": self.reward.identity()}


def _higher(first: Judgement, second: Judgement) -> Preference:
    if first.score is None or second.score is None:
        return Preference(None, first.reason or second.reason)
    if first.score == second.score:
        return Preference("tie")
    return Preference("first" if first.score > second.score else "second")
