"""mode=insert_thoughts: an annotator puts thoughts into documents, for data=thoughts."""

import inspect
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from data.annotation import (
    Annotator,
    Passage,
    Row,
    in_passages,
    read_documents,
    thought_row,
)
from data.errors import DataError
from data.files import expand_paths
from data.fingerprint import files_fingerprint
from data.journal import Journal, encode_row
from data.storage import atomic_file, exclusive
from data.text import TYPES
from data.thoughts import Delimiters
from evaluation.tables import metrics_table
from modes.regenerate import OUTPUT, check_model, check_options, settings_of
from runtime.checkpoint import provenance
from runtime.config import instantiate, locate
from runtime.progress import counting
from runtime.run import write_json, write_provenance

ROWS, REJECTED, FAILED = "rows.jsonl", "rejected.jsonl", "failed.jsonl"
PARTIAL, MANIFEST = "partial.jsonl", "manifest.json"


def run(cfg: DictConfig) -> dict[str, float]:
    """Put thoughts into the documents of `mode.input`; rows go to `mode.output`.

    A run that was broken off goes on where it was: what became of a passage is kept in
    `partial.jsonl` as it comes. At the end `rows.jsonl` has a row for every passage with thoughts,
    in the order of the documents; `rejected.jsonl` the others, with the reason; `failed.jsonl`
    those that nobody answered, which the next run tries again; `manifest.json` what was asked and
    what came out.

    Returns:
        documents, passages, rows, rejected, and by reason rejected/REASON; failed; escaped,
        passages in which a delimiter was taken apart; thoughts, thoughts_per_row,
        words_per_thought; raw_word_coverage, mean over rows, and preserved, the share of rows whose
        text without thoughts is the raw text to the letter; attempts, mean over passages; and of
        what was done now passages_per_s.

    Raises:
        ConfigError: a model that cannot answer, or options other than those the output was begun
            with.
        DataError: bad documents, the same id twice, or not a single row; what became of the
            passages is written down all the same.
    """
    mode = cfg.mode
    paths = expand_paths(mode.input if isinstance(mode.input, str) else list(mode.input), TYPES)
    delimiters = Delimiters(mode.open, mode.close)
    documents = list(read_documents(paths, mode.text_column))[: mode.limit]
    passages = list(_passages(documents, mode.passage_words, delimiters, mode.delimiter_in_text))
    annotator = annotator_of(cfg, delimiters)
    folder = Path(mode.output).expanduser()
    content = files_fingerprint(paths)
    options = _options(cfg, annotator, content)
    with exclusive(folder / PARTIAL, OUTPUT):
        if (folder / PARTIAL).is_file() and (folder / PARTIAL).stat().st_size:
            check_options(folder / MANIFEST, options)
        write_json(folder / MANIFEST, {"status": "running", "options": options})
        with Journal(folder / PARTIAL) as journal:
            fresh = _annotate(passages, journal, annotator, delimiters, folder / FAILED)
            found = [journal.read(one.id) for one in passages if one.id in journal]
        metrics = {"documents": len(documents), "passages": len(passages)} | metrics_of(found)
        metrics["failed"] = len(passages) - len(found)
        _write(folder / ROWS, (row["row"] for row in found if row["row"]))
        _write(
            folder / REJECTED,
            ({"id": row["id"], "reason": row["reason"]} for row in found if row["reason"]),
        )
        write_json(folder / MANIFEST, {"status": "done", "options": options, "counts": metrics})
    write_provenance(Path(cfg.paths.run_dir), provenance(cfg, content))
    print(metrics_table(f"{annotator.identity()['teacher']}: {folder / ROWS}", metrics))
    _require_rows(metrics, folder)
    return metrics | fresh


def _require_rows(metrics: Mapping[str, float], folder: Path) -> None:
    """See that there is something to train on.

    Raises:
        DataError: there is not: how many passages were refused, by reason, and went unanswered.
    """
    if metrics["rows"]:
        return
    found = {
        name.partition("/")[2]: n for name, n in metrics.items() if name.startswith("rejected/")
    }
    found |= {"failed": metrics["failed"]} if metrics["failed"] else {}
    reasons = ", ".join(f"{count} {reason}" for reason, count in found.items()) or "no passages"
    # What was refused stays so in this folder; what nobody answered is asked for again.
    again = "run again for those that failed, or " if metrics["failed"] else ""
    raise DataError(
        f"{folder}: no rows of {metrics['passages']} passages ({reasons}; see {REJECTED} and"
        f" {FAILED}); allowed: {again}another {OUTPUT}, with a mode.annotator, limits or a model"
        " by which some are accepted"
    )


