"""What a process that parses does in its own way: memory that is short, unused objects, threads."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager


def is_lack_of_memory(error: Exception) -> bool:
    """Whether memory was short, as Python and torch say it."""
    import torch

    # On the CPU torch has no type for it.
    on_cpu = "not enough memory" in str(error) or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or on_cpu


@contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python does not look for unused objects by itself."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@contextmanager
def one_thread(wanted: bool) -> Iterator[None]:
    """Inside, sums are added up in an order that does not depend on the number of cores."""
    import torch

    before = torch.get_num_threads()
    if wanted:
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
