"""Acceptance out of a server's counters, which tell of all requests together (vLLM).

A counted draft is a verify cycle. The counters are noted before an end token or the limit cuts an
answer, the replies are counted behind that cut:

    uncut     = drafts + accepted                    what all cycles would have committed
    committed = sum over replies of (tokens - 1)     what they did commit
    tau       = committed / drafts                   as everywhere else here
    tau_uncut = 1 + accepted / drafts                as vLLM reports it

A cut takes at most K tokens of an answer's last cycle, so counters that are those of the replies
satisfy committed <= uncut <= committed + K * answers; a step that the server makes without a draft
adds to the replies alone, and one of them per answer is let pass (our reading: it happens behind a
preemption and at the end of the context).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from data.errors import DataError
from evaluation.acceptance import LENGTH, Acceptance, SlotAcceptance
from evaluation.answering import Reply
from evaluation.statistics import wilson_interval

_SAMPLE = re.compile(r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_POSITION = re.compile(r'position="(\d+)"')
_PREFIX = "vllm:spec_decode_num_"


@dataclass(frozen=True)
class Counters:
    """Drafts (verify cycles), accepted drafted tokens, and these by position from 0."""

    drafts: int
    accepted: int
    by_position: tuple[int, ...]

    def since(self, before: "Counters") -> "Counters":
        """What was added."""
        earlier = (*before.by_position, *[0] * len(self.by_position))
        added = (now - then for now, then in zip(self.by_position, earlier, strict=False))
        return Counters(self.drafts - before.drafts, self.accepted - before.accepted, tuple(added))


@runtime_checkable
class CountingServer(Protocol):
    """A server that counts over all requests instead of telling each one."""

    def counters(self) -> Counters:
        """What it has counted so far."""
        ...


def parse_counters(text: str, place: str) -> Counters:
    """vLLM's counters out of a page in Prometheus' text format; engines are added up.

    Raises:
        DataError: they are not there, or are no numbers.
    """
    totals: dict[str, float] = {}
    positions: dict[int, float] = {}
    for line in text.splitlines():
        sample = _SAMPLE.match(line)
        if sample is None or not sample["name"].startswith(_PREFIX):
            continue
        name, value = sample["name"].removeprefix(_PREFIX), float(sample["value"])
        totals[name] = totals.get(name, 0.0) + value
        position = _POSITION.search(sample["labels"] or "")
        if name == "accepted_tokens_per_pos_total" and position is not None:
            positions[int(position[1])] = positions.get(int(position[1]), 0.0) + value
    if not {"drafts_total", "accepted_tokens_total"} <= totals.keys():
        raise DataError(f"{place}/metrics: no {_PREFIX}drafts_total: the server runs no draft")
    by_position = tuple(int(positions.get(k, 0.0)) for k in range(max(positions, default=-1) + 1))
    return Counters(int(totals["drafts_total"]), int(totals["accepted_tokens_total"]), by_position)


def acceptance_of_counters(
    counted: Counters, replies: Sequence[Reply], prompts: int, drafted: int
) -> Acceptance:
    """What counters and replies say; without rows per request there are no intervals over prompts
    and no macro mean.

    Args:
        counted: between the first request and the last reply.
        replies: all of them.
        prompts: how many they answer.
        drafted: K.

    Raises:
        DataError: nothing was drafted, or the counters are not those of these replies.
    """
    counted_replies = [reply for reply in replies if reply.tokens > 1]
    tokens = sum(reply.tokens for reply in counted_replies)
    committed = tokens - len(counted_replies)
    _check_counters(counted, committed, len(counted_replies), drafted)
    looping = sum(reply.degenerate for reply in replies)
    low, high = wilson_interval(looping, len(replies))
    return Acceptance(
        prompts=prompts, answers=len(replies), without_cycles=len(replies) - len(counted_replies),
        tokens=sum(reply.tokens for reply in replies), cycles=counted.drafts, ceiling=drafted + 1,
        tau=committed / counted.drafts, tau_low=None, tau_high=None, tau_macro=None,
        tau_served=tokens / counted.drafts, tau_uncut=1 + counted.accepted / counted.drafts,
        slots=_slots(counted), histogram=None,
        capped=sum(reply.finish == LENGTH for reply in replies),
        degenerate=looping, degenerate_low=low, degenerate_high=high, tau_without_degenerate=None,
    )  # fmt: skip


def _check_counters(counted: Counters, committed: int, answers: int, drafted: int) -> None:
    advice = (
        "the counters do not belong to this measurement (mode.server.drafted, other users of the"
        " server, or requests that failed half-way); measure again"
    )
    drafts, accepted = counted.drafts, counted.accepted
    falling = any(
        later > earlier
        for earlier, later in zip((drafts, *counted.by_position), counted.by_position, strict=False)
    )
    if drafts < 1 or not 0 <= accepted <= drafts * drafted or falling:
        raise DataError(f"{accepted} accepted in {drafts} drafts of {drafted}: {advice}")
    uncut = drafts + accepted
    if not committed - answers <= uncut <= committed + answers * drafted:
        raise DataError(
            f"{drafts} drafts with {accepted} accepted give {uncut} tokens, but {answers} replies"
            f" have {committed} behind their first ones: {advice}"
        )


def _slots(counted: Counters) -> list[SlotAcceptance]:
    reached = (counted.drafts, *counted.by_position)
    return [
        SlotAcceptance.of(slot, before, accepted, accepted / counted.drafts)
        for slot, (before, accepted) in enumerate(
            zip(reached, counted.by_position, strict=False), start=1
        )
    ]
