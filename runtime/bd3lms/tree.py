"""A pickled omegaconf configuration as plain dicts, without omegaconf.

References between keys (`${a.b}`, `${.b}`) are followed. Resolvers (`${eval:...}`, `${cwd:}`) are
functions of the program that wrote the file: what they would give stays unknown, their text stays.
"""

import re
from typing import Any

from runtime.bd3lms.records import DICT_CONFIG, LIST_CONFIG, NODES, PATHS, is_record

_MISSING = object()
# Possessive: a text that is almost a reference must not be tried again from every place in it.
_REFERENCE = re.compile(r"\$\{\s*+([\w.]++)\s*+\}")
# A real configuration has some 200 values, six deep. A file may be made to have billions, by values
# that refer to one another.
_MAX_DEPTH, _MAX_VALUES, _MAX_TEXT = 50, 20_000, 100_000


def plain_tree(record: Any) -> Any:
    """Nested dicts, lists and scalars of a recorded configuration; interpolations stay text.

    Raises:
        ValueError: something else is in it, or too much of it.
    """
    return _Plain().convert(record, 0)


def resolve(tree: dict[str, Any]) -> dict[str, Any]:
    """The same with every reference to another key followed; what leads nowhere stays text.

    Raises:
        ValueError: the references unfold into too much.
    """
    return _References(tree).resolve(tree, (), frozenset())


def is_known(value: Any) -> bool:
    """Whether a value is not the text of an interpolation, nor a mark that it is missing."""
    return not (isinstance(value, str) and ("${" in value or value == "???"))


class _Counter:
    def __init__(self) -> None:
        self._values = 0

    def count(self, depth: int) -> None:
        self._values += 1
        if depth > _MAX_DEPTH or self._values > _MAX_VALUES:
            raise ValueError(f"more than {_MAX_VALUES} values, or nested over {_MAX_DEPTH} deep")


class _Plain(_Counter):
    def convert(self, value: Any, depth: int) -> Any:
        """Plain Python for a stand-in and all that hangs on it."""
        self.count(depth)
        if is_record(value, *NODES):
            return self.convert(value.get("_val"), depth + 1)
        if is_record(value, DICT_CONFIG, LIST_CONFIG):
            return self.convert(value.get("_content"), depth + 1)
        if is_record(value, *PATHS):
            return "/".join(map(_name, value.args)).replace("//", "/")
        if isinstance(value, dict):
            return {_name(key): self.convert(item, depth + 1) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.convert(item, depth + 1) for item in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise ValueError(f"holds {getattr(value, 'name', '') or type(value).__name__}")


def _name(value: Any) -> str:
    """A key, or a part of a path, as text.

    Raises:
        ValueError: an object, whose text may be far longer than the file.
    """
    if not isinstance(value, str | int | float | None):
        raise ValueError(f"a key is a {type(value).__name__}; allowed: texts and numbers")
    return str(value)


class _References(_Counter):
    def __init__(self, root: dict[str, Any]) -> None:
        super().__init__()
        self._root = root
        self._substituted = 0

    def resolve(self, value: Any, path: tuple[str, ...], busy: frozenset) -> Any:
        """`value`, which stands at `path`; `busy` are the places whose references led here."""
        self.count(len(path) + len(busy))
        if isinstance(value, dict):
            return {key: self.resolve(item, (*path, key), busy) for key, item in value.items()}
        if isinstance(value, list):
            return [self.resolve(x, (*path, str(n)), busy) for n, x in enumerate(value)]
        if not isinstance(value, str):
            return value
        if len(value) > _MAX_TEXT:
            raise ValueError(f"a text of more than {_MAX_TEXT} characters")
        whole = _REFERENCE.fullmatch(value)
        if whole is not None:
            found = self._follow(whole.group(1), path, busy)
            return value if found is _MISSING else found
        return _REFERENCE.sub(lambda match: self._text(match, path, busy), value)

    def _text(self, match: re.Match, path: tuple[str, ...], busy: frozenset) -> str:
        found = self._follow(match.group(1), path, busy)
        is_text = isinstance(found, str | int | float | bool)
        text = str(found) if is_text else match.group(0)
        # Counted over the whole tree, before the pieces are joined.
        self._substituted += len(text)
        if self._substituted > _MAX_TEXT:
            raise ValueError(f"references to texts of more than {_MAX_TEXT} characters in all")
        return text

    def _follow(self, reference: str, path: tuple[str, ...], busy: frozenset) -> Any:
        """What a reference leads to; a dot in front is its own section, two the one above."""
        name = reference.lstrip(".")
        dots = len(reference) - len(name)
        if dots > len(path):
            return _MISSING
        target = (*(path[: len(path) - dots] if dots else ()), *name.split("."))
        if target in busy:
            return _MISSING
        node: Any = self._root
        for part in target:
            if not isinstance(node, dict) or part not in node:
                return _MISSING
            node = node[part]
        return self.resolve(node, target, busy | {target})
