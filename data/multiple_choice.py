"""Questions with choices, of which one is right, as rows of `data.chat`.

The order of the choices is a hash of (seed, id of the question, choice): it does not depend on
what was read before, nor on how many questions there are.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from data.chat import Row, prompt_hash
from data.errors import DataError
from data.few_shot import fill_fields
from data.fingerprint import unit_hash
from data.prompt_sets import QUESTION, make_row
from data.prompt_tables import Item, Table

CHOICES = "{choices}"
LETTERS = "ABCDEFGHIJ"


class ChoicePrompts:
    """A table of questions with a right and some wrong answers.

    A row's `question` is the question alone; `choices` has a line for each, "(A) TEXT"; `answer`
    is the letter of the right one.

    Args:
        name: of the set, the `source` of its rows.
        table: where the items come from.
        question, correct: columns.
        incorrect: columns of the wrong answers.
        template: the prompt of a conversation, with `{question}` and `{choices}`.
        identifier: a column that names an item; None: its number, from 0.
        keep: columns that become fields of the same name.
        seed: of the order of the choices.
        expected: rows of the complete set.

    Raises:
        DataError: the template lacks a place, an item lacks a column, or too many choices.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        question: str,
        correct: str,
        incorrect: Sequence[str],
        template: str,
        identifier: str | None = None,
        keep: Sequence[str] = (),
        seed: int = 0,
        expected: int | None = None,
    ) -> None:
        if QUESTION not in template or CHOICES not in template:
            raise DataError(f"template={template!r}: allowed: a text with {QUESTION} and {CHOICES}")
        if not 1 <= len(incorrect) < len(LETTERS):
            raise DataError(
                f"incorrect={list(incorrect)}: allowed: 1 to {len(LETTERS) - 1} columns"
            )
        self.name, self.table, self.question, self.correct = name, table, question, correct
        self.incorrect, self.template, self.identifier = list(incorrect), template, identifier
        self.keep, self.seed, self.expected = list(keep), seed, expected
        self.libraries = table.libraries

    def rows(self) -> Iterator[Row]:
        """Every item as a row."""
        for number, (place, item) in enumerate(self.table.items()):
            name = str(number) if self.identifier is None else _text(item, self.identifier, place)
            identifier = f"{self.name}/{name}"
            texts = [_text(item, column, place) for column in (self.correct, *self.incorrect)]
            order = self.order(identifier, len(texts))
            lines = [f"({LETTERS[n]}) {texts[choice]}" for n, choice in enumerate(order)]
            more: Row = {"choices": "\n".join(lines), "answer": LETTERS[order.index(0)]}
            more |= {column: _text(item, column, place) for column in self.keep}
            question = _text(item, self.question, place)
            row = make_row(identifier, self.name, question, QUESTION, more, place)
            row["messages"][0]["content"] = fill_fields(self.template, row, "template")
            yield row | {"prompt_hash": prompt_hash(row)}

    def order(self, identifier: str, count: int) -> list[int]:
        """The choices of a question as they are shown; 0 is the right one."""
        draws = [unit_hash(f"choices\n{self.seed}\n{identifier}\n{n}") for n in range(count)]
        return sorted(range(count), key=draws.__getitem__)

    def fingerprint(self) -> Any:
        """The table and everything that makes rows of it."""
        return {
            "name": self.name, "table": self.table.fingerprint(), "question": self.question,
            "correct": self.correct, "incorrect": self.incorrect, "template": self.template,
            "identifier": self.identifier, "keep": self.keep, "seed": self.seed,
        }  # fmt: skip


def _text(item: Item, column: str, place: str) -> str:
    value = item.get(column)
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{place}: no text in column {column!r}; there are {', '.join(item)}")
    return value.strip()
