"""What a draft saves its target: accepted lengths of speculative decoding, with their intervals.

A verify cycle hands the target one anchor (a token already committed) and K drafted ones, and
commits the accepted prefix and one token of the target's own: 1 to K + 1 tokens. So tau, the mean
of tokens per cycle, cannot exceed K + 1. With the published layout, in which a block of B slots is
the anchor and B - 1 drafts, that ceiling is B, not B + 1.

The first token of an answer comes from the prefill and belongs to no cycle. With `tokens` those of
the answer, an end token included,

    tau         = sum (tokens - 1) / sum cycles         pooled over all answers: the headline
    tau_macro   = mean over answers of (tokens - 1) / cycles
    tau_served  = sum tokens / sum cycles               as SGLang counts completion tokens
    tau_uncut   = the same as tau, with what the last cycle committed before the end token or the
                  limit cut it: as loops count that note the accepted length and cut afterwards

Easy answers are short: macro means are above pooled ones. Intervals resample prompts, not cycles.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data.errors import DataError
from evaluation.statistics import Interval, bootstrap_ratio, wilson_interval

STOP, LENGTH = "stop", "length"


@dataclass(frozen=True)
class Answer:
    """One answer of one draft; a prompt of two turns has two.

    Attributes:
        id: of the prompt.
        benchmark: the prompt set.
        turn: which answer of the conversation, from 0.
        tokens: generated tokens, an end token included.
        cycles: verify passes of the target.
        accepted: tokens committed per cycle after the cut; None where a server does not tell.
        last_uncut: what the last cycle committed before the cut.
        drafted: K, drafted tokens per cycle.
        finish: stop (an end token) or length (the limit).
        degenerate: the answer ends in a loop.
    """

    id: str
    benchmark: str
    turn: int
    tokens: int
    cycles: int
    accepted: tuple[int, ...] | None
    last_uncut: int | None
    drafted: int
    finish: str
    degenerate: bool

    @property
    def committed(self) -> int:
        """Tokens of the cycles: all but the prefill's."""
        return self.tokens - 1

    def accepted_drafts(self) -> list[tuple[int, bool]]:
        """Of every cycle the drafts known to be accepted, and whether it is known where they end.

        A cycle that was cut before its last token says nothing about the draft behind the cut.
        """
        assert self.accepted is not None and (self.last_uncut is None) == (not self.accepted)
        if self.last_uncut is None:
            return []
        *whole, last = self.accepted
        cut = last < self.last_uncut
        return [*((tokens - 1, True) for tokens in whole), (last if cut else last - 1, not cut)]


def read_answer(row: Mapping[str, Any], place: str) -> Answer:
    """A row of acceptance.jsonl, checked.

    Raises:
        DataError: a key is missing or of another type, or the counts contradict each other; the
            message begins with `place`.
    """
    try:
        accepted = row["accepted"]
        answer = Answer(
            str(row["id"]), str(row["benchmark"]), int(row.get("turn", 0)), int(row["tokens"]),
            int(row["cycles"]), None if accepted is None else tuple(map(int, accepted)),
            row["last_uncut"], int(row["drafted"]), str(row["finish"]), bool(row["degenerate"]),
        )  # fmt: skip
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(f"{place}: not a row of acceptance.jsonl ({error!r})") from error
    problem = _contradiction(answer)
    if problem:
        raise DataError(f"{place}: {answer.benchmark} {answer.id}: {problem}")
    return answer


