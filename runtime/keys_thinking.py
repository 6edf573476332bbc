"""The keys of thinking mid-training: its data, judges, `algo`, gate and reasoning evaluation."""

from pathlib import Path
from typing import Any

from runtime.key_kinds import (
    Key,
    choice,
    component,
    flag,
    integer,
    is_named_files,
    is_names,
    is_number,
    number,
    text,
)

_OPTIONAL = {"optional": True}
_NULLABLE = {"nullable": True}
_JUDGES = "rewards.judges"
_CONTINUATION = {"of": "modes.continuation_eval", "optional": True}
_LEVELS = ("token", "sequence")
_SAMPLER = "decoding.rollout_server"


def _is_reference(value: Any) -> bool:
    """{kind: ..., every: ..., decay: ...}, of which only the first has to be there."""
    return isinstance(value, dict) and {"kind"} <= value.keys() <= {"kind", "every", "decay"}


def _is_correction(value: Any) -> bool:
    """{level: ..., cap: ...}"""
    return isinstance(value, dict) and value.keys() == {"level", "cap"}


def _is_weights(value: Any) -> bool:
    """{text: ..., thought: ..., delimiter: ...}"""
    return isinstance(value, dict) and value.keys() == {"text", "thought", "delimiter"}


def _is_file(value: Any) -> bool:
    """A path that is, or can become, a file."""
    return isinstance(value, str) and value != "" and not Path(value).is_dir()


def _is_pairs(value: Any) -> bool:
    """A list of pairs of texts."""
    return isinstance(value, list) and all(is_names(one) and len(one) == 2 for one in value)


def is_shares(value: Any) -> bool:
    """{NAME: SHARE, ...}"""
    named = isinstance(value, dict) and value != {}
    return named and all(is_number(part) and 0 <= part <= 1 for part in value.values())


