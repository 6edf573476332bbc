"""The answers of a measurement: batches of conversations, rows on disk, failures counted."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data.chat import messages_of, read_chat
from data.errors import DataError
from data.fingerprint import fingerprint, unit_hash
from data.journal import encode_row
from evaluation.acceptance import Acceptance, Answer, measure, read_answer
from evaluation.acceptance_log import Row, RowLog, read_rows
from evaluation.acceptance_table import DraftRun
from evaluation.answering import (
    Answerer,
    Reply,
    answer_conversations,
    answer_row,
    conversation_turns,
)
from evaluation.server_acceptance import RemoteAnswerer
from evaluation.server_counters import CountingServer, acceptance_of_counters

ROWS, FAILED = "acceptance.jsonl", "failed.jsonl"
# Rows of data/chat by benchmark.
Prompts = dict[str, list[Row]]
# Description, unit and total of something long; gives what is called with the number just done.
Progress = Callable[[str, str, int], AbstractContextManager[Callable[[int], None]]]


def read_prompts(files: Mapping[str, str], limit: int | None) -> Prompts:
    """The rows of every benchmark's file, the first `limit` of each.

    Raises:
        DataError: no rows, or an id that occurs twice in a file.
    """
    prompts: Prompts = {}
    for benchmark, file in files.items():
        rows = list(read_chat(Path(file).expanduser()))
        seen: set[str] = set()
        for row in rows:
            if row["id"] in seen:
                raise DataError(f"{file}: id {row['id']!r} occurs twice")
            seen.add(row["id"])
            conversation_turns(row)
        if not rows:
            raise DataError(f"{file}: no prompts")
        prompts[benchmark] = rows[:limit]
    return prompts


def prompt_conditions(prompts: Prompts) -> dict[str, Any]:
    """The identity of every benchmark's prompts, in any order."""
    return {
        f"prompts.{name}": fingerprint(
            sorted([row["id"], messages_of(row), row.get("turns")] for row in rows)
        )
        for name, rows in prompts.items()
    }


def answer_all(
    answerers: Mapping[str, Answerer],
    prompts: Prompts,
    folder: Path,
    batch_size: int,
    progress: Progress,
    seed: int,
) -> tuple[dict[str, dict[str, Acceptance]], list[Row]]:
    """Have every answerer answer every prompt that has no rows in the folder yet, and measure.

    Returns:
        acceptance by answerer and benchmark, and the prompts without an answer, with the reason;
        they are asked again by the next run in this folder. They are written to failed.jsonl
        whatever happens.

    Raises:
        DataError: a benchmark without any answer, or a folder with other rows.
        ServerError: a server that no longer answers; what it has answered is kept.
    """
    turns = {
        (name, row["id"]): len(conversation_turns(row))
        for name, rows in prompts.items()
        for row in rows
    }
    log, failures = RowLog(folder / ROWS, turns), list[Row]()
    found: dict[str, dict[str, Acceptance]] = {name: {} for name in answerers}
    try:
        for name, answerer in answerers.items():
            for benchmark, rows in prompts.items():
                todo = [row for row in rows if (name, benchmark, row["id"]) not in log]
                batches = _answered(answerer, benchmark, todo, batch_size, progress)
                work = _counted if isinstance(answerer, CountingServer) else _logged
                found[name][benchmark] = work(
                    answerer, batches, name, benchmark, failures, log, seed
                )
    finally:
        (folder / FAILED).write_bytes(b"".join(map(encode_row, failures)))
    return found, failures


def failed_prompts(failures: Sequence[Row]) -> int:
    """How many prompts have no answer of at least one draft."""
    return len({(row["benchmark"], row["id"]) for row in failures})


# A batch: prompts with the replies to their turns.
Batch = list[tuple[Row, list[Reply]]]


