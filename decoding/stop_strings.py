"""Where an answer ends by what it says: before the first of some strings in its text."""

from collections.abc import Sequence
from typing import Any

# Bytes of a character that may stand before the window, so that the window begins in its middle.
_SPLIT_CHARACTER = 3


def cut_before(text: str, strings: Sequence[str]) -> str:
    """The text up to the first place at which one of the strings begins; all of it without one."""
    places = [place for place in map(text.find, strings) if place >= 0]
    return text[: min(places)] if places else text


class StopStrings:
    """Looks for strings in answers that grow token by token.

    Only the end is decoded every time: a token of text has at least one byte, so a string of n
    bytes that ends with the newest token begins within the last n tokens. What is found there is
    looked up in the whole, because a tokenizer may decode a piece otherwise. (A special token in
    the middle of a string decodes to nothing and may hide it; `cut_before` still cuts there.)

    Args:
        strings: the texts that end an answer; none is fine.
        tokenizer: of the answers.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any) -> None:
        self.strings, self._tokenizer = tuple(strings), tokenizer
        lengths = [len(text.encode("utf-8", "surrogatepass")) for text in self.strings]
        self._window = max(lengths, default=0) + 1 + _SPLIT_CHARACTER

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens), skip_special_tokens=True))

    def reached(self, tokens: Sequence[int]) -> bool:
        """Whether an answer that had none of the strings before its last token has one now."""
        if not self.strings or not self._has_one(tokens[-self._window :]):
            return False
        return len(tokens) <= self._window or self._has_one(tokens)

    def finish(self, tokens: Sequence[int], finish: str) -> tuple[str, str]:
        """The text of a finished answer and why it ended: "stop" if one of the strings is there."""
        whole = self.decode(tokens)
        text = cut_before(whole, self.strings)
        return text, finish if text == whole else "stop"

    def _has_one(self, tokens: Sequence[int]) -> bool:
        text = self.decode(tokens)
        return any(string in text for string in self.strings)