THINKING_KEYS: tuple[Key, ...] = (
    # learning from samples
    text("algo.arm", **_OPTIONAL, **_NULLABLE),
    integer("algo.updates", 1, **_OPTIONAL),
    integer("algo.samples", 1, **_OPTIONAL),
    integer("algo.rows", 1, **_OPTIONAL),
    integer("algo.rows_per_pass", 1, **_OPTIONAL),
    integer("algo.samples_every", 0, **_OPTIONAL),
    flag("algo.enforce_stop_conditions", **_OPTIONAL),
    text("algo.open", **_OPTIONAL),
    text("algo.close", **_OPTIONAL),
    integer("algo.thought_tokens", 0, **_OPTIONAL),
    integer("algo.suffix_tokens", 1, **_OPTIONAL),
    number("algo.temperature", "(0, inf)", **_OPTIONAL),
    number("algo.top_p", "(0, 1]", **_OPTIONAL),
    choice("algo.sampling_mask", "match", "full", **_OPTIONAL),
    choice("algo.advantage", "grpo", "dr_grpo", "rloo", **_OPTIONAL),
    choice("algo.ratio", *_LEVELS, **_OPTIONAL),
    choice("algo.aggregation", "sequence_mean", "constant", "token_mean", **_OPTIONAL),
    number("algo.clip_low", "[0, 1)", **_OPTIONAL),
    number("algo.clip_high", "[0, inf)", **_OPTIONAL),
    number("algo.kl.coefficient", "[0, inf)", **_OPTIONAL),
    choice("algo.kl.level", *_LEVELS, **_OPTIONAL),
    flag("algo.kl.mixed_groups_only", **_OPTIONAL),
    flag("algo.score_boundary", **_OPTIONAL),
    Key(
        "algo.reference",
        _is_reference,
        "{kind:frozen} (beside kind only every, decay)",
        nullable=True,
        optional=True,
    ),
    choice("algo.reference.kind", "frozen", "periodic", "ema", **_OPTIONAL),
    integer("algo.reference.every", 1, **_OPTIONAL),
    number("algo.reference.decay", "[0, 1)", **_OPTIONAL),
    Key(
        "algo.correction",
        _is_correction,
        "{level:token,cap:2.0} (both, nothing else)",
        nullable=True,
        optional=True,
    ),
    choice("algo.correction.level", *_LEVELS, **_OPTIONAL),
    number("algo.correction.cap", "(0, inf)", **_OPTIONAL),
    # supervised fine-tuning on thoughts
    Key("algo.weights", _is_weights, "{text:1,thought:1,delimiter:1} (no other)", optional=True),
    number("algo.weights.text", "[0, inf)", **_OPTIONAL),
    number("algo.weights.thought", "[0, inf)", **_OPTIONAL),
    number("algo.weights.delimiter", "[0, inf)", **_OPTIONAL),
    text("mode.run", **_OPTIONAL, **_NULLABLE),
    integer("mode.repetition_rows", 1, **_OPTIONAL),
    integer("mode.prompt_tokens", 1, **_OPTIONAL),
    # prefixes and suffixes
    choice("data.chunking.mode", "fixed", "contiguous", "marker", **_OPTIONAL),
    integer("data.chunking.suffix_len", 1, **_OPTIONAL),
    integer("data.chunking.prefix_len", 1, **_OPTIONAL),
    integer("data.chunking.max_len", 2, **_OPTIONAL),
    integer("data.chunking.min_source_tokens", 0, **_OPTIONAL),
    integer("data.chunking.max_prefixes_per_doc", 1, **_OPTIONAL, **_NULLABLE),
    text("data.chunking.marker", **_OPTIONAL, **_NULLABLE),
    flag("data.end_suffix", **_OPTIONAL, **_NULLABLE),
    # reasoning evaluation
    Key(
        "mode.arm",
        lambda v: isinstance(v, str) and v not in ("", ".", "..") and "/" not in v,
        "a text without /, the name of a folder",
        nullable=True,
        optional=True,
    ),
    integer("mode.samples", 1, **_OPTIONAL),
    flag("mode.prefix_thought", **_OPTIONAL),
    text("mode.open", **_OPTIONAL),
    text("mode.close", **_OPTIONAL),
    Key("mode.arms", is_names, "a list of arms", nullable=True, optional=True),
    Key("mode.benchmarks", is_names, "a list of benchmarks", nullable=True, optional=True),
    Key("mode.comparisons", _is_pairs, "[[RIGHT,LEFT],...]", nullable=True, optional=True),
    # judges of continuations
    component("judge"),
    component("reward"),
    *(
        key
        for group in ("judge", "reward")
        for key in (
            integer(f"{group}.repeats", 1, of=_JUDGES, **_OPTIONAL),
            integer(f"{group}.max_characters", 1, of=_JUDGES, **_OPTIONAL),
            Key(
                f"{group}.cache",
                _is_file,
                "the path of a file (no folder)",
                nullable=True,
                optional=True,
                of=_JUDGES,
            ),
            number(f"{group}.max_invalid_rate", "[0, 1]", of=_JUDGES, **_OPTIONAL),
            integer(f"{group}.window", 1, of=_JUDGES, **_OPTIONAL),
            integer(f"{group}.max_failures", 1, of=_JUDGES, **_OPTIONAL),
        )
    ),
    text("mode.against", of="modes.continuation_eval", **_OPTIONAL, **_NULLABLE),
    choice(
        "mode.protocol",
        "both_orders",
        "seed_random_swap",
        of="modes.continuation_eval",
        **_OPTIONAL,
    ),
    # texts with thoughts
    choice("data.form", "interleaved", "raw", "prefixes", **_OPTIONAL),
    text("data.open", **_OPTIONAL),
    text("data.close", **_OPTIONAL),
    text("data.share", **_OPTIONAL, **_NULLABLE),
    Key("data.shares", is_shares, "{NAME: a number in [0, 1], ...}", optional=True),
    integer("data.limits.min_thoughts", 0, **_OPTIONAL),
    integer("data.limits.max_thoughts", 0, **_OPTIONAL, **_NULLABLE),
    integer("data.limits.max_thought_words", 1, **_OPTIONAL, **_NULLABLE),
    integer("data.limits.max_words", 1, **_OPTIONAL, **_NULLABLE),
    integer("data.min_prefix", 1, **_OPTIONAL),
    integer("data.min_suffix", 1, **_OPTIONAL),
    # reward gate
    Key(
        "mode.checkpoints",
        is_named_files,
        "{ARM: CHECKPOINT, ...}",
        nullable=True,
        optional=True,
    ),
    integer("mode.prefixes", 1, **_OPTIONAL),
    integer("mode.thought_tokens", 0, **_OPTIONAL),
    integer("mode.suffix_tokens", 1, **_OPTIONAL),
    text("mode.base_arm", **_OPTIONAL),
    text("mode.phase3_arm", **_OPTIONAL),
    Key("mode.order", is_names, "a list of arms", optional=True),
    flag("mode.probe", **_OPTIONAL),
    integer("mode.probe_samples", 1, **_OPTIONAL, **_NULLABLE),
    text("mode.generic", **_OPTIONAL),
    text("mode.teacher", **_OPTIONAL, **_NULLABLE),
    # thoughts put into documents
    component("mode.annotator"),
    integer("mode.annotator.limits.min_thoughts", 0, **_OPTIONAL),
    integer("mode.annotator.limits.max_thoughts", 0, **_OPTIONAL, **_NULLABLE),
    integer("mode.annotator.limits.max_thought_words", 1, **_OPTIONAL, **_NULLABLE),
    integer("mode.annotator.limits.max_words", 1, **_OPTIONAL, **_NULLABLE),
    integer("mode.annotator.retries", 0, **_OPTIONAL),
    text("mode.annotator.prompt", **_OPTIONAL),
    text("mode.annotator.prompt_kind", **_OPTIONAL),
    text("mode.annotator.marker", **_OPTIONAL),
    number("mode.annotator.idle", "[0, 1]", **_OPTIONAL),
    text("mode.text_column", **_OPTIONAL),
    choice("mode.delimiter_in_text", "reject", "escape", **_OPTIONAL),
    integer("mode.passage_words", 1, **_OPTIONAL, **_NULLABLE),
    # learning from preferences
    flag("algo.candidates.original", **_OPTIONAL),
    Key(
        "algo.candidates.rewrite",
        lambda v: isinstance(v, dict) and "_target_" in v,
        "+algo/rewrite@algo.candidates.rewrite=server",
        nullable=True,
        optional=True,
    ),
    choice("algo.tournament", "full", "pivot", **_OPTIONAL),
    choice("algo.orders", "both", "one", **_OPTIONAL),
    choice("algo.pairing", "best_worst", "all_pairs", "top_k_bottom_k", **_OPTIONAL),
    integer("algo.k", 1, **_OPTIONAL),
    number("algo.beta", "(0, inf)", **_OPTIONAL),
    integer("algo.kl_samples", 0, **_OPTIONAL),
    # rollouts from a server
    Key(
        "algo.sampler",
        lambda v: isinstance(v, dict) and "_target_" in v,
        "null, +algo/sampler=server",
        nullable=True,
        optional=True,
    ),
    Key(
        "algo.sampler.sync",
        lambda v: v == "none" or isinstance(v, dict),
        "none, +algo/sampler/sync=trl_vllm",
        of=_SAMPLER,
        optional=True,
    ),
    text("algo.sampler.base_url", of=_SAMPLER, **_OPTIONAL),
    text("algo.sampler.model", of=_SAMPLER, **_OPTIONAL),
    flag("algo.sampler.processed_logprobs", of=_SAMPLER, **_OPTIONAL),
    number("algo.sampler.max_failed", "[0, 1]", of=_SAMPLER, **_OPTIONAL),
    integer("algo.sampler.concurrency", 1, of=_SAMPLER, **_OPTIONAL),
    number("algo.sampler.timeout_s", "(0, inf)", of=_SAMPLER, **_OPTIONAL),
    integer("algo.sampler.retries", 0, of=_SAMPLER, **_OPTIONAL),
    number("algo.sampler.backoff_s", "[0, inf)", of=_SAMPLER, **_OPTIONAL),
    integer("algo.sampler.max_failures", 1, of=_SAMPLER, **_OPTIONAL),
)
