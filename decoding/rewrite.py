"""Another model's version of how a text goes on: a candidate beside the original and samples.

A continuation cannot be told from an answer about it unless it is tied to the text, so the model is
asked to begin with the last words of the prefix, which are then taken off (arXiv 2601.21343).
"""

from collections.abc import Callable, Iterable
from dataclasses import asdict
from string import Template
from typing import Any

from decoding.generate import GenerationRequest, GenerationSettings, Generator

Source = tuple[str, str, str]  # id, prefix, suffix


class Rewriter:
    """Asks a generator for better suffixes.

    Args:
        generator: makes one of settings.
        settings: how it is to answer.
        question: with $prefix, $suffix and, if it asks for them, $words, the last words of the
            prefix.
        words: how many these are.

    Raises:
        ValueError: a question that does not show both texts, or no words.
    """

    def __init__(
        self,
        generator: Callable[..., Generator],
        settings: GenerationSettings,
        question: str,
        words: int = 5,
    ) -> None:
        self.question = Template(question)
        missing = [
            one for one in ("prefix", "suffix") if one not in self.question.get_identifiers()
        ]
        if missing:
            raise ValueError(
                f"rewrite.question={question[:40]!r}: has no ${missing[0]}; allowed: a text with"
                " $prefix and $suffix"
            )
        if words < 1:
            raise ValueError(f"rewrite.words={words}: allowed an integer >= 1")
        self.words, self.settings = words, settings
        self.generator = generator(settings=settings)

    def rewrite(self, sources: Iterable[Source]) -> dict[str, str]:
        """New suffixes by id; those that were not written, or are empty, are missing.

        Raises:
            ValueError: what concerns all requests, such as a server that is dead.
        """
        kept = list(sources)
        ends = {name: " ".join(prefix.split()[-self.words :]) for name, prefix, _ in kept}
        requests = [self._request(*source, ends[source[0]]) for source in kept]
        found = {}
        for result in self.generator.generate(requests):
            text = "" if result.error is not None else without_start(result.text, ends[result.id])
            if text.strip():
                found[result.id] = text
        return found

    def identity(self) -> dict[str, Any]:
        """Plain values that determine what is written."""
        return {
            "model": self.generator.identity(),
            "settings": asdict(self.settings),
            "question": self.question.template,
            "words": self.words,
        }

    def _request(self, name: str, prefix: str, suffix: str, words: str) -> GenerationRequest:
        content = self.question.safe_substitute(prefix=prefix, suffix=suffix, words=words)
        return GenerationRequest(name, messages=[{"role": "user", "content": content}])


def without_start(text: str, words: str) -> str:
    """A text without the words that it begins with, whatever white space is between them; one
    that begins otherwise is left as it is."""
    rest = text
    for word in words.split():
        rest = rest.lstrip()
        if not rest.startswith(word):
            return text
        rest = rest.removeprefix(word)
    return rest
