"""The heads that Stanza's graph parser finds, and nothing else, without its slowest steps.

Legend: B sentences of a batch; L words of the longest one, with the root symbol at place 0.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np


def only_heads(model: Any) -> None:
    """Let a loaded parser compute heads alone; one of another kind stays as it is.

    The scores of the relations are most of the work at the output, and no head depends on them
    unless impossible pairs of relations are repaired. The search for the best tree is needed only
    where the best head of every word, taken alone, makes no tree.
    """
    from stanza.models.depparse.model import GraphParser
    from torch import Tensor, nn

    class NoRelations(nn.Module):
        """One relation, of which nothing is known."""

        def forward(self, heads: Tensor, dependents: Tensor) -> Tensor:
            """Scores [B, L, L, 1]."""
            return heads.new_zeros(*heads.shape[:2], dependents.shape[1], 1)

    if type(model) is not GraphParser:
        return
    if not model.args.get("use_arc_embedding"):
        model.deprel = NoRelations()
    model.decode_graph_predictions = _decode


def _decode(
    vocab: Any,
    batch_size: int,
    predictions: Sequence[np.ndarray],
    lengths: Sequence[int],
    resolve_head_constraints: bool = False,
) -> list[list[tuple[int, str]]]:
    """In place of Stanza's method: (head, relation) per word, without knowing the relation."""
    found = best_trees(predictions[0], np.asarray(lengths))
    return [[(head, "_") for head in heads] for heads in found]


def best_trees(scores_BLL: np.ndarray, length_B: np.ndarray) -> list[list[int]]:
    """Heads of the words of the best tree with one root, of every sentence.

    The best head of every word is an upper bound of all trees, so where these heads are a tree, it
    is the best one; else the best tree with any number of roots is, where it happens to have one.
    Only the rest needs the penalty on roots that makes Stanza's search slow (Chu-Liu-Edmonds with
    the reweighting of https://aclanthology.org/2021.emnlp-main.823).

    Args:
        scores_BLL: log-probability that word i of a sentence has head j.
        length_B: words of each sentence, the root symbol included.
    """
    places_L = np.arange(scores_BLL.shape[1])
    outside_BL = places_L >= length_B[:, None]
    head_BL = np.where(outside_BL[:, None, :], -np.inf, scores_BLL).argmax(2)
    head_BL[outside_BL] = 0
    head_BL[:, 0] = 0
    is_tree_B = _are_trees(head_BL, outside_BL)
    trees = []
    for sentence, length in enumerate(length_B):
        if is_tree_B[sentence]:
            heads = head_BL[sentence, 1:length]
        else:
            heads = _search(scores_BLL[sentence, :length, :length])
        trees.append([int(head) for head in heads])
    return trees


def _search(scores_LL: np.ndarray) -> np.ndarray:
    """Heads of the words of the best tree with one root."""
    from stanza.models.common.chuliu_edmonds import chuliu_edmonds, chuliu_edmonds_one_root

    heads = chuliu_edmonds(scores_LL.astype(np.float64))[1:]
    return heads if (heads == 0).sum() == 1 else chuliu_edmonds_one_root(scores_LL)[1:]


def _are_trees(head_BL: np.ndarray, outside_BL: np.ndarray) -> np.ndarray:
    """[B] whether the heads lead every word to the root symbol, and one word directly."""
    roots_B = ((head_BL == 0) & ~outside_BL).sum(1) - 1  # the root symbol is its own head
    ancestor_BL = head_BL
    for _ in range(int(head_BL.shape[1]).bit_length()):
        ancestor_BL = np.take_along_axis(ancestor_BL, ancestor_BL, 1)
    return (roots_B == 1) & (ancestor_BL == 0).all(1)
