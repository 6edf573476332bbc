"""mode=regenerate: the target answers every prompt, so that drafts learn what it really says."""

import contextlib
import hashlib
import inspect
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from data.chat import Row, messages_of, read_chat
from data.errors import DataError
from data.files import expand_paths
from data.fingerprint import files_fingerprint
from data.journal import Journal, encode_row
from data.parsing import Shard
from data.storage import atomic_file, exclusive
from decoding.generate import GenerationRequest, GenerationResult, GenerationSettings, Generator
from evaluation.statistics import wilson_interval
from evaluation.tables import metrics_table
from models.causal import CausalTarget
from modes.parse_depth import shard_of
from runtime.checkpoint import provenance
from runtime.config import instantiate, locate
from runtime.errors import ConfigError
from runtime.run import write_json, write_provenance

OUTPUT = "mode.output"
# What an answer consists of; what a prompt's row has of it is of an earlier answer.
ANSWER = (
    "response", "response_ids", "logprobs", "finish", "thinking", "target", "retokenised",
    "num_tokens",
)  # fmt: skip


def run(cfg: DictConfig) -> dict[str, float]:
    """Let the target answer the prompts of `mode.input`; the answered rows go to `mode.output`.

    A run that was broken off goes on where it was: every answer is kept in `partial.jsonl` as it
    comes, and `answers.jsonl` is written from it at the end, in the order of the prompts.
    `manifest.json` says what was asked and what came out, `failed.jsonl` which prompts have no
    answer and why; the next run tries those again.

    Returns:
        Rows, answered, failed, capped and their rate with its 95 % interval (Wilson), tokens, and
        of what was answered now: tokens_per_s.

    Raises:
        ConfigError: a model that cannot answer, or options other than those the output was begun
            with.
        DataError: bad prompts, or the same id twice.
    """
    shard = shard_of(cfg)
    prompts = Prompts(expand_paths(cfg.mode.input, (".jsonl",)), shard, cfg.mode.limit)
    files = Files.of(Path(cfg.mode.output).expanduser(), shard)
    check_model(cfg)
    settings = settings_of(cfg)
    generator: Generator = instantiate(cfg.mode.backend, settings=settings)
    options = options_of(cfg, prompts, generator)
    with exclusive(files.partial, OUTPUT):
        if files.partial.is_file() and files.partial.stat().st_size:
            check_options(files.manifest, options)
        write_json(files.manifest, {"status": "running", "options": options})
        with Journal(files.partial) as journal:
            seconds = _answer(prompts, journal, generator, settings.thinking, files.failed)
            counts = count(prompts, journal)
            digest = write_answers(files.answers, prompts, journal)
        report = {"counts": counts, "output": {"file": files.answers.name, "sha256": digest}}
        write_json(files.manifest, {"status": "done", "options": options, **report})
    metrics = metrics_of(counts, seconds)
    write_provenance(Path(cfg.paths.run_dir), provenance(cfg, files_fingerprint(prompts.paths)))
    print(metrics_table(f"{generator.identity()['target']}: {files.answers}", metrics))
    return metrics


@dataclass(frozen=True)
class Files:
    """The files of an output; those of a shard carry its number."""

    answers: Path
    partial: Path
    failed: Path
    manifest: Path

    @classmethod
    def of(cls, folder: Path, shard: Shard) -> "Files":
        """In a folder."""
        end = f"-{shard.number}-of-{shard.total}" if shard.total > 1 else ""
        names = ("answers{}.jsonl", "partial{}.jsonl", "failed{}.jsonl", "manifest{}.json")
        return cls(*(folder / name.format(end) for name in names))


