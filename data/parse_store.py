"""Where the parse of a data set is kept: one Arrow file per part of a split, and an index.

    FOLDER/NAME-HASH/SPLIT/part-00000.arrow ... index.json

NAME-HASH says what was parsed and how, so that other texts or options get another folder. A part
holds `documents_per_part` documents: for each the hash of its text, a status, the places of its
words, and their depth and height (`data.depth`). Parts carry a checksum, appear at once or not at
all, and hold nothing that depends on when, where or in which order they were made. The index
closes a split: it is written when the last part is there.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from data.depth import DEPTH, HEIGHT
from data.errors import DataError
from data.fingerprint import files_fingerprint, fingerprint
from data.seal import is_intact, seal
from data.source import Document
from data.storage import atomic_file, exclusive

_FORMAT = "palimpsest.parse.1"
_SETTING = "data.parse.folder"
# What became of a document. `too_long`: at least one of its sentences was too long to be parsed.
PARSED, EMPTY, FAILED, TOO_LONG = STATUSES = ("parsed", "empty", "failed", "too_long")
UNPARSED = -1  # depth and height of a word whose sentence was not parsed

_SCHEMA = pa.schema(
    {
        "text_hash": pa.uint64(),
        "status": pa.uint8(),
        "sentences": pa.int32(),
        "start": pa.list_(pa.int32()),
        "end": pa.list_(pa.int32()),
        "depth": pa.list_(pa.int8()),
        "height": pa.list_(pa.int8()),
        "error": pa.string(),
    }
)
_LISTS = ("start", "end", "depth", "height")


@dataclass
class ParsedDocument:
    """The words of a document: places in its text, depth, and height of their sentence's tree.

    Attributes:
        status: one of `STATUSES`.
        sentences: how many there are, parsed or not.
        error: of a document that failed, what the parser said, in one line.
    """

    status: str
    sentences: int
    start: Sequence[int]
    end: Sequence[int]
    depth: Sequence[int]
    height: Sequence[int]
    error: str | None = None

    def document(self, text: str) -> Document:
        """The text with the words that were found in it, as a source gives it."""
        spans = list(zip(self.start, self.end, strict=True))
        features = {DEPTH: self.depth, HEIGHT: self.height}
        return {"text": text, "spans": spans, "features": features}


class Parser(Protocol):
    """Anything that finds words and trees in texts (`data.stanza_parser`)."""

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU does the work, which several processes would only share."""
        ...

    def options(self) -> dict[str, Any]:
        """What decides on the result, as far as the configuration says it."""
        ...

    def identity(self) -> dict[str, Any]:
        """What decides on the result besides: versions, hashes of model files."""
        ...

    def parse(self, texts: Sequence[str]) -> list[ParsedDocument]:
        """The words of every text; the same for the same texts in the same order."""
        ...


class ParseStore:
    """The folder of one source parsed with one set of options.

    Args:
        root: folder of all such folders.
        name: short name of the source.
        content: fingerprint of the source.
        options: of the parser.
        documents_per_part: documents in one file.
    """

    def __init__(
        self,
        root: str | Path,
        name: str,
        content: str,
        options: Mapping[str, Any],
        documents_per_part: int,
    ) -> None:
        self.key = {
            "content": content,
            "options": dict(options),
            "documents_per_part": documents_per_part,
        }
        self.documents_per_part = documents_per_part
        self.folder = Path(root).expanduser() / f"{name}-{fingerprint(self.key)}"

    def part_path(self, split: str, number: int) -> Path:
        """The file of a part, whether it exists or not."""
        return self.folder / split / f"part-{number:05}.arrow"

    def index_path(self, split: str) -> Path:
        """The file that closes a split."""
        return self.folder / split / "index.json"

    def part_key(self, split: str, number: int, identity: Mapping[str, Any]) -> dict[str, Any]:
        """What a part holds."""
        return {**self.key, "split": split, "part": number, "parser": dict(identity)}

    def write_index(self, split: str, documents: int, identity: Mapping[str, Any]) -> None:
        """Close a split all of whose parts exist."""
        count = -(-documents // self.documents_per_part)
        paths = [self.part_path(split, number) for number in range(count)]
        content = {
            "format": _FORMAT,
            **self.key,
            "split": split,
            "documents": documents,
            "parts": count,
            "parser": dict(identity),
            "checksum": files_fingerprint(paths),
        }
        path = self.index_path(split)
        with exclusive(path, _SETTING), atomic_file(path, _SETTING) as file:
            file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())

    def read_index(self, split: str) -> dict[str, Any] | None:
        """What `write_index` wrote; None where the split is not finished.

        Raises:
            DataError: the file is damaged or foreign.
        """
        path = self.index_path(split)
        if not path.is_file():
            return None
        try:
            index = json.loads(path.read_text())
            same = index["format"] == _FORMAT and {key: index[key] for key in self.key} == self.key
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error}); delete it and run again") from error
        if not same:
            raise DataError(f"{path}: not the index of this data; delete it and run again")
        return index


