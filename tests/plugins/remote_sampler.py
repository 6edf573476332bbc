"""A sampler in place of a server that has the weights of training, and can leave samples open."""

from dataclasses import replace
from typing import Any, ClassVar

from decoding.rollout import LocalRollouts
from decoding.rollout_record import Rollout, RolloutSettings
from decoding.rollout_server import ERROR


class RemoteSampler:
    """As `decoding.rollout_server.ServerRollouts`; notes what it is asked for.

    Args:
        failing: number of the sample of every prefix that gets no answer; -1: none.
    """

    calls: ClassVar[list[str]] = []

    def __init__(self, failing: int = -1) -> None:
        self.failing = failing

    def follow(self, model: Any) -> None:
        """Take the weights."""
        self.calls.append("follow")
        self.model = model

    def rollouts(self, settings: RolloutSettings, forbidden_V: Any) -> "RemoteSampler":
        """Itself."""
        self.settings, self.forbidden_V = settings, forbidden_V
        return self

    def sample(self, prompts: list, samples: int) -> list[Rollout]:
        """Those of this process."""
        self.calls.append("sample")
        local = LocalRollouts(self.model, self.settings, self.forbidden_V)
        return [self._left_open(one) for one in local.sample(prompts, samples)]

    def _left_open(self, one: Rollout) -> Rollout:
        if one.k != self.failing:
            return one
        return replace(
            one, thought_ids=[], suffix_ids=[], thought_logprobs=[], suffix_logprobs=[],
            thought_finish=ERROR, suffix_finish=ERROR, closed_autonomously=False,
        )  # fmt: skip

    def close(self) -> None:
        """The run is over."""
        self.calls.append("close")
