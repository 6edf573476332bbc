"""The ways a run can end early, and the exit code of each."""

import signal


class ConfigError(ValueError):
    """A wrong key, type, range or combination; one line with key, value and what is allowed."""

    exit_code = 2


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, unsafe or does not fit; one line with the file."""

    exit_code = 2


class NonFiniteError(RuntimeError):
    """A loss or gradient became inf or nan; raised before the weights were touched.

    Args:
        message: one line naming the step and the rows of the batch.
        step: optimiser steps completed before the failure, if known.
    """

    exit_code = 3

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class AuditError(Exception):
    """A finished run does not keep what it promises (`mode=audit`)."""

    exit_code = 1


class Interrupted(BaseException):
    """A signal asked the run to stop.

    Like `KeyboardInterrupt` it is not an `Exception`: code that survives failures (a sweep that
    goes on after a bad trial, a library's catch-all) must not survive the user's wish to stop.

    Args:
        signum: the signal; the exit code is 128 + signum (130 for SIGINT, 143 for SIGTERM).
        step: optimiser steps completed, if known.
    """

    def __init__(self, signum: int, step: int | None = None) -> None:
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.signum = signum
        self.step = step

    @property
    def exit_code(self) -> int:
        """128 + signum, the shell's convention."""
        return 128 + self.signum
