"""Gold dependency trees from CoNLL-U files: sentences whose words know how deep they hang.

A word of the text is a surface token. One that CoNLL-U splits (line 1-2: `don't` = `do` + `n't`)
gets the smallest depth among its parts; empty nodes (8.1) stand in no text and are left out.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple

from data.depth import DEPTH, HEIGHT, depths_from_heads, tree_features
from data.errors import DataError
from data.files import FileSource, read_lines
from data.source import Document

if TYPE_CHECKING:
    from conllu import TokenList

_SPACE = re.compile(r"\s*")


class Surface(NamedTuple):
    """A word of the text and its parts, which are numbered from 1."""

    form: str
    first: int
    last: int
    space_after: bool


class Treebank(FileSource):
    """One document per sentence of CoNLL-U files: `text`; `spans` and `features` of its words.

    `heads`, one per part of a word, count from 1; the root's head is 0.

    Args:
        files, valid_files, valid_fraction: see `data.files.FileSource`; .conllu, plain or .gz.

    Raises:
        DataError: a file is missing, empty or of unknown type, or a sentence is no tree or does
            not fit its text; `conllu` is not installed.
    """

    name = "conllu"
    types = (".conllu", ".conll")

    def read(self, path: Path) -> Iterator[Document]:
        """The sentences of one file."""
        return read_trees(path)


def read_trees(path: Path) -> Iterator[Document]:
    """The sentences of one file.

    Raises:
        DataError: a sentence that is no tree or does not fit its text, by file and line.
    """
    conllu = _import_conllu()
    for line, block in sentence_blocks(path):
        place = f"{path}:{line}"
        try:
            tokens = conllu.parser.parse_token_and_metadata(block)
        except conllu.exceptions.ParseException as error:
            raise DataError(f"{place}: no CoNLL-U sentence ({error})") from error
        try:
            yield _document(tokens)
        except ValueError as error:
            name = tokens.metadata.get("sent_id")
            raise DataError(f"{place}: sentence {name or 'without sent_id'}: {error}") from error


def sentence_blocks(path: Path) -> Iterator[tuple[int, str]]:
    """Lines between blank lines, with the number of the first one."""
    lines: list[str] = []
    first = 1
    for number, line in enumerate(read_lines(path), start=1):
        if line.strip():
            lines.append(line)
            continue
        if lines:
            yield first, "".join(lines)
        lines, first = [], number + 1
    if lines:
        yield first, "".join(lines)


def _document(tokens: "TokenList") -> Document:
    heads = _heads(tokens)
    depths = depths_from_heads(heads)
    words = _surface_words(tokens, len(heads))
    text = tokens.metadata.get("text") or _joined(words)
    parts = tree_features(depths)
    features = {
        DEPTH: [min(parts[DEPTH][word.first - 1 : word.last]) for word in words],
        HEIGHT: parts[HEIGHT][: len(words)],
    }
    return {"text": text, "spans": _spans(text, words), "features": features, "heads": heads}


def _heads(tokens: "TokenList") -> list[int]:
    heads: list[int] = []
    for token in tokens:
        if token["id"] is None:
            raise ValueError(f"the line of {token['form']!r} has no number")
        if not isinstance(token["id"], int):
            continue
        if token["id"] != len(heads) + 1:
            raise ValueError(f"word {token['id']} stands where {len(heads) + 1} should be")
        if token.get("head") is None:
            raise ValueError(f"word {token['id']} has no head")
        heads.append(token["head"])
    if not heads:
        raise ValueError("it has no words")
    return heads


def _surface_words(tokens: "TokenList", count: int) -> list[Surface]:
    """The words as the text spells them; the parts of a split one are inside it."""
    words: list[Surface] = []
    for token in tokens:
        number = token["id"]
        if isinstance(number, int):
            first = last = number
        elif isinstance(number, tuple) and number[1] == "-":
            first, last = number[0], number[2]
        else:
            continue
        covered = words[-1].last if words else 0
        if isinstance(number, int) and number <= covered:
            continue
        if first != covered + 1 or last > count:
            raise ValueError(f"the word {first}-{last} does not fit the {count} words")
        space = (token.get("misc") or {}).get("SpaceAfter") != "No"
        words.append(Surface(token["form"], first, last, space))
    return words


def _joined(words: Sequence[Surface]) -> str:
    return "".join(word.form + " " * word.space_after for word in words).rstrip()


def _spans(text: str, words: Sequence[Surface]) -> list[tuple[int, int]]:
    """Where the words stand; between them there may be nothing but white space."""
    spans = []
    place = 0
    for word in words:
        place = _after_space(text, place)
        if not text.startswith(word.form, place):
            found = text[place : place + len(word.form)]
            raise ValueError(
                f"word {word.first} is {word.form!r}, its text has {found!r} at character {place}"
            )
        spans.append((place, place + len(word.form)))
        place = spans[-1][1]
    rest = text[_after_space(text, place) :]
    if rest:
        raise ValueError(f"its text goes on after the last word: {rest!r}")
    return spans


def _after_space(text: str, place: int) -> int:
    match = _SPACE.match(text, place)
    assert match is not None, "the pattern matches the empty text"
    return match.end()


def _import_conllu() -> ModuleType:
    try:
        import conllu
    except ImportError as error:
        raise DataError("this data needs the library `conllu`: pip install conllu") from error
    return conllu
