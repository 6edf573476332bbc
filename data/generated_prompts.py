"""Tasks that are generated and can be verified offline: the package reasoning-gym."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data.chat import Row
from data.errors import DataError
from data.prompt_sets import QUESTION, make_row

TRAIN, HELD_OUT = "train", "held_out"
SPLITS = (TRAIN, HELD_OUT)
# Item i of a dataset with seed s is drawn from the number s + i, so every seed and split has a
# stretch of numbers of its own; all of them fit into 32 bits.
STRETCH = 2**20
MAX_SEED = 2**32 // (len(SPLITS) * STRETCH) - 1
# Of a task with few different prompts so many are tried for each one wanted.
TRIES = 50


class ReasoningGymPrompts:
    """Prompts of several tasks, a train and a held-out split without a prompt in common.

    The splits are drawn with seeds of their own, and a train prompt that is also a held-out one
    is left out, as is every repetition, so both have exactly the size asked for. This holds for
    splits of the same seed and the same `held_out_size`.

    Rows carry `task`, `answer` and `metadata`, which with `question` are the entry that
    `reasoning_gym.get_score_answer_fn(task)` scores an answer against.

    Args:
        name: of the set; the `source` of a row is NAME/TASK.
        tasks: options of each task, {TASK: {OPTION: VALUE}}.
        split: train | held_out.
        train_size: prompts per task of the train split.
        held_out_size: prompts per task of the held-out split.
        seed: 0..2047.
        template: the prompt, `{question}` standing for the question.

    Raises:
        DataError: the package is not installed, a task or option does not exist, or a task has
            too few different prompts.
    """

    libraries = ("reasoning_gym",)

    def __init__(
        self,
        name: str,
        tasks: Mapping[str, Mapping[str, Any] | None],
        split: str,
        train_size: int,
        held_out_size: int,
        seed: int,
        template: str = QUESTION,
    ) -> None:
        if split not in SPLITS:
            raise DataError(f"prompts.split={split}: allowed: {', '.join(SPLITS)}")
        if not 0 <= seed <= MAX_SEED:
            raise DataError(f"prompts.seed={seed}: allowed: 0 to {MAX_SEED}")
        if not tasks:
            raise DataError("prompts.tasks={}: allowed: {TASK: {OPTION: VALUE}}")
        for key, size in (("train_size", train_size), ("held_out_size", held_out_size)):
            if not 0 <= size <= STRETCH // TRIES:
                raise DataError(f"prompts.{key}={size}: allowed: 0 to {STRETCH // TRIES}")
        if QUESTION not in template:
            raise DataError(f"prompts.template={template!r}: allowed: a text with {QUESTION}")
        self.name = name
        self.tasks = {task: dict(options or {}) for task, options in tasks.items()}
        self.split = split
        self.sizes = {TRAIN: train_size, HELD_OUT: held_out_size}
        self.seed = seed
        self.template = template
        self.expected = len(self.tasks) * self.sizes[split]

    def rows(self) -> Iterator[Row]:
        """The rows of the split, task by task."""
        # Not only of the task itself: the same question may belong to two of them.
        held_out: set[str] = set()
        rows = [row for task in self.tasks for row in self._draw(task, HELD_OUT, held_out)]
        if self.split == TRAIN:
            seen = set(held_out)
            rows = [row for task in self.tasks for row in self._draw(task, TRAIN, seen)]
        yield from rows

    def fingerprint(self) -> Any:
        """The options; the version of the package is noted beside them."""
        return {
            "name": self.name, "tasks": self.tasks, "order": list(self.tasks), "split": self.split,
            "sizes": self.sizes, "seed": self.seed, "template": self.template,
        }  # fmt: skip

    def _draw(self, task: str, split: str, seen: set[str]) -> Iterator[Row]:
        """Rows whose prompts are not in `seen`, which grows."""
        wanted = self.sizes[split]
        start = (len(SPLITS) * self.seed + SPLITS.index(split)) * STRETCH
        dataset = self._dataset(task, start, max(1, wanted * TRIES))
        found = 0
        for number in range(wanted * TRIES):
            if found == wanted:
                return
            row = self._row(task, split, number, dataset)
            if row["prompt_hash"] not in seen:
                seen.add(row["prompt_hash"])
                found += 1
                yield row
        if found < wanted:
            raise DataError(
                f"prompts.tasks.{task}: {wanted} different prompts wanted for {split}, found"
                f" {found} in {wanted * TRIES}; allowed: fewer, or options with more variety"
            )

    def _row(self, task: str, split: str, number: int, dataset: Any) -> Row:
        entry = dataset[number]
        name = f"{self.name}/{task}"
        place = f"{name}/{split}/{number}"
        # A few tasks note fractions or dates, which JSON lacks; they become text.
        metadata = json.loads(json.dumps(entry["metadata"], default=str))
        more = {"task": task, "answer": entry["answer"], "metadata": metadata}
        return make_row(place, name, entry["question"], self.template, more, place)

    def _dataset(self, task: str, seed: int, size: int) -> Any:
        try:
            import reasoning_gym
        except ImportError as error:
            raise DataError(
                "prompts=reasoning_gym: needs the package `reasoning_gym`; allowed: pip install it"
            ) from error
        try:
            return reasoning_gym.create_dataset(task, seed=seed, size=size, **self.tasks[task])
        # What its checks raise: an unknown task, an unknown option, a value out of range.
        except (ValueError, TypeError, AssertionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise DataError(f"prompts.tasks.{task}: {reason}") from error
