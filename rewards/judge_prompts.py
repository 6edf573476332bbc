"""What a judge is asked: a versioned template, and the few answers that it may give."""

from collections.abc import Mapping
from string import Template
from typing import Any

from data.fingerprint import fingerprint

# What a question may show: the thought behind a candidate is no part of it.
TEXTS = ("prefix", "reference", "candidate", "first", "second")


class JudgePrompt:
    """A question with a closed set of answers.

    `$prefix`, `$reference` and `$candidate`, or `$first` and `$second`, stand for the texts; what
    these contain is not looked at again. A judge that writes is asked for JSON, `{field: answer}`;
    one that chooses reads the question and `cue`, and the answers behind it are compared.

    Args:
        name: what is judged.
        version: goes up with every change of meaning; the hash changes with every letter.
        question: the text of the question.
        reply: how the answer is to be written, added for a judge that writes.
        field: where it stands in the JSON.
        answers: what may be answered, and what that means: a score, or "first", "second", "tie".
        system: who the judge is, if anything is said about it.
        cue: what the answer of a judge that chooses stands behind.

    Raises:
        ValueError: a text that nobody gives, fewer than two answers, or no field.
    """

    def __init__(
        self,
        name: str,
        version: int,
        question: str,
        reply: str,
        field: str,
        answers: Mapping[str, Any],
        system: str = "",
        cue: str = "Answer:",
    ) -> None:
        where = f"template {name!r}"
        self._template = Template(question)
        if not self._template.is_valid():
            raise ValueError(f"{where}: question has a lone $; allowed: $$ for the character")
        self.texts = tuple(dict.fromkeys(self._template.get_identifiers()))
        unknown = [text for text in self.texts if text not in TEXTS]
        if unknown:
            allowed = ", ".join(f"${text}" for text in TEXTS)
            raise ValueError(f"{where}: question has ${unknown[0]}; allowed: {allowed}")
        if len(answers) < 2 or not field:
            raise ValueError(
                f"{where}: field={field!r}, answers={dict(answers)}; allowed: a name, and two"
                " answers or more"
            )
        self.name, self.version, self.field = name, version, field
        self.question, self.reply, self.system, self.cue = question, reply, system, cue
        self.answers = {str(answer): value for answer, value in answers.items()}

    def render(self, texts: Mapping[str, str]) -> str:
        """The question about these texts, white space at the ends aside."""
        return self._template.substitute(texts).strip()

    def identity(self) -> dict[str, Any]:
        """Name and version for people, the hash of everything for machines."""
        content = {
            "question": self.question, "reply": self.reply, "field": self.field,
            "answers": self.answers, "system": self.system, "cue": self.cue,
        }  # fmt: skip
        return {"template": self.name, "version": self.version, "hash": fingerprint(content)}


def shortened(name: str, text: str, longest: int) -> str:
    """At most `longest` characters: of a prefix its end, of everything behind it the beginning."""
    return text[-longest:] if name == "prefix" else text[:longest]


def category(reason: str) -> str:
    """What kind of failure a reason tells of: the words before its colon."""
    return reason.partition(":")[0]
