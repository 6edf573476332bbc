"""The options of a generation: `sampling.*` of a configuration, checked."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from decoding.reveal import Ancestral, FirstHitting, RevealRule
from decoding.stopping import check_entropy_rule

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Steps of the ancestral sampler where neither sampling.num_steps nor algo.T says otherwise.
DEFAULT_STEPS = 1000


@dataclass(frozen=True)
class SamplingConfig:
    """How to generate; the keys of `sampling.*`.

    Attributes:
        length: tokens per sequence, BOS and prompt included; None is the model's length.
        strategy: the reveal rule.
        nucleus_p: draw from the most probable tokens up to this mass.
        temperature: 0 is greedy.
        kv_cache: keep keys and values of finished tokens (where the model has such).
        var_length: stop at EOS or when a sequence repeats itself; otherwise the length is fixed.
        entropy_window: tokens looked at for repetition.
        min_entropy: least unigram entropy of that window, nats; 0 switches the rule off.
        float64: draw tokens in double precision.
        precision: fp32 or bf16; the weights are cast outright.

    Raises:
        ValueError: a value outside its range.
    """

    length: int | None = None
    strategy: RevealRule = field(default_factory=FirstHitting)
    nucleus_p: float = 1.0
    temperature: float = 1.0
    kv_cache: bool = True
    var_length: bool = False
    entropy_window: int = 256
    min_entropy: float = 4.0
    float64: bool = False
    precision: str = "fp32"

    def __post_init__(self) -> None:
        if not 0.0 < self.nucleus_p <= 1.0:
            raise ValueError(f"sampling.nucleus_p={self.nucleus_p}: allowed (0, 1]")
        if not self.temperature >= 0.0:
            raise ValueError(f"sampling.temperature={self.temperature}: allowed [0, inf)")
        if self.precision not in PRECISIONS:
            allowed = ", ".join(PRECISIONS)
            raise ValueError(f"sampling.precision={self.precision}: allowed {allowed}")
        if self.length is not None and self.length < 1:
            raise ValueError(f"sampling.length={self.length}: allowed an integer >= 1")
        check_entropy_rule(self.entropy_window, self.min_entropy)

    @classmethod
    def from_options(
        cls, options: Mapping[str, Any], strategy: RevealRule | None = None, num_steps: int = 0
    ) -> "SamplingConfig":
        """From the section `sampling` of a configuration.

        Args:
            options: the section; keys that are not about a single generation are ignored.
            strategy: the rule of `sampling.strategy`, built; None takes `first_hitting`, or the
                ancestral sampler where that is false.
            num_steps: `algo.T`, used where `sampling.num_steps` is null.
        """
        if strategy is None and options["first_hitting"]:
            strategy = FirstHitting(options["tokens_per_step"])
        elif strategy is None:
            strategy = Ancestral(options["num_steps"] or num_steps or DEFAULT_STEPS)
        names = {item.name for item in fields(cls)} - {"strategy"}
        return cls(strategy=strategy, **{k: v for k, v in options.items() if k in names})