class Prompts:
    """The prompts of several files, in order, of which each id is there once.

    Args:
        paths: the files.
        shard: which rows to take: those whose number modulo `total` is `number`.
        limit: of all rows only so many first ones.

    Raises:
        DataError: a bad row, no rows, or an id that occurs twice in the files.
    """

    def __init__(self, paths: list[Path], shard: Shard, limit: int | None) -> None:
        self.paths, self.shard, self.limit = paths, shard, limit
        seen: dict[str, Path] = {}
        self.sources: dict[str, str] = {}
        for number, (path, row) in enumerate(self._all()):
            if row["id"] in seen:
                raise DataError(
                    f"{path}: id {row['id']!r} is there twice (before in {seen[row['id']]});"
                    " allowed: ids that are unique over all files of mode.input"
                )
            seen[row["id"]] = path
            if self._is_ours(number):
                self.sources[row["id"]] = row["source"]
        if not self.sources:
            raise DataError(f"{paths[0]}: no prompts for shard {shard.number} of {shard.total}")

    def __len__(self) -> int:
        return len(self.sources)

    def __iter__(self) -> Iterator[Row]:
        rows = (row for _, row in self._all())
        return (row for number, row in enumerate(rows) if self._is_ours(number))

    def _all(self) -> Iterator[tuple[Path, Row]]:
        return ((path, row) for path in self.paths for row in read_chat(path))

    def _is_ours(self, number: int) -> bool:
        is_within = self.limit is None or number < self.limit
        return is_within and number % self.shard.total == self.shard.number


def settings_of(cfg: DictConfig) -> GenerationSettings:
    """`mode.*` as the settings of a generation."""
    mode = cfg.mode
    return GenerationSettings(
        max_new_tokens=mode.max_new_tokens,
        temperature=float(mode.temperature),
        top_p=float(mode.top_p),
        top_k=mode.top_k,
        seed=cfg.seed,
        thinking=mode.thinking,
    )


