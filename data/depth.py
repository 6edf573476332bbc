"""Dependency trees as features of words: how deep each hangs, and how deep its tree goes."""

from collections.abc import Sequence

# The features, and the columns of a batch that they become. The root has depth 0; a token without a
# word has `data.blocks.FEATURE_FILL` in both.
DEPTH, HEIGHT = "depth", "height"
MAX_DEPTH = 127  # what a feature column holds


def depths_from_heads(heads: Sequence[int]) -> tuple[int, ...]:
    """Number of arcs from each word up to the root (`heads` from 1, the root's head is 0).

    Raises:
        ValueError: a head that is no word, or a word that no path leads from to a root.
    """
    depths: list[int] = []
    for word, head in enumerate(heads, start=1):
        depth = 0
        while head:
            if not 0 < head <= len(heads):
                raise ValueError(f"word {word}: head {head} of a sentence of {len(heads)} words")
            head = heads[head - 1]
            depth += 1
            if depth >= len(heads):
                raise ValueError(f"word {word}: its heads go in a circle")
        depths.append(depth)
    return tuple(depths)


def tree_features(depths: Sequence[int]) -> dict[str, list[int]]:
    """Features of one sentence: `depth` of each word, and `height`, the greatest depth, at each.

    The height travels with every word, so that a depth can be normalised by its sentence wherever
    rows cut it. Both end at `MAX_DEPTH`.
    """
    height = min(max(depths, default=0), MAX_DEPTH)
    return {DEPTH: [min(d, MAX_DEPTH) for d in depths], HEIGHT: [height] * len(depths)}