def _answered(
    answerer: Answerer, benchmark: str, rows: Sequence[Row], batch_size: int, progress: Progress
) -> Iterator[Batch]:
    """One batch after the other.

    Here prompts of like length go together, which saves padding. A server pads nothing, and what
    it has answered when it dies shall be no sample of the short prompts alone.
    """
    is_remote = isinstance(answerer, RemoteAnswerer)
    order = sorted(rows, key=_by_chance if is_remote else _by_length)
    with progress(benchmark, "prompts", len(order)) as tick:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            talks = answer_conversations(answerer, benchmark, batch, list(map(messages_of, batch)))
            yield list(zip(batch, talks, strict=True))
            tick(len(batch))
            # Behind the yield, so that the answers of the batch are kept.
            if isinstance(answerer, RemoteAnswerer):
                answerer.check_alive()


def _by_chance(row: Row) -> float:
    return unit_hash(row["id"])


def _by_length(row: Row) -> int:
    return sum(len(message["content"]) for message in messages_of(row))


def _without_failures(
    batch: Batch, name: str, benchmark: str, failures: list[Row]
) -> Iterator[tuple[Row, list[Reply]]]:
    for row, turns in batch:
        error = next((reply.error for reply in turns if reply.error is not None), None)
        if error is None:
            yield row, turns
        else:
            failures.append(_failure(name, benchmark, row, error))


def _failure(name: str, benchmark: str, row: Row, error: str) -> Row:
    return {"draft": name, "benchmark": benchmark, "id": row["id"], "error": error}


def _contradiction(row: Row) -> str | None:
    try:
        read_answer(row, "reply")
    except DataError as error:
        return str(error)
    return None


def _rows(name: str, benchmark: str, row: Row, turns: Sequence[Reply], drafted: int) -> list[Row]:
    return [
        answer_row(name, benchmark, row, turn, reply, drafted) for turn, reply in enumerate(turns)
    ]


def _answers(log: RowLog, name: str, benchmark: str) -> list[Answer]:
    return [
        read_answer(row, str(log.path))
        for row in log.rows()
        if (row["draft"], row["benchmark"]) == (name, benchmark)
    ]


def _logged(
    answerer: Answerer, batches: Iterator[Batch], name: str, benchmark: str,
    failures: list[Row], log: RowLog, seed: int,
) -> Acceptance:  # fmt: skip
    """A benchmark whose answers are rows."""
    for batch in batches:
        found = []
        for row, turns in _without_failures(batch, name, benchmark, failures):
            rows = _rows(name, benchmark, row, turns, answerer.drafted)
            problem = next(filter(None, map(_contradiction, rows)), None)
            # What a server says may not add up; were it kept, no later run could go on from here.
            if problem is not None and isinstance(answerer, RemoteAnswerer):
                failures.append(_failure(name, benchmark, row, problem))
            else:
                found.append(rows)
        log.append(found)
    answers = _answers(log, name, benchmark)
    _check_any(answers, name, benchmark, failures)
    return measure(answers, seed=seed)


def _counted(
    server: Any, batches: Iterator[Batch], name: str, benchmark: str,
    failures: list[Row], *_: Any,
) -> Acceptance:  # fmt: skip
    """A whole benchmark between two looks at a server's counters."""
    before = server.counters()
    answered = [
        one for batch in batches for one in _without_failures(batch, name, benchmark, failures)
    ]
    _check_any(answered, name, benchmark, failures)
    replies = [reply for _, turns in answered for reply in turns]
    counted = server.counters().since(before)
    return acceptance_of_counters(counted, replies, len(answered), server.drafted)


def _check_any(found: Sequence[Any], name: str, benchmark: str, failures: Sequence[Row]) -> None:
    if not found:
        of_these = (
            row["error"]
            for row in failures
            if (row["draft"], row["benchmark"]) == (name, benchmark)
        )
        raise DataError(f"{benchmark}: no prompt was answered; {next(of_these)}")


def draft_run(
    folder: Path, label: str, draft: str, conditions: Mapping[str, Any]
) -> DraftRun | None:
    """The rows of one draft in a folder, for a table; None where it has none.

    Raises:
        DataError: a row is damaged.
    """
    path = folder / ROWS
    if not path.is_file():
        return None
    answers = [
        read_answer(row, f"{path}:{number}")
        for number, row in enumerate(read_rows(path)[0], start=1)
        if row["draft"] == draft
    ]
    return DraftRun(label, conditions, answers) if answers else None
