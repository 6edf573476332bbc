"""Learning-rate schedules: a factor in [0, 1] for every optimiser step.

Each is a function of the step and of the explicit length of the run. Progress is clamped to [0, 1],
so a run that goes on past its end stays at the floor and no schedule can rise after its peak.
"""

import math


def _warmup(step: int, warmup_steps: int) -> float:
    """Linear from 1/warmup at the first step to 1; never 0, so that no step is wasted."""
    return min(1.0, (step + 1) / max(1, warmup_steps))


def _progress(step: int, total_steps: int, warmup_steps: int) -> float:
    """Fraction of the run after the warm-up that is over, clamped to [0, 1]."""
    return min(1.0, max(0.0, (step - warmup_steps) / max(1, total_steps - warmup_steps)))


def constant_warmup(step: int, total_steps: int, *, warmup_steps: int) -> float:
    """Linear warm-up, then 1."""
    return _warmup(step, warmup_steps)


def cosine_warmup(step: int, total_steps: int, *, warmup_steps: int, floor: float = 0.0) -> float:
    """Linear warm-up, then half a cosine from 1 to `floor` at the last step."""
    cosine = 0.5 * (1.0 + math.cos(math.pi * _progress(step, total_steps, warmup_steps)))
    return _warmup(step, warmup_steps) * (floor + (1.0 - floor) * cosine)


def linear_warmup(step: int, total_steps: int, *, warmup_steps: int, floor: float = 0.0) -> float:
    """Linear warm-up, then a straight line from 1 to `floor` at the last step."""
    line = 1.0 - _progress(step, total_steps, warmup_steps)
    return _warmup(step, warmup_steps) * (floor + (1.0 - floor) * line)
