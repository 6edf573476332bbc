"""Sentences parsed per second, ours beside Stanza called sentence by sentence.

    python benchmarks/parsing.py MODELS FILE.conllu [--sentences N] [--processes P]

MODELS is a folder of Stanza models, e.g. of scripts/train_stanza.py; the words of the file's
sentences are given to both. Seconds are those after loading. CPU seconds add up all threads and
processes, so they can be compared where other work takes part of the cores.
"""

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

WARM_UP = 20


class Cost(NamedTuple):
    """Seconds of all sentences."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> Cost:
    """The cost of a call in this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Cost(time.perf_counter() - wall, time.process_time() - cpu)


def one_by_one(models: str, sentences: Sequence[list[str]], threads: int) -> Cost:
    """Stanza's pipeline, called for every sentence.

    Without its repair of relations, which ours leaves out, too: with a weak model it can take
    minutes for one sentence.
    """
    import stanza
    import torch

    torch.set_num_threads(threads)
    pipeline = stanza.Pipeline(
        "en", dir=models, processors="tokenize,pos,depparse", download_method=None,
        tokenize_pretokenized=True, depparse_pretagged=True, logging_level="ERROR",
        depparse_resolve_head_constraints=False,
    )  # fmt: skip

    def parse(rows: Sequence[list[str]]) -> None:
        for row in rows:
            pipeline([row])

    parse(sentences[:WARM_UP])
    return timed(lambda: parse(sentences))


def in_parts(models: str, sentences: Sequence[list[str]], barrier: Any = None) -> Cost:
    """Our parser on all sentences as one part, in one thread."""
    from data.stanza_parser import StanzaParser

    # Words that hold no white space come back as they are only if joined by it.
    texts = [" ".join(words) for words in sentences]
    parser = StanzaParser(model_dir=models, tokenize="words")
    parser.parse(texts[:WARM_UP])
    if barrier is not None:
        barrier.wait()
    return timed(lambda: parser.parse(texts))


def _process(models: str, sentences: Sequence[list[str]], barrier: Any, results: Any) -> None:
    results.put(in_parts(models, sentences, barrier))


def in_processes(models: str, sentences: Sequence[list[str]], processes: int) -> Cost:
    """Our parser in several processes, a share of the sentences each."""
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(processes), context.Queue()
    workers = [
        context.Process(
            target=_process, args=(models, sentences[number::processes], barrier, results)
        )
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    costs = [results.get() for _ in workers]
    for worker in workers:
        worker.join()
    return Cost(max(cost.wall for cost in costs), sum(cost.cpu for cost in costs))


def read_words(path: Path, count: int) -> list[list[str]]:
    """The words of the first sentences, as our own rules cut them, so that both see the same."""
    from data.treebank import read_trees
    from data.words import words

    texts = (document["text"] for document in read_trees(path))
    rows = [[text[start:end] for start, end in words(text)] for text in texts]
    return [row for row in rows if 0 < len(row) <= 200][:count]


def main() -> None:
    """Measure every way, print a table."""
    from evaluation.tables import text_table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("models")
    parser.add_argument("file", type=Path)
    parser.add_argument("--sentences", type=int, default=2000)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    sentences = read_words(options.file, options.sentences)
    models, processes = options.models, options.processes
    cells = {
        "Stanza, one by one, 1 thread": lambda: one_by_one(models, sentences, 1),
        f"Stanza, one by one, {processes} threads": lambda: one_by_one(
            models, sentences, processes
        ),
        "ours, 1 process": lambda: in_parts(models, sentences),
        f"ours, {processes} processes": lambda: in_processes(models, sentences, processes),
    }
    rows: list[tuple[str, float, float, float, float]] = []
    for name, measure in cells.items():
        cost = measure()
        rate, per_cpu = len(sentences) / cost.wall, len(sentences) / cost.cpu
        base, per_cpu_base = (rows[0][1], rows[0][3]) if rows else (rate, per_cpu)
        rows.append((name, rate, rate / base, per_cpu, per_cpu / per_cpu_base))
    words = sum(map(len, sentences))
    print(f"{len(sentences)} sentences of {words / len(sentences):.1f} words")
    header = ("", "sentences/s", "ratio", "sentences/CPU-s", "ratio")
    print(text_table(header, rows))


if __name__ == "__main__":
    main()
