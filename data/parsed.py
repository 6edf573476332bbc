"""A source whose words carry the depths that a parser has found (`mode=parse_depth`)."""

from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

from data.errors import DataError
from data.fingerprint import fingerprint
from data.parse_store import ParseStore, Part
from data.source import Document, Source, require_split


class ParsedSource:
    """The documents of a source, joined with their parse by number and hash of the text.

    Args:
        source: where the texts come from.
        store: where their parse is kept.
        command: says what makes the parse; called where it is missing.
    """

    def __init__(self, source: Source, store: ParseStore, command: Callable[[], str]) -> None:
        self.source = source
        self.store = store
        self.command = command
        self.name = source.name

    @property
    def splits(self) -> tuple[str, ...]:
        """Those of the source, whether they have been parsed or not."""
        return self.source.splits

    def documents(self, split: str) -> Iterator[Document]:
        """The texts of the split with `spans` and `features` of their words.

        Raises:
            DataError: the parse is missing, incomplete, damaged or of another text.
        """
        require_split(self, split)
        index = self._index(split)
        part: Part | None = None
        count = 0
        for count, document in enumerate(self.source.documents(split), start=1):
            number, place = divmod(count - 1, self.store.documents_per_part)
            if place == 0:
                part = self._open(split, number, index)
            assert part is not None, "document 0 opens the first part"
            try:
                found = part.document(place, document["text"])
            except DataError as error:
                raise DataError(f"document {count - 1} of {split}: {error}") from error
            yield found.document(document["text"])
        if count != index["documents"]:
            raise DataError(
                f"{self.store.index_path(split)}: {index['documents']} documents were parsed, the"
                f" data has {count}; delete the folder and run: {self.command()}"
            )

    def fingerprint(self) -> str:
        """Identity of texts and parse: what was parsed, by which models, and the training split.

        Raises:
            DataError: nothing has been parsed.
        """
        return self._fingerprint

    @cached_property
    def _fingerprint(self) -> str:
        indices = {split: self.store.read_index(split) for split in self.splits}
        parsers = {fingerprint(index["parser"]) for index in indices.values() if index}
        if not parsers:
            raise self._missing(self.splits[0])
        if len(parsers) > 1:
            raise DataError(
                f"{self.store.folder}: its splits were parsed by different models; delete the"
                f" folder and run: {self.command()}"
            )
        # Not the other splits: parsing one more must not make a run unable to resume.
        train = indices.get("train")
        return fingerprint([self.store.key, *parsers, train["checksum"] if train else None])

    def _index(self, split: str) -> dict[str, Any]:
        index = self.store.read_index(split)
        if index is None:
            raise self._missing(split)
        return index

    def _missing(self, split: str) -> DataError:
        folder = self.store.index_path(split).parent
        parts = len(list(folder.glob("part-*.arrow")))
        state = f"has {parts} parts but is not complete" if parts else "is missing"
        return DataError(
            f"the parse of {split} of {self.name!r} {state} ({folder}); run: {self.command()}"
        )

    def _open(self, split: str, number: int, index: dict[str, Any]) -> Part:
        path = self.store.part_path(split, number)
        if number >= index["parts"]:
            raise DataError(
                f"{self.store.index_path(split)}: {index['documents']} documents were parsed, the"
                f" data has more; delete the folder and run: {self.command()}"
            )
        if not path.is_file():
            raise DataError(f"{path}: missing; run: {self.command()}")
        return Part(path, self.store.part_key(split, number, index["parser"]))