def _contradiction(answer: Answer) -> str | None:
    ceiling = answer.drafted + 1
    if answer.drafted < 1 or answer.tokens < 1 or answer.cycles < 0:
        return "drafted and tokens must be at least 1, cycles at least 0"
    # A server may verify once more than it needed; its own loops do not.
    least = 0 if answer.accepted is None else answer.cycles
    if not least <= answer.committed <= answer.cycles * ceiling:
        return (
            f"{answer.tokens} tokens in {answer.cycles} cycles; a cycle gives 1 to {ceiling},"
            " the prefill 1"
        )
    if answer.accepted is None:
        return None
    if len(answer.accepted) != answer.cycles or sum(answer.accepted) != answer.committed:
        return f"accepted lengths do not sum to {answer.committed} in {answer.cycles} cycles"
    if any(not 1 <= length <= ceiling for length in answer.accepted):
        return f"an accepted length is outside 1 .. {ceiling}"
    if not answer.accepted:
        return None
    last = answer.last_uncut
    if not isinstance(last, int) or not answer.accepted[-1] <= last <= ceiling:
        return f"last_uncut={last}: allowed {answer.accepted[-1]} .. {ceiling}"
    return None


@dataclass(frozen=True)
class SlotAcceptance:
    """How often draft number `slot` (from 1) is accepted.

    Attributes:
        reached: cycles in which all drafts before it were accepted and its verdict is known.
        accepted: those in which it was accepted, too.
        conditional: accepted / reached; None where it was never reached.
        conditional_low, conditional_high: its 95 % Wilson interval.
        cumulative: product of the conditionals up to it: the share of cycles that get so far; None
            where a conditional in it is unknown.
    """

    slot: int
    reached: int
    accepted: int
    conditional: float | None
    conditional_low: float | None
    conditional_high: float | None
    cumulative: float | None

    @classmethod
    def of(
        cls, slot: int, reached: int, accepted: int, cumulative: float | None
    ) -> "SlotAcceptance":
        """With the rate and the interval of its counts."""
        if not reached:
            return cls(slot, reached, accepted, None, None, None, cumulative)
        low, high = wilson_interval(accepted, reached)
        return cls(slot, reached, accepted, accepted / reached, low, high, cumulative)


@dataclass(frozen=True)
class Acceptance:
    """Acceptance of one draft on one benchmark, or on several together.

    Attributes:
        prompts: how many there are; an interval resamples them.
        answers: of all their turns.
        without_cycles: answers that ended with the prefill's token and count in no rate.
        tokens: of all answers.
        cycles: verify passes.
        ceiling: K + 1, above which no tau can be.
        tau, tau_low, tau_high: pooled, and its 95 % bootstrap interval over prompts (None for one
            prompt alone).
        tau_macro, tau_served, tau_uncut: see the module.
        slots: acceptance by position; None without the lengths of every cycle.
        histogram: number of cycles by tokens committed before the cut, from 1 to the ceiling.
        capped: answers that reached the limit of new tokens.
        degenerate: answers that end in a loop, `degenerate_low` .. `degenerate_high` the Wilson
            interval of their share; loops are easy to draft, so tau gains by them.
        tau_without_degenerate: of the other answers.
    """

    prompts: int
    answers: int
    without_cycles: int
    tokens: int
    cycles: int
    ceiling: int
    tau: float | None
    tau_low: float | None
    tau_high: float | None
    tau_macro: float | None
    tau_served: float | None
    tau_uncut: float | None
    slots: list[SlotAcceptance] | None
    histogram: list[int] | None
    capped: int
    degenerate: int
    degenerate_low: float
    degenerate_high: float
    tau_without_degenerate: float | None


