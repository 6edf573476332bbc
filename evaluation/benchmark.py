"""A benchmark: what is asked, how an answer ends, and who says whether it is right."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

from data.errors import DataError
from data.few_shot import CHAT, TEXT, FewShot, Prompt, require_integer
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
        DataError: an option of another type or outside its range.
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
        require_integer(f"{key}.max_new_tokens", max_new_tokens, 1)
        if limit is not None:
            require_integer(f"{key}.limit", limit, 1)
        # A text is a sequence as well, of texts of one letter.
        listed = isinstance(stop, list | tuple)
        if not listed or not all(isinstance(text, str) and text for text in stop):
            raise DataError(f"{key}.stop={stop}: allowed: a list of texts")
        if not all(hasattr(grader, method) for method in ("check", "grade", "fingerprint")):
            raise DataError(
                f"{key}.grader={grader}: allowed: a choice of the group grader, or a _target_ with"
                " check, grade and fingerprint (rewards.verdict.Grader)"
            )
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
        """The prompts, in order; `limit` counts where the benchmark has no limit of its own.

        Raises:
            DataError: they cannot be made, or the grader could not judge an answer to one.
        """
        first = self.limit if self.limit is not None else limit
        prompts = self.few_shot.prompts()[:first]
        for prompt in prompts:
            try:
                self.grader.check(prompt.row)
            except ValueError as error:
                raise DataError(f"{self.few_shot.key}.prompts: {error}") from error
        return prompts

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
