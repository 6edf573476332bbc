"""The contract keys as a table: what each may hold. `runtime.validation` reads it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# Of a file's sequences: longer than any that a network here was trained on.
MAX_LENGTH = 2**20
ATTENTION = ("auto", "sdpa", "flex", "math")
# Without 16-*: fp16 needs a loss scaler, which sets `grad_scale` and `found_inf` of the fused
# optimiser itself; there the algorithms put their own normaliser and guard. Without bf16-true: the
# moving average of the weights, the loss and validation need weights in fp32.
PRECISIONS = ("32", "32-true", "64", "64-true", "bf16", "bf16-mixed")


@dataclass(frozen=True)
class Key:
    """One configuration key.

    Attributes:
        path: dotted name.
        test: whether a value is good; a bool is never taken for a number.
        allowed: what the message says is allowed.
        nullable: null stands for a default decided later.
        optional: the key may be absent, because another component of its group lacks it.
    """

    path: str
    test: Callable[[Any], bool]
    allowed: str
    nullable: bool = False
    optional: bool = False


def is_integer(value: Any) -> bool:
    """An int that is not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """A finite int or float that is not a bool."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and abs(value) < float("inf")


def _integer(path: str, low: int, **options: bool) -> Key:
    return Key(path, lambda v: is_integer(v) and v >= low, f"an integer >= {low}", **options)


def _number(path: str, interval: str, **options: bool) -> Key:
    """`interval` as mathematicians write it: "(0, 1]"; "inf" for no bound."""
    low, high = (float(part) for part in interval[1:-1].split(","))
    above = (lambda v: v >= low) if interval[0] == "[" else (lambda v: v > low)
    below = (lambda v: v <= high) if interval[-1] == "]" else (lambda v: v < high)
    return Key(
        path, lambda v: is_number(v) and above(v) and below(v), f"a number in {interval}", **options
    )


def _flag(path: str, **options: bool) -> Key:
    return Key(path, lambda v: isinstance(v, bool), "true, false", **options)


def _choice(path: str, *choices: Any, **options: bool) -> Key:
    # `1 in (True,)` holds in Python, so types are compared too.
    test = lambda v: any(v == c and type(v) is type(c) for c in choices)  # noqa: E731
    return Key(path, test, ", ".join(str(c).lower() for c in choices), **options)


def _text(path: str, **options: bool) -> Key:
    return Key(path, lambda v: isinstance(v, str) and v != "", "a text", **options)


def _is_fraction_or_count(value: Any) -> bool:
    whole = is_integer(value) and value >= 0
    return whole or (isinstance(value, float) and 0.0 <= value <= 1.0)


def _is_devices(value: Any) -> bool:
    if is_integer(value):
        return value == -1 or value >= 1
    listed = isinstance(value, list) and value and all(map(is_integer, value))
    return bool(listed) or (isinstance(value, str) and value != "")


def _is_names(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) and name for name in value)


def _is_texts(value: Any) -> bool:
    return _is_names([value]) or (_is_names(value) and value != [])


def _is_named_files(value: Any) -> bool:
    """{NAME: FILE, ...}"""
    return (
        isinstance(value, dict)
        and _is_texts(list(map(str, value)))
        and all(isinstance(file, str) and file for file in value.values())
    )


def _is_values(value: Any) -> bool:
    """{KEY: VALUE}, or the same as a text, KEY=VALUE with commas."""
    return (isinstance(value, dict) and value != {}) or (isinstance(value, str) and "=" in value)


def _is_files(value: Any) -> bool:
    """A path or glob, or a list of them, which may be empty."""
    return _is_names([value]) or _is_names(value)


def _is_counts(value: Any) -> bool:
    return isinstance(value, dict) and all(is_integer(n) and n >= 0 for n in value.values())


def _is_groups(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_texts, value.values()))


def _is_widths(value: Any) -> bool:
    return isinstance(value, list) and all(
        is_number(width) and 0.01 <= width < 1 for width in value
    )


def _is_splits(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and set(value) <= _SPLITS


_SPLITS = {"train", "validation", "test"}
_OPTIONAL = {"optional": True}
_NULLABLE = {"nullable": True}

KEYS: tuple[Key, ...] = (
    _integer("seed", 0),
    _integer("model.length", 1),
    _integer("block_size", 1),
    Key("plugins", _is_names, "a list of package names"),
    _text("optimized_metric", **_NULLABLE),
    _text("mode.name"),
    _text("mode._target_"),
    _flag("mode.needs_checkpoint", **_OPTIONAL),
    _flag("mode.single_process", **_OPTIONAL),
    _choice("mode.model_kind", "network", "target", "any", **_OPTIONAL),
    _integer("mode.num_samples", 0, **_OPTIONAL),
    Key("mode.runs", _is_texts, "a folder, a glob or a list of them", optional=True),
    Key("mode.metrics", _is_names, "a list of metrics", nullable=True, optional=True),
    Key("mode.reference", _is_values, "{KEY:VALUE,...}", nullable=True, optional=True),
    _text("mode.x", nullable=True, optional=True),
    Key("mode.ignore", _is_names, "a list of keys", optional=True),
    # acceptance of drafts
    Key("mode.prompts", _is_named_files, "{BENCHMARK: FILE, ...}", optional=True),
    _text("mode.draft", **_OPTIONAL, **_NULLABLE),
    _text("mode.reference_draft", **_OPTIONAL, **_NULLABLE),
    _text("mode.reference_run", **_OPTIONAL, **_NULLABLE),
    _text("mode.label", **_OPTIONAL, **_NULLABLE),
    _integer("mode.block_size", 1, **_OPTIONAL, **_NULLABLE),
    _integer("mode.max_new_tokens", 1, **_OPTIONAL),
    _flag("mode.thinking", **_OPTIONAL),
    _integer("mode.batch_size", 1, **_OPTIONAL),
    _integer("mode.timed_prompts", 0, **_OPTIONAL),
    _integer("mode.resamples", 2, **_OPTIONAL),
    Key("mode.remarks", _is_names, "a list of sentences", optional=True),
    Key(
        "mode.server",
        lambda v: isinstance(v, dict) and "_target_" in v,
        "a choice of its group, mode/server=NAME",
        nullable=True,
        optional=True,
    ),
    Key("mode.input", _is_texts, "a .jsonl file, a glob or a list of them", optional=True),
    Key("mode.against", _is_files, "a .jsonl file, a glob or a list of them", optional=True),
    Key("mode.anchor_input", _is_files, "a .jsonl file, a glob or a list of them", optional=True),
    _text("mode.output", **_OPTIONAL),
    _flag("mode.within", **_OPTIONAL),
    _integer("mode.ngram", 1, **_OPTIONAL),
    _integer("mode.least_characters", 1, **_OPTIONAL),
    Key("mode.item_fields", _is_names, "a list of fields", optional=True),
    Key("mode.row_fields", _is_names, "a list of fields", optional=True),
    Key("mode.counts", _is_counts, "{GROUP: ROWS, ...}", optional=True),
    Key("mode.anchors", _is_counts, "{GROUP: ROWS, ...}", nullable=True, optional=True),
    Key("mode.groups", _is_groups, "{GROUP: [PATTERN, ...], ...}", nullable=True, optional=True),
    _integer("mode.max_per_prompt", 1, **_OPTIONAL),
    _flag("mode.repeat", **_OPTIONAL),
    _number("mode.language_share", "[0, 1]", **_OPTIONAL),
    _integer("mode.limit", 1, **_OPTIONAL, **_NULLABLE),
    _integer("mode.seed", 0, **_OPTIONAL),
    # tasks of the standard harness
    Key("mode.tasks", _is_texts, "a task or a list of them", optional=True),
    _text("mode.include_path", **_OPTIONAL, **_NULLABLE),
    _integer("mode.num_fewshot", 0, **_OPTIONAL, **_NULLABLE),
    Key(
        "mode.gen_kwargs",
        lambda v: isinstance(v, dict),
        "{KEY: VALUE, ...}",
        nullable=True,
        optional=True,
    ),
    _flag("mode.apply_chat_template", **_OPTIONAL),
    _flag("mode.fewshot_as_multiturn", **_OPTIONAL),
    _text("mode.system_instruction", **_OPTIONAL, **_NULLABLE),
    _integer("mode.bootstrap", 0, **_OPTIONAL),
    _flag("mode.allow_code", **_OPTIONAL),
    _text("paths.run_dir"),
    # algorithm
    _text("algo.name"),
    _text("algo._target_"),
    _integer("algo.default_block_size", 1, **_OPTIONAL),
    _flag("algo.fixed_block_size", **_OPTIONAL),
    _integer("algo.T", 0, **_OPTIONAL),
    _choice("algo.monitor_mode", "min", "max", **_OPTIONAL),
    _integer("algo.anchors", 1, **_OPTIONAL),
    _integer("algo.anchors_per_document", 1, **_OPTIONAL),
    _choice("algo.attn_backend", *ATTENTION, **_OPTIONAL),
    _text("algo.feature_cache", **_OPTIONAL, **_NULLABLE),
    _integer("algo.draft.num_hidden_layers", 1, **_OPTIONAL),
    _integer("algo.draft.num_taps", 1, **_OPTIONAL, **_NULLABLE),
    Key(
        "algo.draft.target_layer_ids",
        lambda v: isinstance(v, list) and all(map(is_integer, v)),
        "a list of layers",
        nullable=True,
        optional=True,
    ),
    _flag("algo.draft.sample_from_anchor", **_OPTIONAL),
    _flag("algo.time_conditioning", **_OPTIONAL),
    _flag("algo.ignore_bos", **_OPTIONAL),
    _flag("algo.mdlm_loss_scale", **_OPTIONAL),
    _flag("algo.var_min", **_OPTIONAL),
    _flag("algo.fix_clipping", **_OPTIONAL),
    Key("algo.clip_search_widths", _is_widths, "a list of numbers in [0.01, 1)", optional=True),
    _number("algo.clip_search_delta", "(0, 1)", **_OPTIONAL),
    # blocks that are refined
    _choice("algo.weighting", "bound", "uniform", **_OPTIONAL),
    _flag("algo.complementary", **_OPTIONAL),
    _integer("algo.max_passes", 1, **_OPTIONAL),
    _number("algo.injection.start", "[0, 1]", **_OPTIONAL),
    _number("algo.injection.end", "[0, 1]", **_OPTIONAL),
    _number("algo.injection.tokens", "[0, inf)", **_OPTIONAL),
    _flag("algo.gradient_checkpointing", **_OPTIONAL),
    Key(
        "algo.lora",
        lambda v: isinstance(v, dict) and v != {},
        "{r:16,target_modules:all-linear}",
        nullable=True,
        optional=True,
    ),
    _integer("refine.iterations", 1, **_OPTIONAL),
    _integer("bon.count", 2, **_OPTIONAL),
    _integer("bon.rounds", 1, **_OPTIONAL),
    _choice("bon.score_agg", "select_each", "perround", "lastround", **_OPTIONAL),
    _number("bon.alpha", "[0, inf)", **_OPTIONAL),
    _choice("bon.form", "additive", "convex", "scorer_only", **_OPTIONAL),
    _choice("bon.pick", "argmax", "gumbel", **_OPTIONAL),
    _number("bon.gumbel_temperature", "(0, inf)", **_OPTIONAL),
    _flag("nce.dedup", **_OPTIONAL),
    _choice("nce.positive", "truth", "fewest_errors", **_OPTIONAL),
    _number("nce.target_temperature", "[0, inf)", **_OPTIONAL),
    _number("nce.l2", "[0, inf)", **_OPTIONAL),
    _integer("nce.blocks_per_row", 1, **_OPTIONAL, **_NULLABLE),
    _integer("nce.eval_batches", 0, **_OPTIONAL),
    _integer("scorer.layers", 0, **_OPTIONAL),
    _flag("scorer.bounded", **_OPTIONAL),
    _choice("scorer.scale.mode", "fixed", "learnable", **_OPTIONAL),
    _choice("scorer.scale.dtype", "float32", "bfloat16", **_OPTIONAL),
    _number("scorer.scale.init", "(0, inf)", **_OPTIONAL),
    _number("scorer.scale.min", "(0, inf)", **_OPTIONAL),
    _number("scorer.scale.max", "(0, inf)", **_OPTIONAL),
    _number("scorer.scale.lr_mult", "(0, inf)", **_OPTIONAL),
    _choice("mode.blocks", "checkpoint", "data", **_OPTIONAL),
    # token weights
    _number("masking.mix_alpha", "[0, 1]", **_OPTIONAL),
    _choice("masking.depth_mode", "dependency", "none", "random", "position", **_OPTIONAL),
    _number("masking.depth_temp", "(0, inf)", **_OPTIONAL),
    _flag("masking.normalize_depth", **_OPTIONAL),
    _flag("masking.reverse", **_OPTIONAL),
    _choice("masking.target", "loss", "schedule", **_OPTIONAL),
    # model
    _integer("model.hidden_size", 1, **_OPTIONAL),
    _integer("model.n_blocks", 1, **_OPTIONAL),
    _integer("model.n_heads", 1, **_OPTIONAL),
    _integer("model.cond_dim", 1, **_OPTIONAL),
    _number("model.dropout", "[0, 1)", **_OPTIONAL),
    _choice("model.attn_backend", *ATTENTION, **_OPTIONAL),
    _flag("model.compile", **_OPTIONAL),
    # training
    _flag("training.resample"),
    _text("training.from_pretrained", **_NULLABLE),
    _flag("training.allow_partial"),
    _number("training.ema", "[0, 1)"),
    _flag("training.antithetic_sampling"),
    _number("training.sampling_eps_min", "[0, 1]"),
    _number("training.sampling_eps_max", "[0, 1]"),
    # parsing
    Key(
        "data.parse",
        lambda v: isinstance(v, dict) and "parser" in v,
        "a choice of its group, data/parse=NAME",
        nullable=True,
        optional=True,
    ),
    _text("data.parse.folder", **_OPTIONAL),
    _integer("data.parse.documents_per_part", 1, **_OPTIONAL),
    _integer("data.parse.num_processes", 1, **_OPTIONAL, **_NULLABLE),
    _choice("data.parse.tokenize", "stanza", "words", **_OPTIONAL),
    _integer("data.parse.max_words", 1, **_OPTIONAL, **_NULLABLE),
    _integer("data.parse.batch_words", 1, **_OPTIONAL, **_NULLABLE),
    Key("mode.splits", _is_splits, "a list of train, validation, test", optional=True),
    _integer("mode.shard", 0, **_OPTIONAL, **_NULLABLE),
    _integer("mode.num_shards", 1, **_OPTIONAL, **_NULLABLE),
    # answers of a target
    Key(
        "benchmark",
        lambda v: isinstance(v, dict) and all(isinstance(one, dict) for one in v.values()),
        "choices of its group, benchmark=NAME or benchmark=[NAME,NAME]",
        nullable=True,
        optional=True,
    ),
    _text("mode.baseline", **_OPTIONAL),
    _integer("mode.workers", 1, **_OPTIONAL),
    _number("mode.temperature", "[0, inf)", **_OPTIONAL),
    _number("mode.top_p", "(0, 1]", **_OPTIONAL),
    _integer("mode.top_k", 0, **_OPTIONAL),
    Key(
        "mode.backend",
        lambda v: isinstance(v, dict) and "_target_" in v,
        "a choice of its group, mode/backend=NAME",
        optional=True,
    ),
    _integer("mode.backend.prefill_tokens", 1, **_OPTIONAL),
    _text("mode.backend.base_url", **_OPTIONAL),
    _text("mode.backend.model", **_OPTIONAL),
    _integer("mode.backend.concurrency", 1, **_OPTIONAL),
    _number("mode.backend.timeout_s", "(0, inf)", **_OPTIONAL),
    _integer("mode.backend.retries", 0, **_OPTIONAL),
    _number("mode.backend.backoff_s", "[0, inf)", **_OPTIONAL),
    _integer("mode.backend.max_failures", 1, **_OPTIONAL),
    _choice("mode.backend.token_ids", "server", "retokenise", "none", **_OPTIONAL),
    _text("mode.backend.tokenizer", **_OPTIONAL, **_NULLABLE),
    Key("mode.backend.extra_body", lambda v: isinstance(v, dict), "{KEY:VALUE,...}", optional=True),
    # batches
    _integer("loader.global_batch_size", 1),
    _integer("loader.batch_size", 1, **_NULLABLE),
    _integer("loader.eval_global_batch_size", 1),
    _integer("loader.eval_batch_size", 1, **_NULLABLE),
    _integer("loader.num_workers", 0),
    # optimiser
    _number("optim.lr", "(0, inf)"),
    _number("optim.beta1", "[0, 1)"),
    _number("optim.beta2", "[0, 1)"),
    _number("optim.eps", "(0, inf)"),
    _number("optim.weight_decay", "[0, inf)"),
    _integer("lr_scheduler.warmup_steps", 0, **_OPTIONAL),
    # sampling
    _integer("sampling.num_sample_batches", 0),
    _integer("sampling.batch_size", 1, **_NULLABLE),
    _integer("sampling.num_steps", 1, **_NULLABLE),
    _number("sampling.nucleus_p", "(0, 1]"),
    _number("sampling.temperature", "[0, inf)"),
    _flag("sampling.kv_cache"),
    _flag("sampling.first_hitting"),
    _flag("sampling.var_length"),
    _flag("sampling.float64"),
    _integer("sampling.length", 1, **_NULLABLE),
    _text("sampling.prompt", **_NULLABLE),
    _integer("sampling.tokens_per_step", 1),
    _number("sampling.confidence_threshold", "[0, 1]"),
    _number("sampling.entropy_bound", "[0, inf)"),
    _integer("sampling.entropy_window", 1),
    _number("sampling.min_entropy", "[0, inf)"),
    _choice("sampling.precision", "fp32", "bf16"),
    Key(
        "sampling.strategy",
        lambda v: isinstance(v, dict) and "_target_" in v,
        "a choice of its group, sampling/strategy=NAME",
        nullable=True,
    ),
    # evaluation
    _text("eval.checkpoint_path", **_NULLABLE),
    _choice("eval.weights", "ema", "raw"),
    _text("eval.split"),
    _integer("eval.num_draws", 1),
    _integer("eval.limit_rows", 1, **_NULLABLE),
    _text("eval.generative_model", **_NULLABLE),
    _flag("eval.mauve"),
    # checkpoints
    _text("checkpointing.save_dir", **_NULLABLE),
    _text("checkpointing.subdir", **_OPTIONAL),
    _choice("checkpointing.resume_from_ckpt", True, False, "required"),
    _text("checkpointing.resume_ckpt_path", **_NULLABLE),
    _integer("checkpointing.every_n_steps", 1),
    _integer("checkpointing.keep_every_n_steps", 1, **_NULLABLE),
    _integer("checkpointing.full_state_every_n_steps", 1, **_NULLABLE),
    _integer("checkpointing.full_state_keep", 1, **_NULLABLE),
    # data
    _flag("data.join", **_OPTIONAL),
    _integer("data.documents_per_row", 1, **_OPTIONAL, **_NULLABLE),
    _integer("data.align", 1, **_OPTIONAL, **_NULLABLE),
    # trainer
    _choice("trainer.accelerator", "auto", "cpu", "gpu", "cuda"),
    Key("trainer.devices", _is_devices, 'auto, -1, an integer >= 1, a list or "0,1"'),
    _integer("trainer.num_nodes", 1),
    Key(
        "trainer.precision",
        lambda v: v is not False and v is not True and str(v) in PRECISIONS,
        f"{', '.join(PRECISIONS)} (not 16-*: the guard against non-finite gradients takes the"
        " place of its loss scaler; not bf16-true: weights stay in fp32)",
    ),
    _integer("trainer.max_steps", 1),
    Key(
        "trainer.val_check_interval",
        lambda v: _is_fraction_or_count(v) and v > 0,
        "optimiser steps (an integer >= 1) or a fraction of the run in (0.0, 1.0]",
    ),
    Key(
        "trainer.limit_val_batches",
        _is_fraction_or_count,
        "an integer >= 0 or a fraction in [0.0, 1.0]",
        nullable=True,
    ),
    _integer("trainer.log_every_n_steps", 1),
    _number("trainer.gradient_clip_val", "[0, inf)", **_NULLABLE),
)
