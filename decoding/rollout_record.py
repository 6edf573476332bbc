"""One rollout, and the settings that it is drawn with; `decoding.rollout` has what they mean."""

from dataclasses import asdict, dataclass, fields
from typing import Any


@dataclass
class Rollout:
    """One sample.

    Attributes:
        prefix_id: of the prefix.
        k: number of the sample.
        prompt_ids: the prefix and the opening delimiter.
        thought_ids: as sampled, without the closing delimiter.
        boundary_ids: the closing delimiter, whoever wrote it; empty only in a sample without a
            thought.
        suffix_ids: as sampled, its end token included if there is one.
        thought_logprobs: in nats, under the distribution that was sampled from (tempered, cut to
            its nucleus); one more than `thought_ids` if the model closed the thought itself, which
            is a choice of its own. None: the thought was given.
        suffix_logprobs: the same of the suffix.
        thought_finish: "stop" (the closing delimiter, or an end token) or "length".
        suffix_finish: the same of the suffix.
        closed_autonomously: the model wrote the closing delimiter itself.
    """

    prefix_id: str
    k: int
    prompt_ids: list[int]
    thought_ids: list[int]
    boundary_ids: list[int]
    suffix_ids: list[int]
    thought_logprobs: list[float] | None
    suffix_logprobs: list[float] | None
    thought_finish: str
    suffix_finish: str
    closed_autonomously: bool

    def to_row(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> "Rollout":
        """Of `to_row`; other fields of the row are left aside."""
        return cls(**{name: row[name] for name in (one.name for one in fields(cls))})

    @property
    def sampled_ids(self) -> list[int]:
        """All tokens behind the prompt."""
        return [*self.thought_ids, *self.boundary_ids, *self.suffix_ids]

    def chosen(self, with_boundary: bool = True) -> list[bool]:
        """Which of `sampled_ids` the model chose; a boundary only where it wrote it itself, and
        not without `with_boundary`."""
        return [
            *[self.thought_logprobs is not None] * len(self.thought_ids),
            *[self.closed_autonomously and with_boundary] * len(self.boundary_ids),
            *[True] * len(self.suffix_ids),
        ]

    def logprobs(self, with_boundary: bool = True) -> list[float]:
        """Of the tokens that `chosen` names, in order."""
        thought = self.thought_logprobs or []
        if not with_boundary:
            thought = thought[: len(self.thought_ids)]
        return [*thought, *(self.suffix_logprobs or [])]

    @property
    def new_tokens(self) -> int:
        """Tokens of thought and suffix, without the boundary."""
        return len(self.thought_ids) + len(self.suffix_ids)


@dataclass(frozen=True)
class RolloutSettings:
    """How to sample.

    Attributes:
        open_id, close_id: the delimiters of a thought, two tokens; both -1 where there are no
            thoughts.
        stop_ids: tokens that end a suffix, or a thought before its delimiter.
        thought_tokens: limit of a thought; 0 closes it at once.
        suffix_tokens: limit of a suffix.
        temperature: above 0.
        top_p: draw from the most probable tokens up to this mass.
        seed: of the draws, which depend on it, the ids of prefixes and the numbers of samples.
        rows: samples that decode together; at least those of one prefix do.
        section: of the configuration that the limits are keys of, for messages.

    Raises:
        ValueError: a value outside its range, or delimiters that are one token.
    """

    open_id: int
    close_id: int
    stop_ids: tuple[int, ...]
    thought_tokens: int = 48
    suffix_tokens: int = 128
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    rows: int = 64
    section: str = "algo"

    def __post_init__(self) -> None:
        checks = {
            "thought_tokens": (self.thought_tokens >= 0, "an integer >= 0"),
            "suffix_tokens": (self.suffix_tokens >= 1, "an integer >= 1"),
            "temperature": (self.temperature > 0.0, "a number in (0, inf)"),
            "top_p": (0.0 < self.top_p <= 1.0, "a number in (0, 1]"),
            "rows": (self.rows >= 1, "an integer >= 1"),
        }
        for name, (good, allowed) in checks.items():
            if not good:
                raise ValueError(f"{name}={getattr(self, name)}: allowed {allowed}")
        if self.open_id >= 0 and self.open_id == self.close_id:
            raise ValueError(f"close_id={self.close_id}: allowed another token than open_id")
