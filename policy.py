"""Thoughts learned from rewards of what follows them (algo=rlmt; RLMT of arXiv 2601.21343).

A prefix is read, a thought is sampled, closed from outside where the model does not close it, and a
suffix is sampled; a judge scores the suffix and never sees the thought. The K samples of a prefix
are compared with each other:

    loss = - sum min(rho A, clip(rho) A) + beta k3,     A of the group, rho = pi / pi_old

over the tokens that the model chose: thought and suffix, not the prefix and not a boundary that was
inserted. Log-probabilities are those of the distribution that was sampled from
(`algo.sampling_mask=match`); `full` takes the whole vocabulary's, as published numbers did.

Legend: G prefixes (groups), K samples of each, N = G K rollouts, P scored tokens.
"""

import time
from collections.abc import Mapping, Sequence
from itertools import chain, islice
from typing import Any, cast

import torch
from torch import Tensor

from algorithm import LossTerms
from decoding.branches import branches
from decoding.categorical import nucleus
from decoding.rollout_record import Rollout, RolloutSettings
from decoding.rollout_server import ERROR, GeneratorRollouts, ServerRollouts
from evaluation.rollout_metrics import rollout_metrics
from objectives.advantages import ADVANTAGES, group_advantages
from objectives.policy_gradient import AGGREGATIONS, LEVELS, importance_correction, policy_loss
from objectives.token_log_probs import Keep, token_log_probs
from online import Experience, OnlineAlgorithm, Prefix
from rewards.continuation import Case, ContinuationReward
from runtime.config import instantiate
from runtime.errors import ConfigError

_MASKS = ("match", "full")
_CORRECTION = {"level", "cap"}  # what an importance correction needs