def text_hash(text: str) -> int:
    """64 bits that identify a text."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big")


def write_part(
    path: Path,
    key: Mapping[str, Any],
    texts: Sequence[str],
    documents: Sequence[ParsedDocument],
) -> None:
    """Write a part; the same arguments give the same bytes.

    Raises:
        DataError: the file cannot be written.
    """
    rows = {
        "text_hash": [text_hash(text) for text in texts],
        "status": [STATUSES.index(document.status) for document in documents],
        **{
            name: [getattr(document, name) for document in documents]
            for name in ("sentences", *_LISTS, "error")
        },
    }
    metadata = {"format": _FORMAT, "key": json.dumps(dict(key), sort_keys=True)}
    schema = _SCHEMA.with_metadata(metadata)
    batch = pa.record_batch([pa.array(rows[f.name], f.type) for f in _SCHEMA], schema=schema)
    # One lock per folder: writing takes no time beside parsing, and there may be many parts.
    lock = path.with_name("parts")
    with exclusive(lock, _SETTING), atomic_file(path, _SETTING) as file:
        with pa.ipc.new_file(file, schema) as writer:
            writer.write_batch(batch)
        seal(file)


class Part:
    """The documents of one part, read from its file.

    Raises:
        DataError: the file is missing, damaged, or holds something other than `key` says.
    """

    def __init__(self, path: Path, key: Mapping[str, Any]) -> None:
        self.path = path
        try:
            self._read(key)
        except (pa.ArrowException, OSError, KeyError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            reason = (str(error).splitlines() or [""])[0]
            raise self._unusable(f"it cannot be read ({reason})") from error

    def __len__(self) -> int:
        return len(self._hashes)

    def require_texts(self, texts: Sequence[str]) -> None:
        """Check that these are the texts that were parsed.

        Raises:
            DataError: another text, or another number of them.
        """
        for number, text in enumerate(texts):
            self.require_text(number, text)
        if len(texts) != len(self):
            raise self._of_other_texts(f"it has {len(self)} documents, the data {len(texts)}")

    def require_text(self, number: int, text: str) -> None:
        """Check the text of document `number` of this part."""
        if number >= len(self) or int(self._hashes[number]) != text_hash(text):
            raise self._of_other_texts(
                f"document {number} of this part is not the text that was parsed"
            )

    def document(self, number: int, text: str) -> ParsedDocument:
        """The parse of document `number` of this part, which must have this text.

        Raises:
            DataError: another text was parsed.
        """
        self.require_text(number, text)
        here = slice(self._offsets[number], self._offsets[number + 1])
        return ParsedDocument(
            STATUSES[self._status[number]],
            int(self._sentences[number]),
            **{name: self._lists[name][here] for name in _LISTS},
            error=self._errors[number].as_py(),
        )

    def counts(self) -> Counter[str]:
        """Documents by status, errors of the failed ones by type, sentences and words."""
        counts = Counter({status: 0 for status in STATUSES})
        counts.update(STATUSES[status] for status in self._status)
        counts["documents"] = len(self)
        counts["sentences"] = int(self._sentences.sum())
        counts["words"] = len(self._lists["depth"])
        counts["unparsed_words"] = int((self._lists["depth"] == UNPARSED).sum())
        errors = (error for error in self._errors.to_pylist() if error is not None)
        counts.update(f"failed: {error.split(':')[0]}" for error in errors)
        return counts

    def _read(self, key: Mapping[str, Any]) -> None:
        if not is_intact(self.path):
            raise self._unusable("it is incomplete, damaged or foreign (wrong checksum)")
        table = pa.ipc.open_file(pa.memory_map(str(self.path))).get_batch(0)
        metadata = table.schema.metadata or {}
        if metadata.get(b"format") != _FORMAT.encode():
            raise self._unusable("it is no part of a parse of this format")
        found = json.loads(metadata[b"key"])
        for name, was, wanted in _differences(found, key):
            raise self._unusable(f"it was made with {name} {was}, not {wanted}")
        self._hashes = table["text_hash"].to_numpy()
        self._status = table["status"].to_numpy()
        self._sentences = table["sentences"].to_numpy()
        self._offsets = table["start"].offsets.to_numpy()
        self._lists = {name: table[name].values.to_numpy() for name in _LISTS}
        self._errors = table["error"]

    def _unusable(self, reason: str) -> DataError:
        return DataError(f"{self.path}: {reason}; delete it and parse again")

    def _of_other_texts(self, reason: str) -> DataError:
        # Texts that changed places did so in other parts, too.
        folder = self.path.parent
        return DataError(f"{self.path}: {reason}; delete the folder {folder} and parse again")


def _differences(
    found: Mapping[str, Any], wanted: Mapping[str, Any]
) -> Iterator[tuple[str, Any, Any]]:
    """The keys that differ, those of inner mappings by both names."""
    for name in wanted:
        was, now = found.get(name), wanted[name]
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            yield from ((f"{name} {inner}", *pair) for inner, *pair in _differences(was, now))
        elif was != now:
            yield name, was, now