def measure(answers: Sequence[Answer], resamples: int = 1000, seed: int = 0) -> Acceptance:
    """All numbers of some answers.

    Args:
        answers: of one draft, at least one.
        resamples: of the bootstrap.
        seed: of the bootstrap.

    Raises:
        DataError: no answers, or drafts of different lengths.
    """
    if not answers:
        raise DataError("acceptance needs at least 1 answer, got 0")
    drafted = {answer.drafted for answer in answers}
    if len(drafted) > 1:
        raise DataError(f"answers with {sorted(drafted)} drafted tokens per cycle: not one draft")
    (slots,) = drafted
    counted = [answer for answer in answers if answer.cycles]
    detailed = all(answer.accepted is not None for answer in answers)
    interval = pooled_interval(counted, resamples, seed)
    looping = [answer.degenerate for answer in answers]
    low, high = wilson_interval(sum(looping), len(looping))
    return Acceptance(
        prompts=len({(answer.benchmark, answer.id) for answer in answers}),
        answers=len(answers),
        without_cycles=len(answers) - len(counted),
        tokens=sum(answer.tokens for answer in answers),
        cycles=sum(answer.cycles for answer in answers),
        ceiling=slots + 1,
        tau=pooled(counted),
        tau_low=interval and interval.low,
        tau_high=interval and interval.high,
        tau_macro=_mean([answer.committed / answer.cycles for answer in counted]),
        tau_served=_ratio(sum(a.tokens for a in counted), sum(a.cycles for a in counted)),
        tau_uncut=_uncut(counted) if detailed else None,
        slots=slot_acceptance(counted, slots) if detailed else None,
        histogram=histogram(counted, slots + 1) if detailed else None,
        capped=sum(answer.finish == LENGTH for answer in answers),
        degenerate=sum(looping),
        degenerate_low=low,
        degenerate_high=high,
        tau_without_degenerate=pooled([a for a in counted if not a.degenerate]),
    )


def pooled(answers: Iterable[Answer]) -> float | None:
    """sum (tokens - 1) / sum cycles; None without a cycle."""
    listed = list(answers)
    return _ratio(sum(a.committed for a in listed), sum(a.cycles for a in listed))


def pooled_interval(answers: Sequence[Answer], resamples: int, seed: int) -> Interval | None:
    """95 % percentile interval of the pooled tau over prompts; None for fewer than two."""
    totals = per_prompt(answers)
    if len(totals) < 2:
        return None
    tokens, cycles = zip(*totals.values(), strict=True)
    ratio = bootstrap_ratio(tokens, cycles, resamples, seed=seed)
    return Interval(ratio.low, ratio.high)


def per_prompt(answers: Iterable[Answer]) -> dict[tuple[str, str], tuple[int, int]]:
    """Tokens of the cycles, and cycles, of each prompt: turns of a conversation go together."""
    totals: dict[tuple[str, str], tuple[int, int]] = {}
    for answer in answers:
        key = answer.benchmark, answer.id
        tokens, cycles = totals.get(key, (0, 0))
        totals[key] = tokens + answer.committed, cycles + answer.cycles
    return totals


def slot_acceptance(answers: Sequence[Answer], slots: int) -> list[SlotAcceptance]:
    """Acceptance of draft 1 .. K given the ones before it, and how many cycles get so far.

    What is behind a cut is not counted for any slot, so the conditional rates are those of whole
    cycles, and their product estimates the share of cycles that get so far (Kaplan and Meier 1958).
    """
    verdicts = [verdict for answer in answers for verdict in answer.accepted_drafts()]
    found: list[SlotAcceptance] = []
    cumulative: float | None = 1.0
    for slot in range(1, slots + 1):
        accepted = sum(count >= slot for count, _ in verdicts)
        refused = sum(count == slot - 1 and ends for count, ends in verdicts)
        rate = _ratio(accepted, accepted + refused)
        # Behind a slot that is never accepted there is nothing; behind a cut nothing is known.
        if cumulative:
            cumulative = None if rate is None else cumulative * rate
        found.append(SlotAcceptance.of(slot, accepted + refused, accepted, cumulative))
    return found


def histogram(answers: Sequence[Answer], ceiling: int) -> list[int]:
    """Number of cycles that committed 1 .. `ceiling` tokens, the last one of an answer uncut."""
    counts = [0] * ceiling
    for answer in answers:
        assert answer.accepted and answer.last_uncut is not None
        for length in (*answer.accepted[:-1], answer.last_uncut):
            counts[length - 1] += 1
    return counts


def _uncut(answers: Sequence[Answer]) -> float | None:
    tokens = 0
    for answer in answers:
        assert answer.accepted and answer.last_uncut is not None
        tokens += answer.committed - answer.accepted[-1] + answer.last_uncut
    return _ratio(tokens, sum(answer.cycles for answer in answers))


def _ratio(above: int, below: int) -> float | None:
    return above / below if below else None


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
