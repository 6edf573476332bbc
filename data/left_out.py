"""Why no document of a split became a row: the keys that the left out ones have to do with."""

from collections.abc import Mapping
from typing import Any

from data.blocks import PackingReport

# A check of `data.thoughts.Limits` by the reason that documents are counted under.
_LIMITS = {
    "too_few_thoughts": "limits.min_thoughts",
    "too_many_thoughts": "limits.max_thoughts",
    "thought_too_long": "limits.max_thought_words",
    "too_long": "limits.max_words",
}
_SHORT = {
    "contiguous": ("chunking.min_source_tokens", "chunking.suffix_len"),
    "fixed": ("chunking.min_source_tokens", "chunking.prefix_len", "chunking.suffix_len"),
    "marker": ("chunking.marker",),
}


def why_empty(data: Mapping[str, Any], length: int, report: PackingReport) -> str:
    """What is said of a split without a row: the data by name, and which keys left out what.

    Args:
        data: the section of the configuration.
        length: tokens of a row.
        report: what became of the documents.
    """
    keys = deciding_keys(data, report)
    if keys and are_all_left_out(report):
        return (
            f"{data['name']!r}: no document makes a row with {', '.join(keys)} ({report}); allowed:"
            " values that leave some in, or other documents"
        )
    more = f"; see also {', '.join(keys)}" if keys else ""
    return (
        f"{data['name']!r} does not fill one row of model.length={length} tokens ({report}){more}"
    )


def deciding_keys(data: Mapping[str, Any], report: PackingReport) -> list[str]:
    """The keys, KEY=VALUE, that decided that documents were left out, in the order of their number.

    Args:
        data: the section of the configuration.
        report: what became of the documents.

    Returns:
        nothing where no document was left out for what the section says.
    """
    chunking = data.get("chunking") or {}
    mode = chunking.get("mode")
    short = _SHORT.get(str(mode), ()) if chunking else ("min_prefix", "min_suffix")
    unmarked = "chunking.marker" if chunking else "limits.min_thoughts"
    counts: dict[tuple[str, ...], int] = {
        short: report.short_documents,
        (unmarked,): report.unmarked_documents,
    }
    for reason, count in report.rejected_documents.items():
        # What no limit refuses is a text whose thoughts are not marked as these say.
        keys = (_LIMITS[reason],) if reason in _LIMITS else ("open", "close")
        counts[keys] = counts.get(keys, 0) + count
    by_count = sorted(counts.items(), key=lambda one: -one[1])
    values = {key: _value(data, key) for keys, count in by_count if count for key in keys}
    return [f"data.{key}={'null' if value is None else value}" for key, value in values.items()]


def _value(data: Mapping[str, Any], path: str) -> Any:
    value: Any = data
    for part in path.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def are_all_left_out(report: PackingReport) -> bool:
    """Whether there were documents, and none of them had anything for a row."""
    left_out = report.short_documents + report.unmarked_documents + report.long_documents
    return 0 < report.documents <= left_out + sum(report.rejected_documents.values())
