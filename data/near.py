"""Prompts that were seen before: the same by hash, or nearly the same by MinHash.

Two prompts are nearly the same if their shingles have a Jaccard similarity of at least the
threshold. MinHash with banding proposes candidates (Broder 1997; Leskovec et al., Mining of
Massive Datasets, 3.4): with P permutations in b bands of r, a pair of similarity s is proposed
with probability 1 - (1 - s^r)^b. The exact similarity of the shingles then decides, so no prompt
is removed on an estimate; what can be missed is a pair that was not proposed.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from data.errors import DataError
from data.shingles import jaccard, shingles

if TYPE_CHECKING:
    from datasketch import MinHash, MinHashLSH

EXACT, NEAR = "exact", "near"


@dataclass(frozen=True)
class NearRule:
    """When two prompts are nearly the same.

    Attributes:
        threshold: least Jaccard similarity, in (0, 1].
        permutations: of the MinHash; more find more, slower.
        shingle: words and signs of a shingle.
        recall: least probability that a pair right at the threshold is proposed, in (0, 1).
        seed: of the permutations.
    """

    threshold: float = 0.8
    permutations: int = 128
    shingle: int = 5
    recall: float = 0.99
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise DataError(f"threshold={self.threshold}: allowed: a number in (0, 1]")
        if not 0 < self.recall < 1:
            raise DataError(f"recall={self.recall}: allowed: a number in (0, 1)")
        for name in ("permutations", "shingle"):
            if getattr(self, name) < 1:
                raise DataError(f"{name}={getattr(self, name)}: allowed: an integer >= 1")

    def bands(self) -> tuple[int, int]:
        """(b, r): the longest bands, so the fewest candidates, that keep the recall.

        Raises:
            DataError: there are too few permutations for it.
        """
        for size in range(self.permutations, 0, -1):
            count = self.permutations // size
            if 1 - (1 - self.threshold**size) ** count >= self.recall:
                return count, size
        raise DataError(
            f"permutations={self.permutations}: cannot find pairs of threshold={self.threshold}"
            f" with recall={self.recall}; allowed: more permutations, or a lower recall"
        )


class Match(NamedTuple):
    """What a prompt was found to repeat.

    Attributes:
        reason: exact | near.
        name: of the prompt found, as it was added.
        similarity: Jaccard similarity of the shingles, 1 for an exact match.
    """

    reason: str
    name: str
    similarity: float


@dataclass(frozen=True)
class Sketch:
    """A prompt as the index compares it: computed once, to be looked up and then added."""

    key: str
    digest: bytes
    shingles: frozenset[str]
    minhash: "MinHash | None"


class PromptIndex:
    """Prompts seen so far, by `data.chat.prompt_key`.

    Args:
        rule: what counts as nearly the same; None: only exact repetitions count.

    Raises:
        DataError: a rule, but `datasketch` is not installed.
    """

    def __init__(self, rule: NearRule | None) -> None:
        self.rule = rule
        self._first: dict[bytes, str] = {}
        # Keys and names of the prompts of which one differs from the other.
        self._prompts: list[tuple[str, str]] = []
        self._bands: MinHashLSH | None = None
        if rule is not None:
            library = _datasketch()
            self._bands = library.MinHashLSH(num_perm=rule.permutations, params=rule.bands())
            # Its permutations cost more than what follows, and a copy shares them.
            self._blank = library.MinHash(num_perm=rule.permutations, seed=rule.seed)

    def __len__(self) -> int:
        return len(self._first)

    def sketch(self, key: str) -> Sketch:
        """Prepare a prompt key."""
        encoded = key.encode("utf-8", "surrogatepass")
        digest = hashlib.blake2b(encoded, digest_size=16).digest()
        parts = shingles(key, self.rule.shingle) if self.rule is not None else frozenset()
        return Sketch(key, digest, parts, self._minhash(parts) if parts else None)

    def add(self, sketch: Sketch, name: str) -> None:
        """Remember a prompt under a name; of exact repetitions the first one stays."""
        if sketch.digest in self._first:
            return
        self._first[sketch.digest] = name
        if self._bands is not None and sketch.minhash is not None:
            self._bands.insert(len(self._prompts), sketch.minhash, check_duplication=False)
            self._prompts.append((sketch.key, name))

    def find(self, sketch: Sketch) -> Match | None:
        """The prompt that this one repeats: exactly, else the most similar, of equals the first."""
        name = self._first.get(sketch.digest)
        if name is not None:
            return Match(EXACT, name, 1.0)
        if self.rule is None or self._bands is None or sketch.minhash is None:
            return None
        found = (self._compare(sketch, place) for place in self._bands.query(sketch.minhash))
        similarity, place = max(found, default=(0.0, 0))
        if similarity < self.rule.threshold:
            return None
        return Match(NEAR, self._prompts[-place][1], similarity)

    def _compare(self, sketch: Sketch, place: int) -> tuple[float, int]:
        """Similarity and negative place: the greatest is the most similar, of equals the first."""
        assert self.rule is not None
        other = shingles(self._prompts[place][0], self.rule.shingle)
        return jaccard(sketch.shingles, other), -place

    def _minhash(self, parts: frozenset[str]) -> "MinHash":
        made = self._blank.copy()
        made.update_batch(_encoded(sorted(parts)))
        return made


def _encoded(parts: Sequence[str]) -> list[bytes]:
    return [part.encode("utf-8", "surrogatepass") for part in parts]


def _datasketch() -> Any:
    try:
        import datasketch
    except ImportError as error:
        raise DataError(
            "mode.near: needs the library `datasketch`; allowed: null, or pip install datasketch"
        ) from error
    return datasketch
