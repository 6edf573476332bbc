"""Answers to benchmarks as rows: asked once each, kept as they come, then graded and counted."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from data.errors import DataError
from data.few_shot import Prompt
from data.journal import Journal
from decoding.generate import GenerationRequest, GenerationResult, Generator
from evaluation.statistics import wilson_interval

Row = dict[str, Any]
Encode = Callable[[str], Sequence[int]]
Tick = Callable[[int], None]


class Verdict(Protocol):
    """What a grader says of an answer (`rewards.verdict.Verdict`)."""

    @property
    def correct(self) -> bool:
        """Whether it is right."""
        ...

    @property
    def extracted(self) -> str | None:
        """What was taken for the answer; None if nothing was found."""
        ...

    @property
    def reason(self) -> str:
        """Why, where it is not plain."""
        ...


@dataclass
class Answered:
    """What was answered just now.

    Attributes:
        errors: why an item has no answer, by its id.
        tokens: of the answers.
        seconds: it took.
    """

    errors: dict[str, str]
    tokens: int
    seconds: float


@dataclass(frozen=True)
class Score:
    """One benchmark of one model.

    Attributes:
        items: asked; an item without an answer is a wrong one.
        correct: of them.
        accuracy: correct / items.
        low, high: its 95 % interval (Wilson).
        errors: items without an answer.
        capped: answers that the limit ended.
        capped_rate: of all items.
        tokens: of all answers.
        expected: items of the complete benchmark, if that is known.
        nfe: mean forward passes per answer, of those that were counted; None if none was.
        tokens_per_forward: tokens over passes, of the same answers.
        tokens_per_s: of what was answered in this run; None if nothing was.
        work: means per answer of whatever else was counted, by name.
    """

    items: int
    correct: int
    accuracy: float
    low: float
    high: float
    errors: int
    capped: int
    capped_rate: float
    tokens: int
    expected: int | None = None
    nfe: float | None = None
    tokens_per_forward: float | None = None
    tokens_per_s: float | None = None
    work: dict[str, float] = field(default_factory=dict)


def answer_prompts(
    task: str,
    prompts: Sequence[Prompt],
    generator: Generator,
    journal: Journal,
    encode: Encode | None,
    tick: Tick,
) -> Answered:
    """Let the model answer what the journal lacks.

    Args:
        task: the benchmark's name.
        prompts: of it.
        generator: who answers.
        journal: where answers are kept as they come.
        encode: turns a text into the tokens of a prompt; None leaves that to the generator.
        tick: told of every item done.

    Raises:
        DataError: the journal has an answer to another prompt under the same id.
    """
    waiting: dict[str, tuple[Prompt, int | None]] = {}
    errors: dict[str, str] = {}
    started, tokens = time.monotonic(), 0
    asked = _requests(prompts, journal, encode, waiting, errors, tick)
    for result in generator.generate(asked):
        prompt, length = waiting.pop(result.id)
        if result.error is None:
            journal.append(_answer_row(task, prompt, length, result))
            tokens += result.num_tokens
        else:
            errors[result.id] = result.error
        tick(1)
    assert not waiting, "every request has a result"
    return Answered(errors, tokens, time.monotonic() - started)


def _requests(
    prompts: Sequence[Prompt],
    journal: Journal,
    encode: Encode | None,
    waiting: dict[str, tuple[Prompt, int | None]],
    errors: dict[str, str],
    tick: Tick,
) -> Iterator[GenerationRequest]:
    """Requests for the prompts without an answer, which are noted in `waiting`; one that cannot
    become tokens is noted in `errors`."""
    for prompt in prompts:
        if prompt.id in journal:
            if journal.read(prompt.id)["prompt_hash"] != prompt.hash:
                raise DataError(
                    f"{journal.path}: {prompt.id!r} was answered under another prompt; allowed:"
                    " another paths.run_dir"
                )
            continue
        try:
            request = _request(prompt, encode)
        except ValueError as error:
            errors[prompt.id] = str(error)
            tick(1)
            continue
        length = None if request.prompt_ids is None else len(request.prompt_ids)
        waiting[prompt.id] = prompt, length
        yield request


def _request(prompt: Prompt, encode: Encode | None) -> GenerationRequest:
    if prompt.text is None:
        return GenerationRequest(prompt.id, messages=prompt.messages)
    if encode is None:
        return GenerationRequest(prompt.id, prompt=prompt.text)
    return GenerationRequest(prompt.id, prompt_ids=encode(prompt.text))


def _answer_row(task: str, prompt: Prompt, length: int | None, result: GenerationResult) -> Row:
    return {
        "id": prompt.id,
        "task": task,
        "prompt_hash": prompt.hash,
        "num_prompt_tokens": length,
        "text": result.text,
        "num_tokens": result.num_tokens,
        "finish": result.finish,
        "work": result.work,
    }


def item_row(task: str, prompt: Prompt, answer: Row | None, error: str | None) -> Row:
    """A row of items.jsonl before its verdict; an item without an answer says why."""
    if answer is None:
        assert error is not None, "an item is answered, or there is a reason why not"
        result = GenerationResult(prompt.id, error=error)
        return {**_answer_row(task, prompt, None, result), "error": error}
    return {**answer, "error": None}


def with_verdict(row: Row, verdict: Verdict | None) -> Row:
    """The row with what a grader said of it; without an answer it is wrong."""
    if verdict is None:
        return {**row, "extracted": None, "correct": False, "reason": "no answer"}
    return {
        **row,
        "extracted": verdict.extracted,
        "correct": verdict.correct,
        "reason": verdict.reason,
    }


def score(rows: Sequence[Mapping[str, Any]], expected: int | None, fresh: Answered) -> Score:
    """Count the rows of one benchmark.

    Args:
        rows: with verdicts.
        expected: items of the complete benchmark.
        fresh: what was answered in this run.
    """
    correct = sum(row["correct"] for row in rows)
    low, high = wilson_interval(correct, len(rows))
    capped = sum(row["finish"] == "length" for row in rows)
    passes, written = forward_passes(rows)
    counted = sum(passes_of(row) is not None for row in rows)
    return Score(
        items=len(rows),
        correct=correct,
        accuracy=correct / len(rows),
        low=low,
        high=high,
        errors=sum(row["error"] is not None for row in rows),
        capped=capped,
        capped_rate=capped / len(rows),
        tokens=sum(row["num_tokens"] for row in rows),
        expected=expected,
        nfe=passes / counted if counted else None,
        tokens_per_forward=written / passes if passes else None,
        tokens_per_s=fresh.tokens / fresh.seconds if fresh.tokens else None,
        work=mean_work(rows),
    )


def mean_work(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Means of what was counted besides passes, each over the answers that have it."""
    counted = [row["work"] for row in rows if row["work"]]
    names = dict.fromkeys(name for work in counted for name in work if name != "nfe")
    values = {name: [work[name] for work in counted if name in work] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}


def passes_of(row: Mapping[str, Any]) -> float | None:
    """Forward passes of an answer, if somebody counted them."""
    return (row["work"] or {}).get("nfe")


def forward_passes(rows: Sequence[Mapping[str, Any]]) -> tuple[float, int]:
    """Passes, and tokens, of the answers whose passes were counted."""
    counted = [(passes_of(row), row["num_tokens"]) for row in rows]
    known = [(passes, tokens) for passes, tokens in counted if passes is not None]
    return sum(passes for passes, _ in known), sum(tokens for _, tokens in known)
