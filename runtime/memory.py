"""How the process keeps memory that tensors have given back."""

import ctypes

# Parameters of glibc's mallopt(3).
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_NEVER, _AHEAD = 2**31 - 1, 256 * 2**20


def keep_freed_memory() -> bool:
    """Let freed memory stay with the process; returns whether the C library could be told.

    A training step frees and takes the same few gigabytes again and again. By default glibc gives
    large blocks back to the system at once, and every new one is then zeroed page by page on first
    touch: a quarter of the time of loss and gradient of an output projection to 30,522 tokens. The
    peak is about what it was, but memory no longer shrinks after it.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return False
    options = (_MMAP_MAX, 0), (_TRIM_THRESHOLD, _NEVER), (_TOP_PAD, _AHEAD)
    return all(mallopt(option, value) for option, value in options)
