"""Held-out documents in two parts, a prefix and how it goes on; and what models make of them.

Legend: L tokens of a row; M documents, G texts that they are from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from data.blocks import ORIGIN
from data.errors import DataError
from data.journal import Journal
from decoding.generate import GenerationRequest, Generator
from evaluation.statistics import Estimate, ratio_with_standard_error


@dataclass(frozen=True)
class HeldOut:
    """A document.

    Attributes:
        id: row and number of the document inside it.
        prefix_ids: its tokens up to the first that is to be written.
        suffix_ids: those from there on, as far as they are to be written.
        document: number of the text that it was cut from, which others may be of, too; None: it is
            a text of its own.
    """

    id: str
    prefix_ids: list[int]
    suffix_ids: list[int]
    document: int | None = None


def read_held_out(batches: Iterable[Mapping[str, Tensor]], data: str) -> list[HeldOut]:
    """All documents of batches whose rows say in `response` what is to be written.

    Args:
        batches: with `input_ids`, `segment` and `response`, [B, L] each, `index` [B], and `origin`
            [B, documents of a row] where texts were cut.
        data: the name of the data, for messages.

    Raises:
        DataError: rows that do not say so, or a document without one of the parts.
    """
    found = []
    for batch in batches:
        if "response" not in batch or "segment" not in batch:
            raise DataError(
                f"data={data}: rows that do not say what is prefix and what suffix; allowed:"
                " data=prefix_suffix, or another whose rows have prompts and responses"
            )
        columns = (batch[name].numpy() for name in ("input_ids", "segment", "response"))
        index = batch["index"].tolist()
        origins = batch[ORIGIN].tolist() if ORIGIN in batch else [None] * len(index)
        rows = zip(index, origins, *columns, strict=True)
        for place, origin, ids_L, segment_L, response_L in rows:
            for number in range(int(segment_L.max()) + 1):
                mine = segment_L == number
                one = _document(f"{place}-{number}", ids_L[mine], response_L[mine] == 1, data)
                found.append(one if origin is None else replace(one, document=origin[number]))
    return found


def document_of(row: Mapping[str, Any], key: str) -> str:
    """What tells the text apart that a row is about; rows of one text depend on each other.

    Its `document`, or where that is not known the row's own `key`.
    """
    number = row.get("document")
    return str(row[key]) if number is None else f"document {number}"


def _document(name: str, ids: NDArray, written: NDArray, data: str) -> HeldOut:
    start = int(written.argmax())
    length = int(np.logical_and.accumulate(written[start:]).sum())
    if start == 0 or length == 0:
        part = "suffix" if length == 0 else "prefix"
        raise DataError(f"data={data}: document {name} has no {part}; allowed: both parts")
    suffix = ids[start : start + length]
    return HeldOut(name, ids[:start].tolist(), suffix.tolist())


def continue_all(
    documents: Sequence[HeldOut], generator: Generator, side: str, journal: Journal, tick: Any
) -> dict[str, str]:
    """Write what the journal lacks of a model's continuations; each is kept as it comes.

    Args:
        documents: whose prefixes are gone on with.
        generator: the model.
        side: what the model is called in the journal.
        journal: of rows with `text`, `num_tokens` and `finish`, under `SIDE/DOCUMENT`.
        tick: told of every one that is done.

    Returns:
        why a document has no continuation, by its id.
    """
    errors: dict[str, str] = {}
    missing = {f"{side}/{one.id}": one for one in documents if f"{side}/{one.id}" not in journal}
    asked = (GenerationRequest(one.id, prompt_ids=one.prefix_ids) for one in missing.values())
    for result in generator.generate(asked):
        if result.error is None:
            journal.append(
                {
                    "id": f"{side}/{result.id}", "text": result.text,
                    "num_tokens": result.num_tokens, "finish": result.finish,
                }
            )  # fmt: skip
        else:
            errors[result.id] = result.error
        tick(1)
    return errors


def suffix_likelihood(nll: Sequence[float], documents: Sequence[HeldOut]) -> Estimate:
    """Nats per token of the true suffixes, with its standard error over the texts they are from."""
    names = [document_of(vars(one), "id") for one in documents]
    texts, group_M = np.unique(names, return_inverse=True)
    sums_G2 = np.zeros((len(texts), 2))
    sizes = [len(one.suffix_ids) for one in documents]
    np.add.at(sums_G2, group_M, np.stack([nll, sizes], axis=-1))
    return ratio_with_standard_error(sums_G2[:, 0], sums_G2[:, 1])
