"""A progress bar that suits where it is shown."""

import sys

from lightning.pytorch.callbacks import ProgressBar, RichProgressBar, TQDMProgressBar


def progress_bar(refresh_rate: int = 1, refresh_rate_in_files: int = 50) -> ProgressBar:
    """A rich bar in a terminal; elsewhere a plain one that does not flood the log file.

    Args:
        refresh_rate: batches between two updates in a terminal.
        refresh_rate_in_files: the same where output is written to a file.
    """
    if sys.stdout.isatty():
        return RichProgressBar(refresh_rate=refresh_rate)
    return TQDMProgressBar(refresh_rate=refresh_rate_in_files)
