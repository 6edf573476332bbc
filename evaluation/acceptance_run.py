"""The answers of a measurement: batches of conversations, rows on disk, failures counted."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from data.chat import messages_of, read_chat
from data.errors import DataError
from data.fingerprint import fingerprint
from evaluation.acceptance import Acceptance, Answer, measure, read_answer
from evaluation.acceptance_log import Row, RowLog
from evaluation.acceptance_table import DraftRun
from evaluation.answering import (
    Answerer,
    Reply,
    answer_conversations,
    answer_row,
    conversation_turns,
)
from evaluation.server_acceptance import CountingServer, acceptance_of_counters

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
        they are asked again by the next run in this folder.

    Raises:
        DataError: a benchmark without any answer, or a folder with other rows.
    """
    turns = {
        (name, row["id"]): len(conversation_turns(row))
        for name, rows in prompts.items()
        for row in rows
    }
    log, failures = RowLog(folder / ROWS, turns), list[Row]()
    found: dict[str, dict[str, Acceptance]] = {name: {} for name in answerers}
    for name, answerer in answerers.items():
        for benchmark, rows in prompts.items():
            todo = [row for row in rows if (name, benchmark, row["id"]) not in log]
            batches = _answered(answerer, benchmark, todo, batch_size, progress)
            if isinstance(answerer, CountingServer):
                found[name][benchmark] = _counted(answerer, batches, name, benchmark, failures)
                continue
            for batch in batches:
                log.append(
                    [
                        _rows(name, benchmark, row, turns, answerer.drafted)
                        for row, turns in _without_failures(batch, name, benchmark, failures)
                    ]
                )
            answers = _answers(log, name, benchmark)
            _check_any(answers, benchmark, failures)
            found[name][benchmark] = measure(answers, seed=seed)
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in failures)
    (folder / FAILED).write_text(lines, encoding="utf-8")
    return found, failures


# A batch: prompts with the replies to their turns.
Batch = list[tuple[Row, list[Reply]]]


def _answered(
    answerer: Answerer, benchmark: str, rows: Sequence[Row], batch_size: int, progress: Progress
) -> Iterator[Batch]:
    """One batch after the other; prompts of like length go together, which saves padding."""
    order = sorted(rows, key=lambda row: sum(len(m["content"]) for m in messages_of(row)))
    with progress(benchmark, "prompts", len(order)) as tick:
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            talks = answer_conversations(answerer, benchmark, batch, list(map(messages_of, batch)))
            yield list(zip(batch, talks, strict=True))
            tick(len(batch))


def _without_failures(
    batch: Batch, name: str, benchmark: str, failures: list[Row]
) -> Iterator[tuple[Row, list[Reply]]]:
    for row, turns in batch:
        error = next((reply.error for reply in turns if reply.error is not None), None)
        if error is None:
            yield row, turns
        else:
            about = {"draft": name, "benchmark": benchmark, "id": row["id"], "error": error}
            failures.append(about)


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


def _counted(
    server: Any, batches: Iterator[Batch], name: str, benchmark: str, failures: list[Row]
) -> Acceptance:
    """A whole benchmark between two looks at a server's counters."""
    before = server.counters()
    answered = [
        one for batch in batches for one in _without_failures(batch, name, benchmark, failures)
    ]
    _check_any(answered, benchmark, failures)
    replies = [reply for _, turns in answered for reply in turns]
    counted = server.counters().since(before)
    return acceptance_of_counters(counted, replies, len(answered), server.drafted)


def _check_any(found: Sequence[Any], benchmark: str, failures: Sequence[Row]) -> None:
    if not found:
        raise DataError(f"{benchmark}: no prompt was answered; {failures[0]['error']}")


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
    answers = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}:{number}: not JSON ({error})") from error
        if isinstance(row, dict) and row.get("draft") == draft:
            answers.append(read_answer(row, f"{path}:{number}"))
    return DraftRun(label, conditions, answers) if answers else None