def options_of(cfg: DictConfig, prompts: Prompts, generator: Generator) -> dict[str, Any]:
    """What decides the answers, by the name that the user knows it by."""
    names = ("max_new_tokens", "temperature", "top_p", "top_k", "thinking")
    options: dict[str, Any] = {f"mode.{name}": cfg.mode[name] for name in names}
    # Greedy answers do not depend on it.
    options["seed"] = cfg.seed if cfg.mode.temperature else None
    options["mode.num_shards"] = prompts.shard.total
    options["mode.input"] = [
        {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in prompts.paths
    ]
    return options | {f"backend {name}": value for name, value in generator.identity().items()}


def check_options(manifest: Path, options: dict[str, Any]) -> None:
    """Refuse to mix answers.

    Raises:
        ConfigError: naming the first option that is not as the output was begun with.
    """
    if not manifest.is_file():
        return
    try:
        before = json.loads(manifest.read_text())["options"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{OUTPUT}={manifest.parent}: {manifest.name} is damaged") from error
    for name in {**options, **before}:
        value = options.get(name)
        if before.get(name) != value:
            raise ConfigError(
                f"{name}={_shown(value)}: the answers in {manifest.parent} were begun with"
                f" {_shown(before.get(name))}; allowed: that, or another {OUTPUT}"
            )


def _shown(value: Any) -> str:
    """Of a list of files their digests' beginnings."""
    if isinstance(value, list):
        return ", ".join(f"{item['file']} ({item['sha256'][:8]})" for item in value)
    return json.dumps(value)


def check_model(cfg: DictConfig) -> None:
    """Raise ConfigError where the model of a local backend is none that answers."""
    node = cfg.mode.backend.get("target")
    if node is None:
        return
    factory = locate(node._target_, "model._target_")
    if inspect.signature(factory).return_annotation is not CausalTarget:
        raise ConfigError(
            f"model={node.get('name')}: not a model that answers; allowed: tiny_causal, smollm2,"
            " qwen3_0p6b, qwen3_4b and others that are a CausalTarget"
        )


@dataclass
class _Tally:
    """What has been answered in this run."""

    rows: int = 0
    tokens: int = 0
    capped: int = 0
    failed: int = 0
    started: float = field(default_factory=time.monotonic)

    def add(self, result: GenerationResult) -> None:
        self.rows += 1
        self.tokens += result.num_tokens
        self.capped += result.finish == "length"
        self.failed += result.error is not None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def _answer(
    prompts: Prompts, journal: Journal, generator: Generator, thinking: bool, failed: Path
) -> dict[str, float]:
    """Answer what the journal lacks; tokens and seconds of that."""
    missing = sum(row_id not in journal for row_id in prompts.sources)
    waiting: dict[str, Row] = {}
    tally = _Tally()
    target = generator.identity()["target"]
    with failed.open("wb") as failures, _progress(missing) as tick:
        for result in generator.generate(_requests(prompts, journal, waiting)):
            row = waiting.pop(result.id)
            tally.add(result)
            if result.error is None:
                journal.append(answered(row, result, target, thinking))
            else:
                line = {"id": row["id"], "source": row["source"], "error": result.error}
                failures.write(encode_row(line))
                failures.flush()
            tick(tally)
    assert not waiting, "every request has a result"
    return {"tokens": tally.tokens, "seconds": tally.seconds}


def _requests(
    prompts: Iterable[Row], journal: Journal, waiting: dict[str, Row]
) -> Iterator[GenerationRequest]:
    """Requests for the prompts without an answer, which are noted in `waiting`."""
    for row in prompts:
        if row["id"] not in journal:
            waiting[row["id"]] = row
            yield GenerationRequest(row["id"], messages=messages_of(row))


def answered(row: Row, result: GenerationResult, target: str, thinking: bool) -> Row:
    """The row of a prompt with its answer, in place of any that it had."""
    answer: Row = {"response": result.text}
    if result.token_ids is not None:
        answer["response_ids"] = result.token_ids
    if result.retokenised:
        answer["retokenised"] = True
    answer |= {"finish": result.finish, "thinking": thinking, "target": target}
    # Without ids nothing else tells the length.
    answer["num_tokens"] = result.num_tokens
    return {key: value for key, value in row.items() if key not in ANSWER} | answer


def count(prompts: Prompts, journal: Journal) -> dict[str, dict[str, int]]:
    """Per source: rows, answered, capped (ended by the limit), failed, tokens."""
    counts: dict[str, Counter[str]] = {}
    for row_id, source in prompts.sources.items():
        found = counts.setdefault(source, Counter(rows=0, answered=0, capped=0, failed=0, tokens=0))
        found["rows"] += 1
        if row_id not in journal:
            found["failed"] += 1
            continue
        row = journal.read(row_id)
        found["answered"] += 1
        found["capped"] += row["finish"] == "length"
        found["tokens"] += row["num_tokens"]
    return {source: dict(found) for source, found in sorted(counts.items())}


def write_answers(path: Path, prompts: Prompts, journal: Journal) -> str:
    """Write the answered rows in the order of the prompts; the file's sha256."""
    digest = hashlib.sha256()
    with atomic_file(path, OUTPUT) as file:
        for row_id in prompts.sources:
            if row_id in journal:
                line = encode_row(journal.read(row_id))
                digest.update(line)
                file.write(line)
    return digest.hexdigest()


def metrics_of(counts: dict[str, dict[str, int]], fresh: dict[str, float]) -> dict[str, float]:
    """The figures over all sources."""
    names = ("rows", "answered", "failed", "capped", "tokens")
    metrics: dict[str, float] = {n: sum(found[n] for found in counts.values()) for n in names}
    if metrics["answered"]:
        capped, total = int(metrics["capped"]), int(metrics["answered"])
        low, high = wilson_interval(capped, total)
        metrics |= {"capped_rate": capped / total, "capped_low": low, "capped_high": high}
    if fresh["tokens"]:
        metrics["tokens_per_s"] = round(fresh["tokens"] / fresh["seconds"], 2)
    return metrics


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[_Tally], None]]:
    """A bar over the prompts with the speed in tokens, on a terminal if there is one."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.description}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, *times, console=Console(stderr=True))
    task = progress.add_task("answers", total=total)

    def tick(tally: _Tally) -> None:
        speed = tally.tokens / max(tally.seconds, 1e-9)
        what = f"{speed:.0f} tokens/s, {tally.capped} capped, {tally.failed} failed"
        progress.update(task, completed=tally.rows, description=what)

    with progress if sys.stderr.isatty() else contextlib.nullcontext():
        yield tick
