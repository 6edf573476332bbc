"""A count on the terminal while something long goes on."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import (
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

# Called with the number of things just done.
Tick = Callable[[int], None]


@contextlib.contextmanager
def counting(description: str, unit: str, total: int | None = None) -> Iterator[Tick]:
    """Count things on the terminal, if there is one.

    Args:
        description: what is going on.
        unit: what is counted, in the plural.
        total: how many there are, if known.
    """
    columns = (SpinnerColumn(), "{task.description}", MofNCompleteColumn(), unit)
    times = (TimeElapsedColumn(), *(() if total is None else (TimeRemainingColumn(),)))
    progress = Progress(*columns, *times, console=Console(stderr=True))
    task = progress.add_task(description, total=total)
    with progress if sys.stderr.isatty() else contextlib.nullcontext():
        yield lambda done: progress.advance(task, done)
