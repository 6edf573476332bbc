"""Rollouts of an arm on held-out prefixes, and what a judge says of them: each done once.

Both are kept as they come, in a journal of their own, so a run that was killed samples and asks
only what is missing.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from data.errors import DataError
from data.fingerprint import fingerprint
from data.journal import Journal
from decoding.rollout_record import Rollout
from objectives.keyed import keyed_uniform
from rewards.continuation import Case, ContinuationReward

Row = dict[str, Any]
Tick = Callable[[int], None]
Prompts = Sequence[tuple[str, Sequence[int]]]

# Sets this draw apart from others of the same seed.
_DERANGEMENT = 0x7377617073
OWN = "own"


@dataclass(frozen=True)
class GatePrefix:
    """A held-out prefix.

    Attributes:
        id: of the row that it is from.
        prefix, reference: texts: what is given, and how it goes on in truth.
        prompt_ids: tokens of the prefix, and the opening delimiter.
        document: number of the text that it was cut from; None: it is not known.
    """

    id: str
    prefix: str
    reference: str
    prompt_ids: list[int]
    document: int | None = None


class Sampler(Protocol):
    """What writes thoughts and suffixes (`decoding.rollout.LocalRollouts`)."""

    def sample(self, prompts: Prompts, samples: int) -> list[Rollout]:
        """So many rollouts of every prompt."""
        ...

    def continue_thoughts(
        self,
        prompts: Prompts,
        thoughts: Sequence[Sequence[int]],
        numbers: Sequence[int] | None = None,
    ) -> list[Rollout]:
        """One rollout of every prompt behind a thought that is given."""
        ...


@dataclass(frozen=True)
class ArmRun:
    """One arm at work.

    Attributes:
        name: of the arm.
        sampler: with its weights.
        text: of tokens, without special ones.
        reward: who judges.
        rollouts, judged: where both are kept.
        together: prefixes that are sampled, then judged, in one go.
    """

    name: str
    sampler: Sampler
    text: Callable[[Sequence[int]], str]
    reward: ContinuationReward
    rollouts: Journal
    judged: Journal
    together: int

    def gate_rows(
        self, prefixes: Sequence[GatePrefix], samples: int, tick: Tick | None = None
    ) -> list[Row]:
        """All rollouts with rewards, by prefix and number.

        Raises:
            DataError: the journal has a rollout of another prompt.
        """
        rows: list[Row] = []
        for some in _parts(prefixes, self.together):
            ids = {prefix.id: [f"{prefix.id}/{k}" for k in range(samples)] for prefix in some}
            self._check(some, ids)
            # The samples of a prefix are drawn together; those that are there stay.
            missing = [p for p in some if any(one not in self.rollouts for one in ids[p.id])]
            found = self.sampler.sample([(p.id, p.prompt_ids) for p in missing], samples)
            by_id = {prefix.id: prefix for prefix in missing}
            for one in found:
                self._keep(f"{one.prefix_id}/{one.k}", by_id[one.prefix_id], one)
            rows += self._with_rewards([one for listed in ids.values() for one in listed], tick)
        return rows

    def probe_rows(
        self,
        condition: str,
        prefixes: Sequence[GatePrefix],
        thoughts: Mapping[tuple[str, int], Sequence[int]],
        tick: Tick | None = None,
    ) -> list[Row]:
        """One suffix with its reward behind each given thought, by prefix and number.

        Args:
            condition: where the thoughts are from.
            prefixes: to be continued.
            thoughts: tokens, by prefix id and number of the sample.
            tick: told of every one.
        """
        numbers = sorted({k for _, k in thoughts})
        rows: list[Row] = []
        for some in _parts(prefixes, self.together):
            places = [(prefix, k) for prefix in some for k in numbers]
            ids = [f"{prefix.id}/{k}/{condition}" for prefix, k in places]
            missing = [
                (one, *place)
                for one, place in zip(ids, places, strict=True)
                if one not in self.rollouts
            ]
            found = self.sampler.continue_thoughts(
                [(prefix.id, prefix.prompt_ids) for _, prefix, _ in missing],
                [thoughts[prefix.id, k] for _, prefix, k in missing],
                [k for *_, k in missing],
            )
            for (row_id, prefix, _), one in zip(missing, found, strict=True):
                self._keep(row_id, prefix, one)
            rows += self._with_rewards(ids, tick)
        return [{**row, "condition": condition} for row in rows]

    def _check(self, prefixes: Sequence[GatePrefix], ids: Mapping[str, Sequence[str]]) -> None:
        for prefix in prefixes:
            for one in ids[prefix.id]:
                if one in self.rollouts and (
                    self.rollouts.read(one)["prompt_ids"] != prefix.prompt_ids
                ):
                    raise DataError(
                        f"{self.rollouts.path}: {one!r} continues another prompt; allowed: another"
                        " paths.run_dir"
                    )

    def _keep(self, row_id: str, prefix: GatePrefix, rollout: Rollout) -> None:
        if row_id in self.rollouts:
            return
        self.rollouts.append({
            "id": row_id, "arm": self.name, **rollout.to_row(), "document": prefix.document,
            "prefix": prefix.prefix, "reference": prefix.reference,
            "thought": self.text(rollout.thought_ids),
            "suffix": self.text(rollout.suffix_ids), "thought_tokens": len(rollout.thought_ids),
            "suffix_tokens": len(rollout.suffix_ids),
        })  # fmt: skip

    def _with_rewards(self, ids: Sequence[str], tick: Tick | None) -> list[Row]:
        """Rollouts of the journal with what the judge says, who is asked where it has not said.

        What is invalid is not kept: the next run asks again.
        """
        rows = [self.rollouts.read(one) for one in ids]
        unjudged = [row for row in rows if row["id"] not in self.judged]
        # The judge sees no thought.
        cases = [Case(r["id"], r["prefix"], r["reference"], r["suffix"]) for r in unjudged]
        found = self.reward.judge(cases) if cases else []
        said: dict[str, Row] = {}
        for row, judgement in zip(unjudged, found, strict=True):
            score = judgement.score
            said[row["id"]] = {
                "id": row["id"], "reward": score, "judge_valid": score is not None,
                "reason": judgement.reason,
            }  # fmt: skip
            if score is not None:
                self.judged.append(said[row["id"]])
        if tick is not None:
            tick(len(ids))
        return [{**row, **(said.get(row["id"]) or self.judged.read(row["id"]))} for row in rows]


def _parts(prefixes: Sequence[GatePrefix], size: int) -> Iterator[Sequence[GatePrefix]]:
    for start in range(0, len(prefixes), size):
        yield prefixes[start : start + size]


def identity(prefixes: Sequence[GatePrefix]) -> str:
    """Of the texts and tokens of all prefixes."""
    return fingerprint([[p.id, p.prefix, p.reference, p.prompt_ids] for p in prefixes])


def deranged(ids: Sequence[str], seed: int) -> dict[str, str]:
    """For every prefix another one: each stands behind its predecessor on a ring in keyed order.

    Raises:
        DataError: there is no other.
    """
    if len(ids) < 2:
        raise DataError("a thought of another prefix: there is one prefix; allowed: at least 2")
    lot_M = keyed_uniform((seed, _DERANGEMENT), torch.arange(len(ids)), 1)[:, 0]
    ring = [ids[place] for place in lot_M.argsort(stable=True).tolist()]
    return dict(zip(ring, [*ring[1:], ring[0]], strict=True))
