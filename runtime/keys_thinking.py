"""The keys of thinking mid-training: its data, judges, `algo`, gate and reasoning evaluation."""

from runtime.key_kinds import Key

_OPTIONAL = {"optional": True}
_NULLABLE = {"nullable": True}

THINKING_KEYS: tuple[Key, ...] = ()
