"""Random words: rows of the length and vocabulary that a benchmark asks for."""

from collections.abc import Iterator

import numpy as np


class RandomText:
    """Documents of `words_per_document` words out of `num_words`, each word at least once.

    With the `word` tokenizer the vocabulary has `num_words` + 5 ids.
    """

    splits = ("train", "validation")

    def __init__(self, num_words: int = 30_517, words_per_document: int = 126) -> None:
        self.name = "random_text"
        self.num_words, self.words_per_document = num_words, words_per_document

    def documents(self, split: str) -> Iterator[dict]:
        """Every word once in random order, then random words to fill 400 documents."""
        rng = np.random.default_rng(0)
        words = rng.permutation(self.num_words)
        filled = rng.integers(0, self.num_words, 400 * self.words_per_document - len(words))
        for row in np.concatenate([words, filled]).reshape(400, -1):
            yield {"text": " ".join(f"w{word}" for word in row)}

    def fingerprint(self) -> str:
        """Its two sizes."""
        return f"random-{self.num_words}-{self.words_per_document}"
