"""Self-improving pretraining: the policy's own continuations, judged beside the original
(algo=online_dpo, algo=rf_nll; arXiv 2601.21343).

    pool     the original suffix, K rollouts and, if asked for, a rewrite of the original
    scores   every candidate's mean outcome against the others before a judge (or a reward)
    DPO      the best against the worst of every pool, and a reference that holds the policy
    RF-NLL   the likelihood of the best of every pool

Candidates are learned from as the tokens they were drawn as, never as their text read again; a
rewrite has no tokens of its own and is the exception. Their log-probabilities are those of the
policy at temperature 1, over the tokens that can be drawn, summed over the suffix.

Legend: N candidates of a piece (rows), M pairs, P scored tokens, L tokens of a row.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from algorithm import LossTerms
from decoding.branches import branches
from decoding.rewrite import Rewriter
from decoding.rollout_record import Rollout, RolloutSettings
from evaluation.preference_metrics import pool_metrics, preference_alerts
from objectives.likelihood import row_sums
from objectives.policy_gradient import k3
from objectives.preference import best_candidate, choose_pairs, dpo_loss, filtered_likelihood
from objectives.token_log_probs import token_log_probs
from online import Experience, OnlineAlgorithm, Prefix
from rewards.candidates import (
    ORIGINAL,
    REWRITE,
    ROLLOUT,
    Candidate,
    Lesson,
    cut,
    given,
    pool_row,
)
from rewards.tournament import Pointwise, Pool, PoolScorer, Scored, Summed, Tournament
from runtime.config import instantiate
from runtime.errors import ConfigError

# Sets the choice among equal scores apart from other draws of the same seed.
_STREAM = 0x70726566
_NO_TOKEN = -1


class OnlinePreference(OnlineAlgorithm):
    """Online DPO on pools of candidates."""

    # Candidates that one term of the loss is about.
    lesson_size = 2

    def _read_options(self) -> None:
        super()._read_options()
        algo = self.config["algo"]
        if algo["rows_per_pass"] < self.lesson_size:
            raise ConfigError(
                f"algo.rows_per_pass={algo['rows_per_pass']}: a pair is learned from in one pass;"
                f" allowed an integer >= {self.lesson_size}"
            )
        if algo["samples"] + algo["candidates"]["original"] < 2:
            raise ConfigError(
                f"algo.samples={algo['samples']}: without the original there is nothing to compare"
                " it with; allowed an integer >= 2, or algo.candidates.original=true"
            )
        self._check_pairs()
        self._require_reference()
        self.settings = RolloutSettings(
            # There are no thoughts.
            open_id=_NO_TOKEN,
            close_id=_NO_TOKEN,
            stop_ids=(self.special.eos,),
            suffix_tokens=algo["suffix_tokens"],
            temperature=float(algo["temperature"]),
            top_p=float(algo["top_p"]),
            rows=algo["rows"],
        )
        self._rewriter: Rewriter | None = None
        # A model that is only opened, whose architecture is known, needs nobody to judge.
        self._scorer: PoolScorer | None = None
        if algo.get("backbone") is None:
            self._scorer = self._judges()

    def _check_pairs(self) -> None:
        """No more pairs of best and worst than a full pool has: each candidate is in one."""
        algo = self.config["algo"]
        if algo.get("pairing") != "top_k_bottom_k":
            return
        candidates = algo["candidates"]
        pool = algo["samples"] + candidates["original"] + (candidates["rewrite"] is not None)
        if algo["k"] > pool // 2:
            raise ConfigError(
                f"algo.k={algo['k']}: a pool has {pool} candidates (algo.samples, algo.candidates);"
                f" allowed 1 .. {pool // 2}, or more of them"
            )

    def _require_reference(self) -> None:
        if self.config["algo"]["reference"] is None:
            raise ConfigError(
                f"algo.reference=null: algo={self.config['algo']['name']} compares the policy with"
                " a reference; allowed: {kind:frozen}"
            )

    @property
    def scorer(self) -> PoolScorer:
        """Who judges: `judge`, `reward`, or the sum of both."""
        if self._scorer is None:
            self._scorer = self._judges()
        return self._scorer

    def _judges(self) -> PoolScorer:
        algo, parts = self.config["algo"], list[PoolScorer]()
        if self.config.get("judge") is not None:
            judge = instantiate(self.config["judge"])
            parts.append(Tournament(judge, algo["tournament"], algo["orders"], self.config["seed"]))
        if self.config.get("reward") is not None:
            parts.append(Pointwise(instantiate(self.config["reward"])))
        if not parts:
            raise ConfigError(
                f"judge=null: algo={algo['name']} learns from what a judge prefers; allowed: a"
                " choice of its group, judge=verifiable, or of the group reward"
            )
        return parts[0] if len(parts) == 1 else Summed(parts)

    def collect(self, batch: dict[str, Tensor]) -> Experience:
        """Sample, judge and choose what is learned from."""
        # 1. Pools.
        prefixes = self.prefixes(batch)
        rewrites = self.rewrites(prefixes)
        started = time.monotonic()
        rollouts = self.roll_out(prefixes)
        sampling_s = time.monotonic() - started
        pools = self.pools(prefixes, rollouts, rewrites)
        # 2. Scores; what has no valid one counts nowhere.
        started = time.monotonic()
        scored = self.scored(prefixes, pools)
        judging_s = time.monotonic() - started
        # 3. What is learned from, prefix by prefix.
        lessons = [self.lessons(one.scores, prefix) for one, prefix in
                   zip(scored, prefixes, strict=True)]  # fmt: skip
        # 4. Pieces for the passes of training, and what the reference says of them.
        flat = [tuple((pool, member) for member in members)
                for pool, listed in enumerate(lessons) for members in listed]  # fmt: skip
        parts = [self.piece(pools, listed, batch["index"].cpu())
                 for listed in cut(flat, self.config["algo"]["rows_per_pass"])]  # fmt: skip
        self.refer(parts)
        # 5. How it went.
        divergence = self.divergence(rollouts)
        rows = [
            pool_row(prefix.id, self.text(prefix.prefix_ids), *columns)
            for prefix, *columns in zip(prefixes, pools, scored, lessons, divergence, strict=True)
        ]
        tokens = sum(one.new_tokens for one in rollouts)
        clocks = {
            "rollout_tokens_per_s": tokens / sampling_s if sampling_s > 0 else 0.0,
            "judging_s": judging_s,
        }
        return Experience(parts, self._metrics(rows, clocks))

    def roll_out(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """K continuations of every prefix, in order."""
        prompts = [(one.id, one.prefix_ids) for one in prefixes]
        with self.sampling(self.step_settings(self.settings)) as sampler:
            return sampler.continuations(prompts, self.config["algo"]["samples"])

    def rewrites(self, prefixes: Sequence[Prefix]) -> dict[str, list[int]]:
        """Tokens of rewritten suffixes by prefix, none of those that failed; at most so many as a
        rollout may have."""
        options = self.config["algo"]["candidates"]["rewrite"]
        if options is None:
            return {}
        if self._rewriter is None:
            self._rewriter = cast(Rewriter, instantiate(options))
        sources = [(one.id, self.text(one.prefix_ids), self.text(one.reference_ids))
                   for one in prefixes]  # fmt: skip
        limit = self.settings.suffix_tokens
        found = {
            name: self.tokenizer.encode(text, add_special_tokens=False)[:limit]
            for name, text in self._rewriter.rewrite(sources).items()
        }
        return {name: ids for name, ids in found.items() if ids}

    def pools(
        self, prefixes: Sequence[Prefix], rollouts: Sequence[Rollout],
        rewrites: Mapping[str, list[int]],
    ) -> list[list[Candidate]]:  # fmt: skip
        """Candidates of every prefix: the original, rollouts, a rewrite."""
        samples = self.config["algo"]["samples"]
        with_original = self.config["algo"]["candidates"]["original"]
        found = []
        for number, prefix in enumerate(prefixes):
            pool = []
            if with_original:
                pool.append(self._candidate(ORIGINAL, given(*prefix)))
            drawn = rollouts[number * samples : (number + 1) * samples]
            pool += [self._candidate(ROLLOUT, one) for one in drawn]
            if prefix.id in rewrites:
                rewritten = given(prefix.id, prefix.prefix_ids, rewrites[prefix.id])
                pool.append(self._candidate(REWRITE, rewritten))
            found.append(pool)
        return found

    def _candidate(self, source: str, tokens: Rollout) -> Candidate:
        return Candidate(source, tokens, self.text(tokens.suffix_ids))

    def scored(
        self, prefixes: Sequence[Prefix], pools: Sequence[Sequence[Candidate]]
    ) -> list[Scored]:
        """The scores of all pools."""
        step = self.trainer.global_step
        shown = [
            Pool(f"{step}/{prefix.id}", self.text(prefix.prefix_ids),
                 self.text(prefix.reference_ids), [one.text for one in pool])
            for prefix, pool in zip(prefixes, pools, strict=True)
        ]  # fmt: skip
        return self.scorer.score(shown)

    def lessons(self, scores: Sequence[float], prefix: Prefix) -> list[tuple[int, ...]]:
        """Pairs (to prefer, to avoid) of a pool; none where all scores are equal."""
        algo = self.config["algo"]
        score_N = torch.tensor(scores, dtype=torch.float64)
        pairs = choose_pairs(score_N, algo["pairing"], k=algo["k"], key=self._key(prefix))
        return [*pairs]

    def _key(self, prefix: Prefix) -> tuple[int, ...]:
        """What the choice among equals of a pool is for."""
        return self.config["seed"], _STREAM, self.trainer.global_step, int(prefix.id)

    def piece(
        self, pools: Sequence[Sequence[Candidate]], lessons: Sequence[Lesson], index_B: Tensor
    ) -> dict[str, Any]:
        """Rows for one backward pass, each candidate once; `members` are the rows of lessons.

        Without a lesson it is a row of which nothing is learned: other ranks may have some, and
        wait for this one's gradient.
        """
        places = {place: row for row, place in
                  enumerate(dict.fromkeys(place for one in lessons for place in one))}  # fmt: skip
        chosen = [*places] or [(0, 0)]
        batch = self.rows([pools[pool][member].tokens for pool, member in chosen],
                          index_B[[pool for pool, _ in chosen]], bool(lessons))  # fmt: skip
        members = [[places[place] for place in one] for one in lessons]
        batch["members"] = torch.tensor(members, dtype=torch.long, device=self.device).view(
            -1, self.lesson_size
        )
        return batch

    def rows(
        self, rollouts: Sequence[Rollout], index_N: Tensor, learned: bool = True
    ) -> dict[str, Any]:
        """A batch on the device; without `learned` none of its tokens is scored."""
        read = branches(rollouts)
        if not learned:
            read = read._replace(place_M=read.place_M[:0])
        return self.transfer_batch_to_device({"branches": read, "index": index_N}, self.device, 0)

    def refer(self, parts: Sequence[dict[str, Any]]) -> None:
        """Note log ref of every candidate, once for all updates."""
        with self.reference_weights():
            for part in parts:
                part["reference"] = self.log_likelihoods(part)

    def token_logp(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """log p [P] of the tokens of the suffixes, and whose they are."""
        hidden_PD, token_P, row_P = self.choices(batch)
        forbidden_V = self.backbone.forbidden_V
        logp_P = token_log_probs(hidden_PD, self.backbone.logits, token_P, forbidden_V=forbidden_V)
        return logp_P, row_P

    def log_likelihoods(self, batch: Mapping[str, Any]) -> Tensor:
        """log p [N] of the suffixes: sums over their tokens, in nats."""
        logp_P, row_P = self.token_logp(batch)
        return row_sums(logp_P, row_P, len(batch["index"]))

    def part_terms(self, part: Mapping[str, Any]) -> LossTerms:
        """DPO of some pairs; its weight is their number."""
        logp_N, reference_N = self.log_likelihoods(part), part["reference"]
        chosen_M, rejected_M = part["members"].unbind(-1)
        terms = dpo_loss(
            logp_N[chosen_M], logp_N[rejected_M], reference_N[chosen_M], reference_N[rejected_M],
            float(self.config["algo"]["beta"]),
        )  # fmt: skip
        pairs = logp_N.new_tensor(float(len(chosen_M)))
        self.count("dpo_loss", terms.loss_N.sum(), pairs)
        self.count("dpo_margin_avg", terms.margin_N.sum(), pairs)
        self.count("chosen_beats_rejected_rate", (terms.margin_N > 0).sum(), pairs)
        self.count("logp_chosen", logp_N[chosen_M].sum(), pairs)
        self.count("logp_rejected", logp_N[rejected_M].sum(), pairs)
        # A pair that is not finite names both of its rows.
        both_N = torch.zeros_like(logp_N.detach()).index_add(
            0, part["members"].flatten(), terms.loss_N.detach().repeat_interleave(2)
        )
        return LossTerms(terms.loss_N.sum(), pairs, both_N)

    def divergence(self, rollouts: Sequence[Rollout]) -> list[float | None]:
        """An estimate of KL(policy || reference) of every prefix, in nats per token.

        It is the mean k3 over the tokens of the first `algo.kl_samples` rollouts, whatever their
        scores, so that nothing is selected. Without bias at temperature 1 and top_p 1.
        """
        algo = self.config["algo"]
        samples, measured = algo["samples"], min(algo["kl_samples"], algo["samples"])
        prefixes = len(rollouts) // samples
        if self.reference is None or not measured:
            return [None] * prefixes
        some = [one for one in rollouts if one.k < measured]
        index_N = torch.tensor([int(one.prefix_id) for one in some])
        size = algo["rows_per_pass"]
        batches = [self.rows(some[first : first + size], index_N[first : first + size])
                   for first in range(0, len(some), size)]  # fmt: skip
        policy = [self.token_logp(batch) for batch in batches]
        found = []
        with self.reference_weights():
            for batch, (logp_P, row_P) in zip(batches, policy, strict=True):
                kl_P = k3(self.token_logp(batch)[0] - logp_P)
                rows = len(batch["index"])
                found.append(row_sums(kl_P, row_P, rows) / row_P.bincount(minlength=rows))
        return torch.cat(found).view(prefixes, measured).mean(-1).tolist()

    def _metrics(self, mine: list[dict[str, Any]], clocks: Mapping[str, float]) -> dict[str, float]:
        """Of the pools of all ranks, which every rank then knows."""
        rows = self.gather_rows(mine)
        self.keep_samples(rows)
        return self.watched(pool_metrics(rows) | clocks)

    def alerts(self, metrics: Mapping[str, float]) -> list[str]:
        """What is wrong with a step of preference learning."""
        return preference_alerts(metrics, self.trainer.global_step + 1)


class BestContinuation(OnlinePreference):
    """RF-NLL: the best candidate of every pool is learned as if it were text."""

    lesson_size = 1

    def _require_reference(self) -> None:
        """None is needed; where there is one, the distance to it is measured."""

    def lessons(self, scores: Sequence[float], prefix: Prefix) -> list[tuple[int, ...]]:
        """The best of a pool, one of the equal ones by turns; nothing where no score is valid."""
        best = best_candidate(torch.tensor(scores, dtype=torch.float64), self._key(prefix))
        return [] if best is None else [(best,)]

    def refer(self, parts: Sequence[dict[str, Any]]) -> None:
        """The loss knows no reference."""

    def part_terms(self, part: Mapping[str, Any]) -> LossTerms:
        """-log p of some candidates; its weight is the number of their tokens."""
        logp_P, row_P = self.token_logp(part)
        terms = filtered_likelihood(logp_P)
        nll_N = row_sums(-logp_P.detach(), row_P, len(part["index"]))
        best = nll_N.new_tensor(float(len(part["members"])))
        self.count("logp_chosen", -nll_N.sum(), best)
        return LossTerms(terms.loss, terms.weight, nll_N)
