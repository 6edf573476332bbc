"""Scored blocks as rows of JSON, one per block: what every number about a scorer is made of.

A row has `group`, `entropy`, `truth_score` and, by candidate, `valid`, `errors`, `log_q`, `score`
and `score_rounds` (a list per round); `truth_score_rounds` where it is known. What stands at a
candidate that is not valid is null. Numbers come back bit by bit.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.errors import DataError
from data.journal import encode_row
from data.storage import atomic_file
from evaluation.scorer import ScoredBlocks, check_blocks

NAME = "blocks.jsonl"
_CANDIDATES = {"errors": "errors_MC", "log_q": "log_q_MC", "score": "score_MC"}
_BLOCKS = {"group": "group_M", "entropy": "entropy_M", "truth_score": "truth_score_M"}
_TRUTH_ROUNDS = "truth_score_rounds"


def write_blocks(path: Path, blocks: ScoredBlocks) -> None:
    """Write a file of rows; it appears whole or not at all.

    Raises:
        DataError: blocks that cannot be measured, or the file system refuses.
    """
    check_blocks(blocks)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path, "paths.run_dir") as file:
        for row in _rows(blocks):
            file.write(encode_row(row))


def _rows(blocks: ScoredBlocks) -> Iterator[dict[str, Any]]:
    for m, valid in enumerate(blocks.valid_MC.tolist()):
        row: dict[str, Any] = {
            name: getattr(blocks, part)[m].item() for name, part in _BLOCKS.items()
        }
        row["valid"] = valid
        for name, part in _CANDIDATES.items():
            row[name] = _kept(getattr(blocks, part)[m].tolist(), valid)
        row["score_rounds"] = [_kept(scores, valid) for scores in blocks.score_RMC[:, m].tolist()]
        if blocks.truth_score_RM is not None:
            row[_TRUTH_ROUNDS] = blocks.truth_score_RM[:, m].tolist()
        yield row


def _kept(values: list[Any], valid: list[bool]) -> list[Any]:
    return [value if exists else None for value, exists in zip(values, valid, strict=True)]


def read_blocks(path: Path) -> ScoredBlocks:
    """The blocks of a file; candidates that are not valid have nan, and 0 errors.

    Raises:
        DataError: no such file, a line that is no such row, rows of different shape, or blocks that
            cannot be measured; by file and line.
    """
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from error
    rows = [_parsed(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]
    if not rows:
        raise DataError(f"{path}: no row")
    for number, row in enumerate(rows, start=1):
        if _shape(row) != _shape(rows[0]):
            raise DataError(
                f"{path}:{number}: its candidates or rounds are not as many as in line 1"
            )
    blocks = _blocks(rows)
    try:
        check_blocks(blocks)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return blocks


def _parsed(line: bytes, place: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
        lists = [row["valid"], *(row[name] for name in _CANDIDATES), *row["score_rounds"]]
        numbers = [row[name] for name in _BLOCKS] + row.get(_TRUTH_ROUNDS, [])
        known = [cell for cells in lists for cell in cells if cell is not None]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{place}: no row of scored blocks ({type(error).__name__}: {error})"
        ) from error
    if len({len(cells) for cells in lists}) != 1:
        raise DataError(f"{place}: its lists do not have one entry per candidate")
    gaps = any(
        c is None and exists for cells in lists for c, exists in zip(cells, lists[0], strict=True)
    )
    if gaps or not all(isinstance(value, bool | int | float) for value in [*known, *numbers]):
        raise DataError(f"{place}: null or text stands where a valid candidate has a number")
    return row


def _shape(row: dict[str, Any]) -> tuple[int, int, int | None]:
    truth_rounds = len(row[_TRUTH_ROUNDS]) if _TRUTH_ROUNDS in row else None
    return len(row["valid"]), len(row["score_rounds"]), truth_rounds


def _blocks(rows: Sequence[dict[str, Any]]) -> ScoredBlocks:
    valid_MC = np.array([row["valid"] for row in rows], dtype=bool)
    errors = [[error or 0 for error in row["errors"]] for row in rows]
    rounds_MRC = np.array([row["score_rounds"] for row in rows], dtype=np.float64)
    rounds_MRC = rounds_MRC.reshape(len(rows), -1, valid_MC.shape[1])
    truth_RM = None
    if _TRUTH_ROUNDS in rows[0]:
        truth_RM = np.array([row[_TRUTH_ROUNDS] for row in rows], dtype=np.float64).T
    return ScoredBlocks(
        log_q_MC=np.array([row["log_q"] for row in rows], dtype=np.float64),
        score_MC=np.array([row["score"] for row in rows], dtype=np.float64),
        score_RMC=rounds_MRC.swapaxes(0, 1),
        errors_MC=np.array(errors, dtype=np.int64),
        valid_MC=valid_MC,
        entropy_M=np.array([row["entropy"] for row in rows], dtype=np.float64),
        group_M=np.array([row["group"] for row in rows], dtype=np.int64),
        truth_score_M=np.array([row["truth_score"] for row in rows], dtype=np.float64),
        truth_score_RM=truth_RM,
    )
