"""Few-shot prompts: solved exemplars, then the item, as one text or as a conversation.

A text is what a base model goes on with: exemplars under a template with their answers, and the
item under the same template without one. A conversation is for a chat model: the prompts of the
set, an exemplar's answer being the assistant's turn.
"""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from data.chat import Message, Row, messages_of, normalised
from data.errors import DataError
from data.prompt_sets import QUESTION, PromptSet

TEXT, CHAT = "text", "chat"
FORMATS = (TEXT, CHAT)
_FIELD = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True)
class Prompt:
    """What a model is asked about an item.

    Attributes:
        row: the item; its `id` names it.
        text: to go on with; None where it is a conversation.
        messages: to answer; None where it is a text.
    """

    row: Row
    text: str | None = None
    messages: Sequence[Message] | None = None

    @property
    def id(self) -> str:
        """Of the item."""
        return self.row["id"]

    @property
    def hash(self) -> str:
        """32 hexadecimal digits of the exact text or turns; unlike `data.chat.prompt_hash`, which
        takes forms of one question for the same."""
        asked = {"text": self.text} if self.messages is None else {"messages": self.messages}
        canonical = json.dumps(asked, sort_keys=True, ensure_ascii=True)
        return hashlib.blake2b(canonical.encode(), digest_size=16).hexdigest()


