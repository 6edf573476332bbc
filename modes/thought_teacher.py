"""A language model as the annotator of `mode=insert_thoughts`.

It is shown a passage in numbered sentences and says which thoughts go where, as a JSON list; so it
cannot change the passage. `Rewriter` lets it write the passage anew with thoughts in it, which is
then compared. A reply that a check refuses is asked for again.
"""

import json
from collections.abc import Iterable, Iterator
from typing import Any

from data.annotation import Acceptance, Annotated, Passage
from data.fingerprint import fingerprint
from data.thoughts import Delimiters, Insertion, Limits, Rejected, placed, sentences
from decoding.generate import GenerationRequest, GenerationResult, Generator

PASSAGE = "{passage}"


class Teacher:
    """Asks for a list of insertions.

    Args:
        generator: who answers.
        delimiters: of thoughts.
        limits: of what is accepted.
        prompt: the request, with `{passage}` where the passage goes.
        prompt_kind: its name, for the rows.
        retries: further attempts at a passage whose reply is refused; each is drawn anew.

    Raises:
        ValueError: the prompt has no place for the passage.
    """

    # Reasons that a reply which ended too early has.
    _unread: tuple[str, ...] = ("not_json",)

    def __init__(
        self,
        generator: Generator,
        delimiters: Delimiters,
        limits: Limits,
        prompt: str,
        prompt_kind: str,
        retries: int = 2,
    ) -> None:
        if PASSAGE not in prompt:
            raise ValueError(f"mode.annotator.prompt: allowed a text with {PASSAGE} in it")
        self._generator, self._retries = generator, retries
        self._accept = Acceptance(delimiters, limits)
        self._prompt, self._prompt_kind = prompt, prompt_kind

    def identity(self) -> dict[str, Any]:
        """The model and the prompt."""
        model = self._generator.identity()
        return {
            "teacher": model["target"],
            "prompt_kind": self._prompt_kind,
            "prompt": fingerprint(self._prompt),
            "retries": self._retries,
            **{f"model {name}": value for name, value in model.items()},
        }

    def annotate(self, passages: Iterable[Passage]) -> Iterator[Annotated]:
        """Ask for all passages, then again for those whose reply was refused.

        A passage has the reason of its last reply: what `data.thoughts` refuses, `not_json`, or
        `cut_off`, a reply that ended by its limit and cannot be read.
        """
        for attempt in range(self._retries + 1):
            refused: list[Passage] = []
            for passage, result in self._replies(passages, attempt):
                found = self._judged(passage, result, attempt + 1)
                if found.reason and attempt < self._retries:
                    refused.append(passage)
                else:
                    yield found
            if not refused:
                return
            passages = refused

    def _replies(
        self, passages: Iterable[Passage], attempt: int
    ) -> Iterator[tuple[Passage, GenerationResult]]:
        waiting: dict[str, Passage] = {}
        # The id decides the draws of a reply.
        end = f"~{attempt}" if attempt else ""

        def requests() -> Iterator[GenerationRequest]:
            """One for every passage, which waits for its reply."""
            for passage in passages:
                waiting[f"{passage.id}{end}"] = passage
                content = self._prompt.replace(PASSAGE, self._shown(passage.text))
                turn = {"role": "user", "content": content}
                yield GenerationRequest(f"{passage.id}{end}", messages=[turn])

        for result in self._generator.generate(requests()):
            yield waiting.pop(result.id), result

    def _judged(self, passage: Passage, result: GenerationResult, attempts: int) -> Annotated:
        if result.error is not None:
            return Annotated(passage.id, error=result.error, attempts=attempts)
        try:
            augmented = self._accept(passage.text, self._draft(passage.text, result.text))
        except Rejected as error:
            unread = result.finish == "length" and error.reason in self._unread
            reason = "cut_off" if unread else error.reason
            return Annotated(passage.id, reason=reason, attempts=attempts)
        return Annotated(passage.id, augmented, attempts=attempts)

    def _shown(self, text: str) -> str:
        return numbered(text)

    def _draft(self, text: str, reply: str) -> list[Insertion] | str:
        return placed(text, json_list(reply))


class Rewriter(Teacher):
    """Asks for the whole passage with thoughts in it, which has to be the same without them."""

    _unread = ("text_changed", "unbalanced")

    def _shown(self, text: str) -> str:
        return text

    def _draft(self, text: str, reply: str) -> str:
        # Chat models open and close with white space that the passage does not have.
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        return f"{text[:begin]}{reply.strip()}{text[end:]}"


def numbered(text: str) -> str:
    """A line per sentence, each after its number in brackets."""
    spans = enumerate(sentences(text), start=1)
    return "\n".join(f"[{number}] {text[start:end]}" for number, (start, end) in spans)


def json_list(reply: str) -> list[Any]:
    """The list in a reply, whatever is written around it.

    Raises:
        Rejected: `not_json`.
    """
    begin, end = reply.find("["), reply.rfind("]")
    try:
        return json.loads(reply[begin : end + 1] if begin >= 0 else "")
    # Brackets nested a thousand deep exhaust the stack.
    except (ValueError, RecursionError) as error:
        raise Rejected("not_json") from error