class ThoughtPolicy(OnlineAlgorithm):
    """Group-relative policy gradients over two-stage rollouts."""

    def _read_options(self) -> None:
        super()._read_options()
        algo = self.config["algo"]
        allowed = {
            "advantage": tuple(ADVANTAGES), "ratio": LEVELS, "aggregation": tuple(AGGREGATIONS),
            "kl.level": LEVELS, "sampling_mask": _MASKS,
        }  # fmt: skip
        found = algo | {"kl.level": algo["kl"]["level"]}
        for name, values in allowed.items():
            if found[name] not in values:
                raise ConfigError(f"algo.{name}={found[name]}: allowed {', '.join(values)}")
        if algo["samples"] < 2:
            raise ConfigError(
                f"algo.samples={algo['samples']}: a sample is compared with the others of its"
                " prefix; allowed an integer >= 2"
            )
        self._check_sampler()
        if algo["updates"] > 1 and algo["top_p"] < 1 and algo["sampling_mask"] == "match":
            raise ConfigError(
                f"algo.updates={algo['updates']} algo.top_p={algo['top_p']}: after a step the"
                " nucleus is another one; allowed: algo.top_p=1, or algo.updates=1"
            )
        if algo["kl"]["coefficient"] > 0 and algo["reference"] is None:
            raise ConfigError(
                f"algo.kl.coefficient={algo['kl']['coefficient']}: needs a reference; allowed: 0,"
                " or algo.reference={kind:frozen}"
            )
        open_id, close_id = self.delimiter("open"), self.delimiter("close")
        if open_id == close_id:
            raise ConfigError(
                f"algo.close={algo['close']}: the token of algo.open={algo['open']}; allowed:"
                " another one, so that a thought has an end"
            )
        self.settings = RolloutSettings(
            open_id=open_id,
            close_id=close_id,
            stop_ids=(self.special.eos,),
            thought_tokens=algo["thought_tokens"],
            suffix_tokens=algo["suffix_tokens"],
            temperature=float(algo["temperature"]),
            top_p=float(algo["top_p"]),
            rows=algo["rows"],
        )
        # A model that is only opened, whose architecture is known, needs no judge.
        self._reward: ContinuationReward | None = None
        self._sampler: ServerRollouts | None = None
        if algo.get("backbone") is None:
            self._reward = self._judge()

    def _check_sampler(self) -> None:
        """What samples, and what makes up for its not being the policy of now."""
        algo = self.config["algo"]
        correction = algo["correction"]
        if correction is not None and correction.keys() != _CORRECTION:
            raise ConfigError(
                f"algo.correction={correction}: level and cap, both and nothing else; allowed:"
                " {level:token,cap:2.0}, null"
            )
        if algo.get("sampler") is not None and correction is None:
            raise ConfigError(
                "algo.correction=null: importance correction when the generator is a server"
                " (algo.sampler); allowed: {level:token,cap:2.0}, or algo.sampler=null"
            )
        sync = (algo.get("sampler") or {}).get("sync")
        if algo.get("lora") is not None and isinstance(sync, dict):
            raise ConfigError(
                f"algo.sampler.sync: {sync['_target_']} sends every weight by its name, and a"
                " server of the whole model knows none of algo.lora; allowed: algo.lora=null, or"
                " algo.sampler.sync=none"
            )

    @property
    def reward(self) -> ContinuationReward:
        """The judge of `reward`."""
        if self._reward is None:
            self._reward = self._judge()
        return self._reward

    def _judge(self) -> ContinuationReward:
        if self.config.get("reward") is None:
            raise ConfigError(
                f"reward=null: algo={self.config['algo']['name']} learns from rewards; allowed:"
                " a choice of its group, reward=verifiable"
            )
        return cast(ContinuationReward, instantiate(self.config["reward"]))

    @property
    def longest(self) -> int:
        """Tokens that a sample can have, the constant of Dr.GRPO."""
        return self.settings.thought_tokens + self.settings.suffix_tokens

    def collect(self, batch: dict[str, Tensor]) -> Experience:
        """Sample, judge and compare."""
        algo = self.config["algo"]
        # 1. K rollouts of every prefix.
        started = time.monotonic()
        prefixes = self.prefixes(batch)
        rollouts = self.roll_out(prefixes)
        sampled = time.monotonic()
        # 2. Rewards; what has no valid judgement counts nowhere.
        rows = self.judged(prefixes, rollouts)
        judged = time.monotonic()
        reward_GK = torch.tensor(
            [float("nan") if row["reward"] is None else row["reward"] for row in rows]
        ).view(len(prefixes), algo["samples"])
        valid_GK = ~reward_GK.isnan()
        # 3. Advantages within groups.
        advantage_GK = group_advantages(reward_GK, valid_GK, algo["advantage"])
        # 4. Pieces for the passes of training.
        mixed_G = (advantage_GK != 0).any(-1, keepdim=True)
        felt_GK = valid_GK & mixed_G if algo["kl"]["mixed_groups_only"] else valid_GK
        index_N = batch["index"].cpu().repeat_interleave(algo["samples"])
        columns = zip(
            rollouts, index_N, advantage_GK.flatten(), valid_GK.flatten(), felt_GK.flatten(),
            strict=True,
        )  # fmt: skip
        parts = []
        while piece := list(islice(columns, algo["rows_per_pass"])):
            parts.append(self.part(*map(list, zip(*piece, strict=True))))
        return Experience(parts, self._metrics(rows, sampled - started, judged - sampled))

    def roll_out(self, prefixes: Sequence[Prefix]) -> list[Rollout]:
        """K rollouts of every prefix, in order."""
        opened = [(one.id, [*one.prefix_ids, self.settings.open_id]) for one in prefixes]
        settings, samples = self.step_settings(self.settings), self.config["algo"]["samples"]
        if self.config["algo"].get("sampler") is not None:
            return self.remote(settings).sample(opened, samples)
        with self.sampling(settings) as sampler:
            return sampler.sample(opened, samples)

    def remote(self, settings: RolloutSettings) -> GeneratorRollouts:
        """`algo.sampler`, which has heard of the weights of now from one rank."""
        if self._sampler is None:
            self._sampler = cast(ServerRollouts, instantiate(self.config["algo"]["sampler"]))
        sampler = self._sampler.rollouts(settings, self.backbone.forbidden_V)
        if self.trainer.is_global_zero:
            self._sampler.follow(self.backbone.model)
        # The others ask no sooner than the server has them.
        self.trainer.strategy.barrier("weights of the server")
        return sampler

    def teardown(self, stage: str) -> None:
        """The server hears that no more weights come."""
        super().teardown(stage)
        if self._sampler is not None:
            self._sampler.close()
            self._sampler = None

    def judged(
        self, prefixes: Sequence[Prefix], rollouts: Sequence[Rollout]
    ) -> list[dict[str, Any]]:
        """Rollouts as rows with their texts and rewards (`evaluation.rollout_metrics`)."""
        texts = {one.id: (self.text(one.prefix_ids), self.text(one.reference_ids))
                 for one in prefixes}  # fmt: skip
        suffixes = [self.text(one.suffix_ids) for one in rollouts]
        cases = [
            Case(f"{one.prefix_id}/{one.k}", *texts[one.prefix_id], suffix)
            for one, suffix in zip(rollouts, suffixes, strict=True)
        ]
        rows = zip(rollouts, suffixes, self.reward.judge(cases), strict=True)
        return [
            {
                "prefix_id": one.prefix_id,
                "k": one.k,
                "prefix": texts[one.prefix_id][0],
                "thought": self.text(one.thought_ids),
                "suffix": suffix,
                # What got no answer has nothing that could be judged.
                "reward": None if one.suffix_finish == ERROR else judgement.score,
                "reason": judgement.reason,
                "thought_tokens": len(one.thought_ids),
                "suffix_tokens": len(one.suffix_ids),
                "closed_autonomously": one.closed_autonomously,
                "boundary_ids": one.boundary_ids,
            }
            for one, suffix, judgement in rows
        ]

    def _metrics(
        self, mine: list[dict[str, Any]], sampling_s: float, judging_s: float
    ) -> dict[str, float]:
        """Of the rollouts of all ranks, which every rank then knows."""
        rows = self.gather_rows(mine)
        self.keep_samples(rows)
        tags = self.config["algo"]["open"], self.config["algo"]["close"]
        found = rollout_metrics(rows, self.remembered_numbers.get("baseline_tokens"), tags)
        self.remembered_numbers.setdefault("baseline_tokens", found["avg_total_new_tokens"])
        found.setdefault("response_length_growth", 0.0)
        tokens = sum(row["thought_tokens"] + row["suffix_tokens"] for row in mine)
        found["rollout_tokens_per_s"] = tokens / sampling_s if sampling_s > 0 else 0.0
        found["judging_s"] = judging_s
        return self.watched(found)

    def part(
        self, rollouts: Sequence[Rollout], index: Sequence[Tensor], advantage: Sequence[Tensor],
        counts: Sequence[Tensor], felt: Sequence[Tensor],
    ) -> dict[str, Any]:  # fmt: skip
        """Some rollouts for one backward pass, with what does not change while they are learned
        from: log-probabilities of the reference, of the sampler, and of the weights of now."""
        algo = self.config["algo"]
        with_boundary = algo["score_boundary"]
        rows = {
            "branches": branches(rollouts, with_boundary),
            "index": torch.stack(list(index)), "advantage": torch.stack(list(advantage)),
            "counts": torch.stack(list(counts)), "felt": torch.stack(list(felt)),
            "sampler": torch.tensor(
                [*chain.from_iterable(one.logprobs(with_boundary) for one in rollouts)]
            ),
        }  # fmt: skip
        batch: dict[str, Any] = self.transfer_batch_to_device(rows, self.device, 0)
        batch["reference"] = batch["old"] = None
        if self.reference is not None:
            with self.reference_weights():
                batch["reference"] = self.log_probs(batch)[0]
        if algo["updates"] > 1:
            batch["old"] = self.log_probs(batch)[0]
        return batch

    def log_probs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        """log p [P] of the tokens that the model chose, and whose they are."""
        hidden_PD, token_P, row_P = self.choices(batch)
        logp_P = token_log_probs(
            hidden_PD, self.backbone.logits, token_P, self.settings.temperature,
            self.backbone.forbidden_V, self._keep,
        )  # fmt: skip
        return logp_P, row_P

    @property
    def _keep(self) -> Keep | None:
        """The tokens that could be drawn."""
        top_p = self.settings.top_p
        if top_p == 1.0 or self.config["algo"]["sampling_mask"] == "full":
            return None
        return lambda p_CV: nucleus(p_CV, top_p) > 0

    def part_terms(self, part: Mapping[str, Any]) -> LossTerms:
        """The clipped surrogate and the KL of some rollouts."""
        algo = self.config["algo"]
        logp_P, sequence_P = self.log_probs(part)
        old_P = logp_P.detach() if part["old"] is None else part["old"]
        correction = None
        if algo["correction"] is not None:
            correction = importance_correction(
                old_P, part["sampler"], sequence_P, len(part["counts"]), **algo["correction"]
            )
        terms = policy_loss(
            logp_P,
            old_P,
            part["reference"],
            sequence_P,
            part["advantage"],
            part["counts"],
            ratio=algo["ratio"],
            aggregation=algo["aggregation"],
            longest=self.longest,
            clip_low=algo["clip_low"],
            clip_high=algo["clip_high"],
            kl_coefficient=algo["kl"]["coefficient"],
            kl_level=algo["kl"]["level"],
            kl_counts_N=part["felt"],
            correction_P=None if correction is None else correction.weight_P,
        )
        self._count(part, terms, old_P, correction)
        return LossTerms(terms.loss, terms.weight, terms.loss_N)

    def _count(self, part: Mapping[str, Any], terms: Any, old_P: Tensor, correction: Any) -> None:
        """What is logged of a step beside its loss."""
        rollouts = terms.kl_N.new_tensor(float(len(terms.kl_N)))
        self.count("kl", terms.kl_N.sum(), rollouts)
        self.count("ratio", terms.ratio_N.sum(), rollouts)
        self.count("clip_fraction", terms.clipped, terms.ratios)
        gap_P = old_P - part["sampler"].to(old_P.dtype)
        # 1 where training and sampling mean the same distribution, less by what a mask cuts off.
        self.count("sampler_ratio", gap_P.exp().sum(), torch.ones_like(gap_P).sum())
        if correction is not None:
            self.count("correction_cut", correction.cut * rollouts, rollouts)