def annotator_of(cfg: DictConfig, delimiters: Delimiters) -> Annotator:
    """The annotator of `mode.annotator`; one that takes a `generator` is given `mode.backend`.

    Raises:
        ConfigError: a model that cannot answer.
    """
    factory = locate(cfg.mode.annotator._target_, "mode.annotator._target_")
    parts: dict[str, Any] = {"delimiters": delimiters}
    if "generator" in inspect.signature(factory).parameters:
        check_model(cfg)
        parts["generator"] = instantiate(cfg.mode.backend, settings=settings_of(cfg))
    return instantiate(cfg.mode.annotator, **parts)


def _passages(
    documents: Iterable[Passage], words: int | None, delimiters: Delimiters, found: str
) -> Iterator[Passage]:
    """The passages of all documents; a delimiter in the text is taken apart if `found` says so."""
    for document in documents:
        for passage in in_passages(document, words):
            text = delimiters.escaped(passage.text) if found == "escape" else passage.text
            more = passage.more | ({"escaped": True} if text != passage.text else {})
            yield Passage(passage.id, passage.source_sha, text, more)


def _options(cfg: DictConfig, annotator: Annotator, content: str) -> dict[str, Any]:
    """What decides the rows, by the name that the user knows it by."""
    names = ("open", "close", "text_column", "passage_words", "delimiter_in_text")
    options: dict[str, Any] = {f"mode.{name}": cfg.mode[name] for name in names}
    limits = cfg.mode.annotator.limits
    options |= {f"mode.annotator.limits.{name}": limits[name] for name in limits}
    identity = annotator.identity()
    if any(name.startswith("model ") for name in identity):
        sampling = ("max_new_tokens", "temperature", "top_p", "top_k", "thinking")
        options |= {f"mode.{name}": cfg.mode[name] for name in sampling} | {"seed": cfg.seed}
    options["mode.input"] = content
    return options | {f"annotator {name}": value for name, value in identity.items()}


def _annotate(
    passages: list[Passage],
    journal: Journal,
    annotator: Annotator,
    delimiters: Delimiters,
    failed: Path,
) -> dict[str, float]:
    """Annotate what the journal lacks; how fast that went."""
    waiting = {passage.id: passage for passage in passages if passage.id not in journal}
    total, started, identity = len(waiting), time.monotonic(), annotator.identity()
    with (
        failed.open("wb") as failures,
        counting("inserting thoughts", "passages", total) as tick,
    ):
        for found in annotator.annotate(list(waiting.values())):
            passage = waiting.pop(found.id)
            tick(1)
            if found.error is not None:
                failures.write(encode_row({"id": passage.id, "error": found.error}))
                failures.flush()
                continue
            row = None
            if found.augmented is not None:
                who = (identity["teacher"], identity["prompt_kind"])
                row = thought_row(passage, found.augmented, delimiters, *who)
            journal.append(
                {"id": passage.id, "row": row, "reason": found.reason, "attempts": found.attempts}
            )
    assert not waiting, "every passage has a result"
    seconds = time.monotonic() - started
    return {"passages_per_s": round(total / max(seconds, 1e-9), 2)} if total else {}


def metrics_of(found: list[Row]) -> dict[str, float]:
    """The figures over what became of the passages."""
    rows = [one["row"] for one in found if one["row"]]
    reasons = Counter(one["reason"] for one in found if one["reason"])
    metrics: dict[str, float] = {"rows": len(rows), "rejected": reasons.total()}
    metrics |= {f"rejected/{reason}": count for reason, count in sorted(reasons.items())}
    metrics["escaped"] = sum(row.get("escaped", False) for row in rows)
    thoughts = sum(row["think_count"] for row in rows)
    metrics["thoughts"] = thoughts
    if rows:
        metrics["thoughts_per_row"] = thoughts / len(rows)
        metrics["raw_word_coverage"] = sum(row["raw_word_coverage"] for row in rows) / len(rows)
        metrics["preserved"] = sum(row["original_text_preserved"] for row in rows) / len(rows)
    if thoughts:
        metrics["words_per_thought"] = sum(row["think_words"] for row in rows) / thoughts
    if found:
        metrics["attempts"] = sum(one["attempts"] for one in found) / len(found)
    return metrics


def _write(path: Path, rows: Iterable[Row]) -> None:
    with atomic_file(path, OUTPUT) as file:
        for row in rows:
            file.write(encode_row(row))
