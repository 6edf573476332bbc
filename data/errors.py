"""The error a user sees when data, a tokenizer or a cache file is at fault."""


class DataError(ValueError):
    """Bad data, tokenizer or cache: one line that names the file (and row), and what to do."""
