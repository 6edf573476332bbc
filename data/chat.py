"""Conversations as rows of JSON lines: the prompts of a target, and its answers.

A prompt is `{"id", "source", "messages": [{"role", "content"}, ...]}`, or `"prompt": TEXT` for a
single turn of the user. An answered row has `response` besides, and where the answer was generated
`response_ids`, the very tokens, and `finish` ("stop" or "length"): text that is tokenized again may
come out in other tokens than those that the model wrote. Whatever else a row carries is kept.
"""

import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data.errors import DataError
from data.files import FileSource, read_objects
from data.source import Document

ROLES = ("system", "user", "assistant", "tool")
Row = dict[str, Any]
Message = dict[str, str]

_SPACE = re.compile(r"\s+")
_SURROGATE = re.compile("[\ud800-\udfff]")


class ChatFiles(FileSource):
    """Answered conversations from .jsonl files, as `data.chat_encoding.ChatEncoder` reads them.

    The side of the split depends on the prompt alone: answers to the same prompt are together.

    Args:
        files, valid_files, valid_fraction: see `data.files.FileSource`.
    """

    name = "chat"
    types = (".jsonl",)

    def read(self, path: Path) -> Iterator[Document]:
        """The rows of one file; `text` is what tells prompts apart."""
        for row in read_chat(path, answered=True):
            yield {**row, "text": prompt_key(row), "messages": messages_of(row)}


def read_chat(path: Path, answered: bool = False) -> Iterator[Row]:
    """The rows of a .jsonl or .jsonl.gz file, checked, in order; blank lines are no rows.

    Args:
        path: the file.
        answered: whether every row must have a response.

    Raises:
        DataError: what is wrong, by file and line.
    """
    for _, row in read_placed(path, answered):
        yield row


def read_placed(path: Path, answered: bool = False) -> Iterator[tuple[str, Row]]:
    """As `read_chat`, every row after the place it stands at, `FILE:LINE`."""
    for place, row in read_objects(path):
        check_row(row, place, answered)
        yield place, row


def check_row(row: Row, place: str, answered: bool = False) -> None:
    """Raise DataError, naming `place`, unless `row` is a prompt (or an answered one)."""
    for key in ("id", "source"):
        if not (isinstance(row.get(key), str) and row[key]):
            raise DataError(f"{place}: no text under {key!r} (keys: {', '.join(row)})")
    if ("messages" in row) == ("prompt" in row):
        raise DataError(f"{place}: row {row['id']!r} needs either 'messages' or 'prompt'")
    if "prompt" in row and not isinstance(row["prompt"], str):
        raise DataError(f"{place}: 'prompt' of row {row['id']!r} is no text")
    if "messages" in row:
        _check_messages(row["messages"], f"{place}: row {row['id']!r}")
    if answered and not isinstance(row.get("response"), str):
        raise DataError(f"{place}: row {row['id']!r} has no 'response'")
    ids = row.get("response_ids")
    if ids is not None and not (isinstance(ids, list) and all(map(_is_token, ids))):
        raise DataError(f"{place}: 'response_ids' of row {row['id']!r} must be token ids")


def _is_token(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _check_messages(messages: Any, place: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise DataError(f"{place}: 'messages' must be a list of turns")
    for turn, message in enumerate(messages):
        well_formed = isinstance(message, dict) and isinstance(message.get("content"), str)
        if not well_formed or message.get("role") not in ROLES:
            raise DataError(
                f"{place}: turn {turn} needs a 'content' and a 'role' of {', '.join(ROLES)}"
            )
    if messages[-1]["role"] == "assistant":
        raise DataError(f"{place}: its last turn is the assistant's; allowed: a turn to answer")


def messages_of(row: Row) -> list[Message]:
    """The turns that the target answers."""
    if "messages" in row:
        return row["messages"]
    return [{"role": "user", "content": row["prompt"]}]


def prompt_key(row: Row) -> str:
    """The user's turns as one text without case, spacing or forms of characters: what is compared
    to tell whether two prompts are the same."""
    turns = [turn["content"] for turn in messages_of(row) if turn["role"] == "user"]
    return normalised("\n".join(turns))


def normalised(text: str) -> str:
    """Compatibility forms folded, lower case, runs of white space one space."""
    return _SPACE.sub(" ", unicodedata.normalize("NFKC", text).lower()).strip()


def prompt_hash(row: Row) -> str:
    """32 hexadecimal digits that identify a prompt, by `prompt_key`."""
    key = prompt_key(row).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(key, digest_size=16).hexdigest()


def to_line(row: Row) -> str:
    """A row as a line of the file; half a surrogate pair, which UTF-8 cannot spell, is escaped."""
    line = json.dumps(row, ensure_ascii=False)
    # Only one of the escapes \ud800 .. \udfff can bring such a character into a row.
    if not _SURROGATE.search(line):
        return line + "\n"
    return json.dumps(row, ensure_ascii=True) + "\n"
