"""Samples of a reasoning evaluation as rows, and from rows the counts that its tables need."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from data.errors import DataError
from data.few_shot import Prompt
from data.fingerprint import fingerprint
from data.multiple_choice import LETTERS
from evaluation.benchmark_run import Row, Verdict
from evaluation.reasoning import MACRO, Problem, Problems

UNCLOSED = "the thought is not closed"


@dataclass(frozen=True)
class Thoughts:
    """How thoughts are told from answers.

    Attributes:
        open, close: the delimiters.
        begun: the prompt has opened one.
    """

    open: str
    close: str
    begun: bool = False

    def answer(self, completion: str) -> str | None:
        """What stands outside thoughts; None where one is not closed.

        A closing delimiter before any opening one ends a thought that the prompt (a chat template,
        say) has opened.
        """
        first, closed = completion.find(self.open), completion.find(self.close)
        inside = self.begun or (closed >= 0 and not 0 <= first < closed)
        said: list[str] = []
        rest = completion
        while True:
            if inside:
                _, found, rest = rest.partition(self.close)
                if not found:
                    return None
            text, found, rest = rest.partition(self.open)
            said.append(text)
            if not found:
                return "".join(said)
            inside = True


def samples_of(prompts: Sequence[Prompt], number: int, prefix: str = "") -> list[Prompt]:
    """Every prompt so many times side by side, each time under an id of its own.

    Args:
        prompts: of a benchmark.
        number: n.
        prefix: what a text goes on with.
    """
    assert not prefix or all(prompt.text is not None for prompt in prompts)
    return [
        Prompt(
            {**prompt.row, "id": sample_id(prompt.id, sample)},
            None if prompt.text is None else prompt.text + prefix,
            prompt.messages,
        )
        for prompt in prompts
        for sample in range(number)
    ]


def sample_id(problem: str, sample: int) -> str:
    """The id under which a sample is asked for and kept."""
    return f"{problem}/{sample}"


def sample_row(
    arm: str,
    prompt: Prompt,
    answer: Row,
    verdict: Verdict,
    seed: int,
    grader: str,
) -> Row:
    """A row of BENCHMARK.jsonl.

    Args:
        arm: name of the arm.
        prompt: of the sample (`samples_of`).
        answer: the row of the journal.
        verdict: on what it says outside thoughts.
        seed: of the run.
        grader: who judged (`grader_version`).
    """
    problem, _, sample = prompt.id.rpartition("/")
    return {
        "arm": arm,
        "benchmark": answer["task"],
        "id": problem,
        "sample_idx": int(sample),
        "gold": prompt.row.get("answer"),
        "choices": choices_of(prompt.row),
        "prediction": verdict.extracted,
        "correct": verdict.correct,
        "reason": verdict.reason,
        "completion": answer["text"],
        "completion_tokens": answer["num_tokens"],
        "finish_reason": answer["finish"],
        "seed": seed,
        "prompt_sha": answer["prompt_hash"],
        "grader_version": grader,
    }


def choices_of(row: Mapping[str, Any]) -> int | None:
    """How many choices an item shows, "(A) ..." on a line of its own; None: it has none."""
    shown = row.get("choices")
    if not isinstance(shown, str):
        return None
    marks = {line[:4] for line in shown.splitlines()}
    count = next((n for n, letter in enumerate(LETTERS) if f"({letter}) " not in marks), None)
    return len(LETTERS) if count is None else (count or None)


def grader_version(said: Any) -> str:
    """16 hexadecimal digits of what a grader says of itself (`rewards.verdict.Grader`)."""
    return fingerprint(said)


def remarks(benchmark: str, rows: Sequence[Row], expected: int | None) -> list[str]:
    """What a reader of one arm's numbers of a benchmark must know.

    Args:
        benchmark: its name.
        rows: of its samples.
        expected: problems of the complete benchmark, if that is known.
    """
    problems = len({row["id"] for row in rows})
    capped = sum(row["finish_reason"] == "length" for row in rows)
    unclosed = sum(row["reason"] == UNCLOSED for row in rows)
    uncounted = sum(row["completion"] != "" and row["completion_tokens"] == 0 for row in rows)
    counted = {
        "were ended by the limit": capped,
        "end within a thought and have no answer": unclosed,
        "have a text but no count of tokens, so that the mean is too low": uncounted,
    }
    notes = [
        f"{count} of {len(rows)} completions {what}" for what, count in counted.items() if count
    ]
    if expected not in (None, problems):
        notes.insert(0, f"{problems} problems; the complete benchmark has {expected}")
    return [f"{benchmark}: {note}" for note in notes]


class Sample(NamedTuple):
    """What a table needs of a row."""

    correct: bool
    tokens: int
    choices: int | None
    gold: Any
    prompt: str
    grader: str


# By (id, sample_idx); by benchmark; by arm.
Samples = dict[tuple[str, int], Sample]
Arms = dict[str, dict[str, Samples]]


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


_FIELDS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "arm": (_is_text, "a text"),
    "benchmark": (_is_text, "a text"),
    "id": (_is_text, "a text"),
    "sample_idx": (_is_count, "an integer >= 0"),
    "correct": (lambda v: isinstance(v, bool), "true, false"),
    "completion_tokens": (_is_count, "an integer >= 0"),
    "choices": (lambda v: v is None or (_is_count(v) and v >= 1), "an integer >= 1 or null"),
    "prompt_sha": (_is_text, "a text"),
    "grader_version": (_is_text, "a text"),
}


def add_rows(arms: Arms, rows: Iterable[tuple[str, Mapping[str, Any]]]) -> None:
    """Add the rows of a file, each after its place `FILE:LINE`, to what is known of their arms.

    Raises:
        DataError: a row that lacks something, or a sample that is there already, by its place.
    """
    for place, row in rows:
        for field, (is_kind, kind) in _FIELDS.items():
            # Rows of somebody else's making may know nothing of choices.
            if not is_kind(row.get(field)):
                value = json.dumps(row.get(field))[:40]
                raise DataError(f"{place}: {field}={value}; allowed: {kind}")
        samples = arms.setdefault(row["arm"], {}).setdefault(row["benchmark"], {})
        key = row["id"], row["sample_idx"]
        if key in samples:
            raise DataError(
                f"{place}: a second row of arm={row['arm']}, benchmark={row['benchmark']},"
                f" id={key[0]!r}, sample_idx={key[1]}; allowed: one of each"
            )
        samples[key] = Sample(
            row["correct"], row["completion_tokens"], row.get("choices"), row.get("gold"),
            row["prompt_sha"], row["grader_version"],
        )  # fmt: skip


def gather(
    arms: Mapping[str, Mapping[str, Samples]], benchmarks: Sequence[str]
) -> tuple[dict[str, dict[str, Problems]], list[str]]:
    """Counts per problem of all arms, in one order of benchmarks and problems, and remarks.

    A problem that one arm has all must have, and of a sample number that one has, all.

    Raises:
        DataError: an arm without a benchmark, a sample that is missing, or a benchmark with other
            right answers or another grader in another arm: which.
    """
    if MACRO in benchmarks:
        raise DataError(f"benchmark={MACRO}: is the name of the average; allowed: another one")
    found: dict[str, dict[str, Problems]] = {arm: {} for arm in arms}
    notes: list[str] = []
    number = 1 + max(
        key[1] for one in arms.values() for name in benchmarks for key in one.get(name, ())
    )
    for name in benchmarks:
        for arm, one in arms.items():
            if name not in one:
                raise DataError(
                    f"arm={arm}: no rows of benchmark={name}; allowed: arms that all have"
                    f" {', '.join(benchmarks)}, or mode.benchmarks without it"
                )
        # Resamples are drawn by place, so the place must not depend on the order of files.
        ids = sorted({key[0] for one in arms.values() for key in one[name]})
        for arm, one in arms.items():
            require_all(one[name], ids, number, f"arm={arm}, benchmark={name}")
            found[arm][name] = _problems(one[name], ids, number)
        notes += _compared(name, {arm: one[name] for arm, one in arms.items()}, ids)
    return found, notes


def require_all(
    samples: Iterable[tuple[str, int]], ids: Sequence[str], number: int, where: str
) -> None:
    """Raise DataError unless there are samples 0 .. n - 1 of every problem; it names some."""
    there = set(samples)
    missing = [(one, k) for one in ids for k in range(number) if (one, k) not in there]
    if missing:
        named = ", ".join(f"({one!r}, {k})" for one, k in missing[:3])
        more = ", ..." if len(missing) > 3 else ""
        raise DataError(
            f"{where}: {len(missing)} of {len(ids) * number} samples (id, sample_idx) are missing:"
            f" {named}{more}; run mode=reasoning_eval again, or merge all folders of the arm"
        )


def _problems(samples: Samples, ids: Sequence[str], number: int) -> Problems:
    found = []
    for one in ids:
        own = [samples[one, k] for k in range(number)]
        correct, tokens = sum(s.correct for s in own), sum(s.tokens for s in own)
        found.append(Problem(correct, tokens, own[0].choices))
    return Problems(number, found)


def _compared(name: str, arms: Mapping[str, Samples], ids: Sequence[str]) -> list[str]:
    """What makes a comparison of arms less than fair.

    Raises:
        DataError: it is none.
    """
    (first, base), *others = arms.items()
    graders = {sample.grader for one in arms.values() for sample in one.values()}
    if len(graders) > 1:
        raise DataError(
            f"benchmark={name}: graded by {len(graders)} graders ({', '.join(sorted(graders))});"
            " allowed: one (run mode=reasoning_eval again in the same folders: answers are kept)"
        )
    notes = []
    for arm, one in others:
        for problem in ids:
            if one[problem, 0].gold != base[problem, 0].gold:
                raise DataError(
                    f"benchmark={name}: the right answer to {problem!r} is"
                    f" {base[problem, 0].gold!r} in arm={first} and {one[problem, 0].gold!r} in"
                    f" arm={arm}; allowed: the same"
                )
        other = sum(one[problem, 0].prompt != base[problem, 0].prompt for problem in ids)
        if other:
            notes.append(f"{name}: {other} of {len(ids)} problems were asked in another way in"
                         f" {arm} than in {first}")  # fmt: skip
    return notes
