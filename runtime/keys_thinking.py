"""The keys of thinking mid-training: its data, judges, `algo`, gate and reasoning evaluation."""

from runtime.key_kinds import Key, choice, flag, integer, number, text

_OPTIONAL = {"optional": True}
_NULLABLE = {"nullable": True}

THINKING_KEYS: tuple[Key, ...] = (
    # supervised fine-tuning on thoughts
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
)
