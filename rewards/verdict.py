"""What a grader says about a text, and how many texts are graded at once."""

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

# An item is a row of `data.prompt_sets`.
Item = Mapping[str, Any]


@dataclass(frozen=True)
class Verdict:
    """What a grader says.

    Attributes:
        correct: whether the text solves the item.
        extracted: what was read out of the text as its answer; None: nothing was found.
        reason: one line where it is not plainly right or wrong.
        decided: false where the grader could not compare: it ran out of time or memory, its process
            died, or the item's answer is nothing that it understands. A benchmark counts that as
            not solved; a reward must not.
    """

    correct: bool
    extracted: str | None
    reason: str = ""
    decided: bool = True


NO_ANSWER = Verdict(False, None, "no answer found")


class Grader(Protocol):
    """Reads an answer out of a text and compares it with that of the item."""

    def grade(self, item: Item, text: str) -> Verdict:
        """The verdict on a text.

        Raises:
            ValueError: the item lacks what this grader needs.
        """
        ...

    def check(self, item: Item) -> None:
        """See that the item has what `grade` needs, before anybody has answered it.

        Raises:
            ValueError: it lacks something.
        """
        ...

    def fingerprint(self) -> dict[str, Any]:
        """Plain values that determine verdicts."""
        ...


def grade_many(
    grader: Grader,
    pairs: Sequence[tuple[Item, str]],
    workers: int = 1,
    tick: Callable[[int], None] | None = None,
) -> list[Verdict]:
    """Grade texts side by side.

    Args:
        grader: whose `grade` may be called from several threads.
        pairs: items and texts.
        workers: how many at a time; graders wait for processes, so about one per core.
        tick: told of every one, in order.

    Returns:
        The verdicts, in the order of the pairs.

    Raises:
        ValueError: no worker, or an item lacks what the grader needs.
    """
    if workers < 1:
        raise ValueError(f"workers={workers}: allowed: an integer >= 1")
    verdicts = []
    with ThreadPoolExecutor(workers) as pool:
        try:
            for verdict in pool.map(lambda pair: grader.grade(*pair), pairs):
                verdicts.append(verdict)
                if tick is not None:
                    tick(1)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return verdicts


def needed(item: Item, field: str, grader: str) -> str:
    """A text of an item that a grader cannot do without.

    Raises:
        ValueError: it is not there.
    """
    value = item.get(field)
    if not isinstance(value, str):
        raise ValueError(
            f"grader={grader}: item {item.get('id')!r}: {field}={value!r}; allowed: a text"
        )
    return value
