"""The gradient of one optimiser step: of the whole global batch, guarded, clipped.

A global batch is cut over ranks and accumulation steps. Each part contributes a sum of weighted
losses and a sum of weights; the gradient that is wanted is that of their ratio,

    grad [ sum_parts (sum w l) / sum_parts (sum w) ],

which is not the mean of the parts' own ratios. So parts are backpropagated as they are, divided
only by their number of places, and the true normaliser is applied once, in the optimiser.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runtime.errors import NonFiniteError

_SHOWN_ROWS = 16


class StepReport(NamedTuple):
    """What one optimiser step was made of: loss per weight, gradient norm, total weight."""

    loss: Tensor
    norm: Tensor
    weight: Tensor


class _Verdict(NamedTuple):
    """Whether a step was finite, to be read when its event has passed."""

    step: int
    finite: Tensor
    rows: list[tuple[Tensor, Tensor]]
    event: Any


class GradientStep:
    """Adds up the parts of a global batch, then prepares the optimiser's step.

    Nothing here waits for the device. Whether a step was finite is decided there: the fused kernel
    skips a step whose flag is raised, and the host reads the flag one step later.

    Args:
        sum_over_ranks: all-reduce of a small tensor.
        gather: rows of all ranks, in rank order.
        least_weight: below it the weight counts as so much: a step without anything to learn from,
            where that can be, has a gradient of 0 and not of 0 / 0.
    """

    def __init__(
        self,
        sum_over_ranks: Callable[[Tensor], Tensor],
        gather: Callable[[Tensor], Tensor],
        least_weight: float = 0.0,
    ) -> None:
        self._sum, self._gather, self._least = sum_over_ranks, gather, least_weight
        self._totals: Tensor | None = None
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._verdict: _Verdict | None = None

    def add(self, loss: Tensor, weight: Tensor, places: int, index: Tensor, rows: Tensor) -> None:
        """Count in one part: its sums, its number of places, and the losses of its rows."""
        # Filled on the device: a tensor made of a Python number would be waited for.
        count = loss.new_full((), places, dtype=torch.float32)
        part = torch.stack([loss.detach().float(), weight.float(), count])
        self._totals = part if self._totals is None else self._totals + part
        self._rows.append((index, rows.detach()))

    def finish(
        self,
        optimizer: torch.optim.Optimizer,
        grads: list[Tensor],
        clip: float | None,
        step: int,
        sharded: bool,
    ) -> StepReport:
        """Normalise, guard and clip what has been backpropagated since the last step.

        The accumulated, rank-averaged gradient is that of (sum of losses) / (places). Normaliser,
        clipping factor and flag go into the fused kernel, so no pass over the gradients is added.

        Args:
            grads: gradients of this rank.
            clip: largest norm, None or 0 for none.
            step: number of the step, for the message.
            sharded: each rank holds its own part of the gradient.

        Raises:
            NonFiniteError: this step (CPU) or the one before (elsewhere) was not finite.
        """
        assert self._totals is not None, "an optimiser step without a training step"
        loss_sum, weight, places = self._sum(self._totals).unbind()
        shared = weight.clamp(min=self._least)
        loss, scale = loss_sum / shared, places / shared
        norm = torch.nn.utils.get_total_norm(grads, foreach=True).float()
        if sharded:
            norm = self._sum(norm.square()).sqrt()
        norm = norm * scale
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if clip:
            scale = scale * (clip / (norm + 1e-6)).clamp(max=1.0)
        # The fused kernel reads these two attributes; torch sets them for its GradScaler alone.
        optimizer.grad_scale = scale.reciprocal()  # type: ignore[attr-defined]
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
        self.check()
        self._verdict = self._flag(finite, step)
        self._totals, self._rows = None, []
        if finite.device.type == "cpu":
            self.check()
        return StepReport(loss, norm, weight)

    def _flag(self, finite: Tensor, step: int) -> _Verdict:
        event = None
        if finite.is_cuda:
            finite = finite.to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        return _Verdict(step, finite, self._rows, event)

    def check(self) -> None:
        """Read the last flag.

        Raises:
            NonFiniteError: it was raised; the kernel has not applied that step.
        """
        verdict, self._verdict = self._verdict, None
        if verdict is None:
            return
        if verdict.event is not None:
            verdict.event.synchronize()
        if bool(verdict.finite):
            return
        index = torch.cat([index.cpu() for index, _ in verdict.rows])
        losses = torch.cat([loss.cpu() for _, loss in verdict.rows])
        # Every rank has the same verdict and is here, but only one of them may know the rows.
        bad = self._gather(index[~torch.isfinite(losses)]).tolist()
        rows = bad or self._gather(index).tolist()
        shown = f"{rows[:_SHOWN_ROWS]}{' ...' if len(rows) > _SHOWN_ROWS else ''}"
        what = "loss" if bad else "gradient"
        raise NonFiniteError(
            f"non-finite {what} at step {verdict.step}, rows {shown}: the step was not applied",
            verdict.step,
        )