class FewShot:
    """Items of a prompt set with solved exemplars before them.

    Args:
        key: of the configuration, for messages: `benchmark.gsm8k`.
        items: what is asked.
        exemplars: what comes first; None takes the first `shots` items, which are then not asked.
        shots: exemplars before every item.
        format: text | chat.
        template: of the text; `{question}`, `{choices}`, ... stand for fields of a row.
        answer: what an exemplar's template is followed by, white space included.
        separator: stands between exemplars in a text.
        instruction: what a text begins with; of a conversation the system's turn. May be empty.
        alike: a field; an item's exemplars are then the first with its value there.

    Raises:
        DataError: an option of another type or outside its range.
    """

    def __init__(
        self,
        key: str,
        items: PromptSet,
        exemplars: PromptSet | None = None,
        shots: int = 0,
        format: str = TEXT,
        template: str = QUESTION,
        answer: str = "{answer}",
        separator: str = "\n\n",
        instruction: str = "",
        alike: str | None = None,
    ) -> None:
        if format not in FORMATS:
            raise DataError(f"{key}.format={format}: allowed: {', '.join(FORMATS)}")
        require_integer(f"{key}.shots", shots, 0)
        texts = {"template": template, "answer": answer, "separator": separator,
                 "instruction": instruction, "alike": "" if alike is None else alike}  # fmt: skip
        for option, text in texts.items():
            if not isinstance(text, str):
                raise DataError(f"{key}.{option}={text}: allowed: a text")
        if QUESTION not in template:
            raise DataError(f"{key}.template={template!r}: allowed: a text with {QUESTION}")
        if alike is not None and exemplars is None:
            raise DataError(f"{key}.alike={alike}: needs {key}.exemplars; allowed: null")
        self.key, self.items, self.exemplars, self.shots = key, items, exemplars, shots
        self.format, self.template, self.answer = format, template, answer
        self.separator, self.instruction, self.alike = separator, instruction, alike

    @property
    def expected(self) -> int | None:
        """Prompts of the complete set, if that is known."""
        if self.items.expected is None:
            return None
        return self.items.expected - (self.shots if self.exemplars is None else 0)

    def prompts(self) -> list[Prompt]:
        """Every item, in order.

        Raises:
            DataError: no items or two of one id, too few exemplars, an exemplar that is an item,
                or a field that a row lacks.
        """
        rows = list(self.items.rows())
        shown, rows = self._exemplars(rows)
        if not rows:
            raise DataError(f"{self.key}.prompts: no items are left to ask")
        self._check(rows, [row for group in shown.values() for row in group])
        return [self._prompt(row, shown) for row in rows]

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that determine the prompts."""
        exemplars = None if self.exemplars is None else self.exemplars.fingerprint()
        return {
            "items": self.items.fingerprint(), "exemplars": exemplars, "shots": self.shots,
            "format": self.format, "template": self.template, "answer": self.answer,
            "separator": self.separator, "instruction": self.instruction, "alike": self.alike,
        }  # fmt: skip

    def _exemplars(self, rows: list[Row]) -> tuple[dict[Any, list[Row]], list[Row]]:
        """Exemplars by kind (`_kind`), and the rows that are asked."""
        if self.exemplars is None:
            first = {None: rows[: self.shots]}
            self._require(first, "prompts")
            return first, rows[self.shots :]
        shown: dict[Any, list[Row]] = {self._kind(row): [] for row in rows}
        # A table may be long; without kinds, only its beginning is read.
        candidates = self.exemplars.rows() if self.shots else iter(())
        for row in candidates if self.alike else islice(candidates, self.shots):
            group = shown.get(self._kind(row))
            if group is not None and len(group) < self.shots:
                group.append(row)
        self._require(shown, "exemplars")
        return shown, rows

    def _kind(self, row: Row) -> Any:
        """What an item and its exemplars have in common; None where they need nothing."""
        if self.alike is None:
            return None
        if self.alike not in row:
            raise DataError(f"{self.key}.alike={self.alike}: no field of row {row['id']!r}")
        return row[self.alike]

    def _require(self, shown: Mapping[Any, Sequence[Row]], where: str) -> None:
        for kind, rows in shown.items():
            if len(rows) < self.shots:
                of_kind = "" if self.alike is None else f" of {self.alike}={kind}"
                raise DataError(
                    f"{self.key}.shots={self.shots}: {len(rows)} rows{of_kind} in"
                    f" {self.key}.{where}; allowed: 0 to {len(rows)}"
                )

    def _check(self, rows: Sequence[Row], shown: Sequence[Row]) -> None:
        """An item is asked once, and never shown solved."""
        ids: set[str] = set()
        for row in rows:
            if row["id"] in ids:
                raise DataError(f"{self.key}.prompts: two items are called {row['id']!r}")
            ids.add(row["id"])
        questions = {normalised(row["question"]): row["id"] for row in shown}
        names = {row["id"] for row in shown}
        for row in rows:
            same = questions.get(normalised(row["question"]))
            if same is not None or row["id"] in names:
                raise DataError(
                    f"{self.key}.exemplars: {same or row['id']} is item {row['id']} itself;"
                    " allowed: exemplars that are not asked (and have a name of their own)"
                )

    def _prompt(self, row: Row, shown: Mapping[Any, Sequence[Row]]) -> Prompt:
        exemplars = shown[self._kind(row)]
        if self.format == CHAT:
            return Prompt(row, messages=self._turns(row, exemplars))
        parts = [self._fill(self.template + self.answer, one) for one in exemplars]
        parts.append(self._fill(self.template, row))
        return Prompt(row, text=self.instruction + self.separator.join(parts))

    def _turns(self, row: Row, exemplars: Sequence[Row]) -> list[Message]:
        turns = [{"role": "system", "content": self.instruction}] if self.instruction else []
        for one in exemplars:
            answer = self._fill(self.answer, one).strip()
            turns += [*messages_of(one), {"role": "assistant", "content": answer}]
        return [*turns, *messages_of(row)]

    def _fill(self, template: str, row: Row) -> str:
        return fill_fields(template, row, f"{self.key}.template")


def require_integer(key: str, value: Any, low: int) -> None:
    """Raise DataError unless the value of a key is an integer of at least `low`; a bool is none."""
    if not isinstance(value, int) or isinstance(value, bool) or value < low:
        raise DataError(f"{key}={value}: allowed: an integer >= {low}")


def fill_fields(template: str, row: Mapping[str, Any], key: str) -> str:
    """The template with a row's fields in the place of their names in braces.

    What a field says is not looked at again, so braces in it are text.

    Raises:
        DataError: a name in braces that is no field; `key` is the option.
    """

    def field(found: re.Match[str]) -> str:
        """The value of one."""
        if found[1] not in row:
            raise DataError(
                f"{key}={template!r}: row {row.get('id')!r} has no field {found[1]!r}; there are"
                f" {', '.join(row)}"
            )
        return str(row[found[1]])

    return _FIELD.sub(field, template)
