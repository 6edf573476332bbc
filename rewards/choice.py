"""Multiple choice (GPQA, arXiv:2311.12022): which letter does a text choose?"""

import re
from typing import Any

from rewards.extraction import after_cue, boxed, first_line, last_line
from rewards.verdict import NO_ANSWER, Item, Verdict, needed

# "A catalyst", "I think": letters that are words, unless what follows begins a reason.
_A_WORD = r"[AI] (?!(?:because|since|as|for|by|due|which|but)\b)[a-z]"


class ChoiceGrader:
    """Compares letters.

    The letter is that of the last \\boxed{...}, or else the one behind the last "answer is" or
    "Answer:", or else one that is the whole last or first line ("B", "(B)"), or else the one that
    the first line begins with ("B) because ..."), or else the last one in parentheses.

    Args:
        letters: of the choices, capitals.

    Raises:
        ValueError: they are not different capitals.
    """

    def __init__(self, letters: str = "ABCD") -> None:
        if not re.fullmatch("[A-Z]{2,}", letters) or len({*letters}) < len(letters):
            raise ValueError(f"grader=choice: letters={letters!r}: allowed: different capitals")
        self.letters = letters
        letter = rf"(?!{_A_WORD})([{letters}])(?![\w'])"
        alone = rf"[*_\s]*(?:\\text\{{)?(?:\(([{letters}])\)|{letter})"
        self._begins = re.compile(alone)
        self._alone = re.compile(rf"[*_\s]*\(?([{letters}])\)?[*_.\s]*")
        self._first = re.compile(rf"([{letters}])[).:,]")
        self._parenthesised = re.compile(rf"\(([{letters}])\)")

    def grade(self, item: Item, text: str) -> Verdict:
        """Whether the letter is that of the item.

        Raises:
            ValueError: the item's answer is none of the letters.
        """
        gold, letter = self._right(item), self.read(text)
        return NO_ANSWER if letter is None else Verdict(letter == gold, letter)

    def check(self, item: Item) -> None:
        """Raise ValueError unless the item's answer is one of the letters."""
        self._right(item)

    def _right(self, item: Item) -> str:
        answer = needed(item, "answer", "choice")
        gold = self._alone.fullmatch(answer)
        if gold is None:
            raise ValueError(
                f"grader=choice: item {item.get('id')!r}: answer={answer!r}; allowed:"
                f" one of {', '.join(self.letters)}"
            )
        return gold[1]

    def read(self, text: str) -> str | None:
        """The letter that a text chooses; None: it does not say."""
        for part in (boxed(text), after_cue(text)):
            match = self._begins.match(part) if part else None
            if match:
                return match[1] or match[2]
        for line in (last_line(text), first_line(text)):
            match = self._alone.fullmatch(line)
            if match:
                return match[1]
        match = self._first.match(first_line(text))
        if match:
            return match[1]
        found = self._parenthesised.findall(text)
        return found[-1] if found else None

    def fingerprint(self) -> dict[str, Any]:
        """The letters."""
        return {"grader": "choice", "letters": self.letters}
