"""A benchmark: what is asked, how an answer ends, and who says whether it is right."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from data.errors import DataError
from data.few_shot import CHAT, TEXT, FewShot, Prompt
from data.prompt_sets import QUESTION, PromptSet
from decoding.generate import GenerationSettings


class Benchmark:
    """A choice of the configuration group `benchmark`.

    Args:
        name: of the benchmark; it stands in every row of its answers.
        grader: says what is right (`rewards.verdict.Grader`).
        prompts: what is asked, a choice of the group `prompts` (`data.prompt_sets`).
        max_new_tokens: limit of an answer.
        stop: strings that end an answer in the format text; a conversation ends by itself.
        limit: only the first so many items; None: all.
        exemplars, shots, format, template, answer, separator, instruction, alike: how items become
            prompts (`data.few_shot.FewShot`).

    Raises:
        DataError: an option outside its range.
    """

    def __init__(
        self,
        name: str,
        grader: Any,
        prompts: PromptSet,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        limit: int | None = None,
        exemplars: PromptSet | None = None,
        shots: int = 0,
        format: str = TEXT,
        template: str = QUESTION,
        answer: str = "{answer}",
        separator: str = "\n\n",
        instruction: str = "",
        alike: str | None = None,
    ) -> None:
        key = f"benchmark.{name}"
        for option, value in (("max_new_tokens", max_new_tokens), ("limit", limit)):
            if value is not None and value < 1:
                raise DataError(f"{key}.{option}={value}: allowed: an integer >= 1")
        if not all(isinstance(text, str) and text for text in stop):
            raise DataError(f"{key}.stop={list(stop)}: allowed: a list of texts")
        self.name, self.grader, self.limit = name, grader, limit
        self.max_new_tokens, self.stop = max_new_tokens, () if format == CHAT else tuple(stop)
        self.few_shot = FewShot(
            key, prompts, exemplars, shots, format, template, answer, separator, instruction, alike
        )

    @property
    def expected(self) -> int | None:
        """Items of the complete benchmark, if that is known."""
        return self.few_shot.expected

    def make_prompts(self, limit: int | None = None) -> list[Prompt]:
        """The prompts, in order; `limit` counts where the benchmark has no limit of its own."""
        first = self.limit if self.limit is not None else limit
        return self.few_shot.prompts()[:first]

    def settings(self, settings: GenerationSettings) -> GenerationSettings:
        """The settings of a run with the ends of this benchmark's answers."""
        return replace(settings, max_new_tokens=self.max_new_tokens, stop_strings=self.stop)

    def conditions(self, settings: GenerationSettings) -> dict[str, Any]:
        """What decides the answers beside the model: prompts and settings, as plain values.

        Not the limit, so that a run can go on with a higher one.
        """
        found = asdict(self.settings(settings))
        # Greedy answers do not depend on it.
        found["seed"] = settings.seed if settings.temperature else None
        found["stop_strings"] = list(self.stop)
        return {"prompts": self.few_shot.fingerprint(), "settings": found}
