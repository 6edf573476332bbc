"""Prompt sets: benchmarks under the templates of their users, as rows of `data.chat`.

A row has the prompt that the target gets (`messages`), the bare `question` without the template,
the hash of the prompt, and what scoring needs. Of a set of two turns `messages` holds the first
and `turns` all of the user's, so that a runner can put the model's own reply between them.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from data.chat import Row, prompt_hash
from data.errors import DataError
from data.fingerprint import unit_hash
from data.manifest import ROWS, Manifest, Output, Plan, Tally, Tick, no_tick, perform
from data.prompt_tables import Item, Table

QUESTION = "{question}"
# Fields of a row that `keep` cannot fill.
RESERVED = ("id", "source", "messages", "prompt", "question", "turns", "prompt_hash")


class PromptSet(Protocol):
    """A set of prompts."""

    name: str
    expected: int | None  # rows of the complete set, if that is known
    libraries: tuple[str, ...]  # distributions that determine the rows

    def rows(self) -> Iterator[Row]:
        """The rows, in order, with ids that stay the same."""
        ...

    def fingerprint(self) -> Any:
        """Plain values that determine the rows."""
        ...


class TablePrompts:
    """A table of questions under a template.

    Args:
        name: of the set, the `source` of its rows.
        table: where the items come from.
        question: the column of the question: a text, or a list of the user's turns.
        template: the prompt, `{question}` standing for the question; of several turns, each.
        identifier: a column that names an item; None: its number, from 0.
        keep: fields of the row that are columns of the item, {FIELD: COLUMN}.
        turns: the user's turns to take, at most.
        expected: rows of the complete set.

    Raises:
        DataError: the template has no place for the question, or an item lacks a column.
    """

    def __init__(
        self,
        name: str,
        table: Table,
        question: str,
        template: str = QUESTION,
        identifier: str | None = None,
        keep: Mapping[str, str] | None = None,
        turns: int = 1,
        expected: int | None = None,
    ) -> None:
        if QUESTION not in template:
            raise DataError(f"prompts.template={template!r}: allowed: a text with {QUESTION}")
        if turns < 1:
            raise DataError(f"prompts.turns={turns}: allowed: an integer >= 1")
        for field in keep or {}:
            if field in RESERVED:
                raise DataError(f"prompts.keep.{field}: is a field of every row; allowed: others")
        self.name = name
        self.table = table
        self.question = question
        self.template = template
        self.identifier = identifier
        self.keep = dict(keep or {})
        self.turns = turns
        self.expected = expected
        self.libraries = table.libraries

    def rows(self) -> Iterator[Row]:
        """Every item as a row."""
        for number, (place, item) in enumerate(self.table.items()):
            name = str(number if self.identifier is None else _column(item, self.identifier, place))
            questions = _texts(_column(item, self.question, place), self.question, place)
            questions = questions[: self.turns]
            more: Row = {field: _column(item, column, place) for field, column in self.keep.items()}
            if len(questions) > 1:
                more["turns"] = [fill(self.template, text) for text in questions]
            yield make_row(
                f"{self.name}/{name}", self.name, questions[0], self.template, more, place
            )

    def fingerprint(self) -> Any:
        """The table and everything that makes rows of it."""
        return {
            "name": self.name, "table": self.table.fingerprint(), "question": self.question,
            "template": self.template, "identifier": self.identifier, "keep": self.keep,
            "turns": self.turns,
        }  # fmt: skip


def fill(template: str, question: str) -> str:
    """The template with the question in its place; other braces are text."""
    return template.replace(QUESTION, question)


def make_row(
    identifier: str, source: str, question: str, template: str, more: Row, place: str
) -> Row:
    """A row of a prompt set.

    Raises:
        DataError: a field is no JSON, by place.
    """
    prompt = fill(template, question)
    row: Row = {
        "id": identifier,
        "source": source,
        "messages": [{"role": "user", "content": prompt}],
        "question": question,
    }
    try:
        json.dumps(more)
    except (TypeError, ValueError) as error:
        raise DataError(f"{place}: a field is no JSON ({error})") from error
    row |= more
    return row | {"prompt_hash": prompt_hash(row)}


def write_prompts(
    folder: Path, prompts: PromptSet, limit: int | None, seed: int, tick: Tick = no_tick
) -> Manifest:
    """Write a set as `rows.jsonl`.

    Args:
        folder: where it goes.
        prompts: the set.
        limit: rows to draw, by a hash of (seed, id) and in the order of the set; None: all.
        seed: of the draw.
        tick: told of every row written.

    Raises:
        DataError: two rows have one id, or there are none.
    """
    draw = None if limit is None else {"limit": limit, "seed": seed}
    options = {"set": prompts.fingerprint(), "draw": draw}
    plan = Plan("prompts", folder, (ROWS,), {}, options, libraries=prompts.libraries)

    def work(files: dict[str, Output]) -> Manifest:
        """Write the rows that were drawn."""
        rows = list(prompts.rows())
        _check_ids(rows, prompts.name)
        drawn = _drawn(rows, limit, seed)
        tally = Tally()
        for row in rows:
            if row["id"] not in drawn:
                tally.remove(row["source"], "not_drawn")
                continue
            tally.keep(row["source"])
            files[ROWS].write_row(row)
            tick(1)
        hashes = {row["prompt_hash"] for row in rows if row["id"] in drawn}
        facts = {"expected": prompts.expected, "found": len(rows), "distinct": len(hashes)}
        return {"rows": tally.as_dict(), "prompts": facts}

    return perform(plan, work)


def _drawn(rows: Sequence[Row], limit: int | None, seed: int) -> set[str]:
    names = [row["id"] for row in rows]
    if limit is None:
        return set(names)
    return set(sorted(names, key=lambda name: unit_hash(f"prompts\n{seed}\n{name}"))[:limit])


def _check_ids(rows: Sequence[Row], name: str) -> None:
    if not rows:
        raise DataError(f"prompts={name}: no rows there")
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise DataError(
                f"prompts={name}: two items are called {row['id']!r};"
                " allowed: prompts.identifier=null, or a column with a name for each"
            )
        seen.add(row["id"])


def _column(item: Item, column: str, place: str) -> Any:
    if column not in item:
        raise DataError(f"{place}: no column {column!r}; there are {', '.join(map(str, item))}")
    return item[column]


def _texts(value: Any, column: str, place: str) -> list[str]:
    """The user's turns."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise DataError(f"{place}: column {column!r} must be a text or a list of texts")
    return texts
