"""What a frozen target has to say to a draft: features of its layers, and what comes next.

Legend: B rows, L tokens, U places that are asked about, D features, E width of all tapped layers, V
vocabulary.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from models.taps import TargetTaps
from objectives.acceptance import AcceptanceObjective
from objectives.fused_acceptance import teacher_summary


class TargetReading(NamedTuple):
    """What the target says of a batch: features [B, L, E], and its predictions at U places.

    Either e = W^T p [U, D] and H(p) [U], or, for losses that need all of p, the last hidden states
    [U, D]; all None where the loss does not ask the target.
    """

    taps_BLE: Tensor
    expected_UD: Tensor | None
    entropy_U: Tensor | None
    hidden_UD: Tensor | None

    @property
    def asked(self) -> bool:
        """Whether there are predictions."""
        return self.expected_UD is not None or self.hidden_UD is not None


@torch.no_grad()
def read_target(
    taps: TargetTaps,
    head_VD: Float[Tensor, "V D"],
    ids_BL: Int[Tensor, "B L"],
    places_BL: Int[Tensor, "B L"],
    asked_U: Int[Tensor, " U"],
    objective: AcceptanceObjective,
) -> TargetReading:
    """One pass of the target, no further than the objective needs.

    Args:
        taps: of the target.
        head_VD: its output layer.
        ids_BL, places_BL: tokens, and their places inside their documents.
        asked_U: places in the flattened [B * L] at which the objective asks for predictions.
        objective: of the draft.
    """
    needs = objective.needs_kl or objective.needs_distribution
    output = taps.run(ids_BL, position_ids=places_BL, last_hidden=needs)
    if output.last_hidden_BSD is None:
        return TargetReading(output.taps_BSE, None, None, None)
    hidden_UD = output.last_hidden_BSD.flatten(0, 1)[asked_U]
    if objective.needs_distribution:
        return TargetReading(output.taps_BSE, None, None, hidden_UD)
    summary = teacher_summary(hidden_UD, head_VD, temperature=objective.temperature)
    return TargetReading(output.taps_BSE, *summary, None)
