"""Parsing a split part by part: what is there is kept, what is missing is made.

Parts are independent of each other and of who makes them, so they can be shared out to processes
and to machines; whoever finishes last closes the split.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data.errors import DataError
from data.parse_store import EMPTY, FAILED, ParsedDocument, Parser, ParseStore, Part, write_part
from data.source import Source, require_split

Tick = Callable[[int], None]

# Where so many texts fail and none succeeds, it is the parser that fails.
_TOO_MANY_FAILED = 8


class Shard(NamedTuple):
    """Of all parts, those whose number modulo `total` is `number`."""

    number: int = 0
    total: int = 1


WHOLE = Shard()


class Task(NamedTuple):
    """A part to be made."""

    number: int
    texts: list[str]


@dataclass
class Outcome:
    """What became of a split.

    Attributes:
        counts: of the parts of this shard: documents by status, sentences, words.
        parts: parts of this shard.
        kept: those of them that were there before.
        fresh: counts of the others.
        seconds: what making these took.
        finished: whether every part of the split is there.
    """

    counts: Counter[str] = field(default_factory=Counter)
    parts: int = 0
    kept: int = 0
    fresh: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    finished: bool = False

    def add(self, counts: Counter[str], is_fresh: bool) -> None:
        """Count a part."""
        self.counts.update(counts)
        self.parts += 1
        self.kept += not is_fresh
        if is_fresh:
            self.fresh.update(counts)


def parse_split(
    source: Source,
    split: str,
    store: ParseStore,
    parser: Parser,
    processes: int = 1,
    shard: Shard = WHOLE,
    tick: Tick = lambda documents: None,
) -> Outcome:
    """Make the missing parts of one shard of a split; close the split if it is complete.

    Args:
        source: what to parse.
        split: which documents.
        store: where the parts go.
        parser: makes them; it is copied to every process.
        processes: 1 parses in this one.
        shard: the parts to care for.
        tick: called with the number of documents that are done.

    Raises:
        DataError: a part on disk is damaged, of other texts, or made by another parser; a model
            is missing; a process was killed; all texts of a part failed.
    """
    require_split(source, split)
    identity = parser.identity()
    outcome = Outcome()
    seen = Counter[str]()
    start = time.monotonic()

    def missing() -> Iterator[Task]:
        """Parts of this shard that are not there; the others are counted."""
        for task in _parts(source, split, store.documents_per_part):
            seen.update(documents=len(task.texts), parts=1)
            if task.number % shard.total != shard.number:
                continue
            path = store.part_path(split, task.number)
            if not path.exists():
                yield task
                continue
            part = Part(path, store.part_key(split, task.number, identity))
            part.require_texts(task.texts)
            outcome.add(part.counts(), is_fresh=False)
            tick(len(task.texts))

    work = _Work(store, split, parser, identity)
    for counts in _run(work, missing(), processes):
        outcome.add(counts, is_fresh=True)
        tick(counts["documents"])
    outcome.seconds = time.monotonic() - start
    paths = (store.part_path(split, number) for number in range(seen["parts"]))
    outcome.finished = all(path.exists() for path in paths)
    if outcome.finished:
        store.write_index(split, seen["documents"], identity)
    return outcome


def _parts(source: Source, split: str, size: int) -> Iterator[Task]:
    documents = enumerate(source.documents(split))
    for number in itertools.count():
        texts = []
        for place, document in itertools.islice(documents, size):
            if not isinstance(document.get("text"), str):
                raise DataError(f"document {place}: no text under the key 'text'")
            texts.append(document["text"])
        if not texts:
            return
        yield Task(number, texts)


class _Work(NamedTuple):
    """What makes a part; one copy per process."""

    store: ParseStore
    split: str
    parser: Parser
    identity: dict[str, Any]

    def make(self, task: Task) -> Counter[str]:
        """Parse and write a part; returns its counts."""
        path = self.store.part_path(self.split, task.number)
        key = self.store.part_key(self.split, task.number, self.identity)
        documents = self.parser.parse(task.texts)
        _require_success(path, documents)
        write_part(path, key, task.texts, documents)
        return Part(path, key).counts()


def _require_success(path: Path, documents: Sequence[ParsedDocument]) -> None:
    found = [document for document in documents if document.status != EMPTY]
    if len(found) < _TOO_MANY_FAILED or any(document.status != FAILED for document in found):
        return
    raise DataError(
        f"{path}: not written, because all {len(found)} documents failed, the first with"
        f" {found[0].error}; mend the parser (data.parse) and run again"
    )


def _run(work: _Work, tasks: Iterable[Task], processes: int) -> Iterator[Counter[str]]:
    if processes == 1:
        yield from map(work.make, tasks)
        return
    # Spawned, because a forked process would inherit the threads' locks of the numeric libraries.
    context = multiprocessing.get_context("spawn")
    before = set(multiprocessing.active_children())
    pool = ProcessPoolExecutor(processes, context, initializer=_start, initargs=(work,))
    try:
        yield from _spread(pool, iter(tasks), 2 * processes)
    except BrokenProcessPool as error:
        raise DataError(
            f"data.parse.num_processes={processes}: a process was killed, probably for lack of"
            " memory; allow fewer, finished parts are kept"
        ) from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in set(multiprocessing.active_children()) - before:
            process.terminate()
            process.join()


def _spread(pool: ProcessPoolExecutor, tasks: Iterator[Task], ahead: int) -> Iterator[Counter[str]]:
    """Results as they come; few tasks wait, because their texts take memory."""
    running: set[Future] = set()
    while True:
        for task in itertools.islice(tasks, ahead - len(running)):
            running.add(pool.submit(_make, task))
        if not running:
            return
        done, running = wait(running, return_when=FIRST_COMPLETED)
        for future in done:
            yield future.result()


_work: _Work | None = None


def _start(work: _Work) -> None:
    """In a new process: keep what it needs, leave Ctrl-C to the parent, and end with it."""
    global _work
    _work = work
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "only children call this"
    parent.join()
    os._exit(1)


def _make(task: Task) -> Counter[str]:
    assert _work is not None, "the pool starts its processes with _start"
    return _work.make(task)


def usable_processes(wanted: int | None, on_gpu: bool) -> int:
    """The processes to parse with: as wanted, else one for a GPU, else one per core."""
    if wanted is not None:
        return wanted
    if on_gpu:
        return 1
    # macOS and Windows have no such function.
    usable = getattr(os, "sched_getaffinity", None)
    return len(usable(0)) if usable else os.cpu_count() or 1
