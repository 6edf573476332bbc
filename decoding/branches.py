"""Rollouts for a pass of training, with every prompt in it once.

The K samples of a prefix begin with the same prompt; training reads it once and the samples as its
branches (`models.backbone.Backbone.read_branches`).

Legend: P prompts of L tokens, N rollouts of Q tokens, M tokens that the model chose.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from decoding.rollout_record import Rollout


class Branches(NamedTuple):
    """Rollouts for a pass of training that reads every prompt once (`Backbone.read_branches`).

    A branch begins with the last token of its prompt, which predicts the first one that was
    sampled. Padding stands on the right.

    Attributes:
        prefix_PL, length_P: prompts without their last token, and how long they are.
        branch_NQ: what is read of every rollout.
        owner_N: its prompt.
        place_M: places of the flattened [N, Q] whose next token the model chose.
    """

    prefix_PL: Tensor
    length_P: Tensor
    branch_NQ: Tensor
    owner_N: Tensor
    place_M: Tensor


def branches(rollouts: Sequence[Rollout], with_boundary: bool = True) -> Branches:
    """Rollouts by the prompts that they share.

    Args:
        rollouts: at least one.
        with_boundary: see `Rollout.chosen`.
    """
    prompts: dict[tuple[int, ...], int] = {}
    owners = [prompts.setdefault(tuple(one.prompt_ids), len(prompts)) for one in rollouts]
    prefix_PL = _padded([prompt[:-1] for prompt in prompts])
    branch_NQ = _padded([[one.prompt_ids[-1], *one.sampled_ids] for one in rollouts])
    chosen_NQ = _padded([one.chosen(with_boundary) for one in rollouts], branch_NQ.shape[1])
    lengths = torch.tensor([len(prompt) - 1 for prompt in prompts])
    place_M = chosen_NQ.flatten().nonzero()[:, 0]
    return Branches(prefix_PL, lengths, branch_NQ, torch.tensor(owners), place_M)


def _padded(rows: Sequence[Sequence[int]], width: int | None = None) -> Tensor:
    longest = max(1, *map(len, rows)) if width is None else width
    padded = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        padded[place, : len(row)] = torch.tensor(row, dtype=torch.long)
    return padded
