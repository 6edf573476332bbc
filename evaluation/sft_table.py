"""Arms of supervised fine-tuning side by side, from what mode=sft_eval found of each.

The first table has the columns and digits of the published one; its rate of repetition is that of
the data, on which arms with the same data agree. The second has what a reader needs beside it: how
much was evaluated, standard errors, and the repetition of what the models write.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.errors import DataError

Arm = Mapping[str, Any]

COLUMNS = (
    ("Arm", "arm", ""),
    ("Primary Metric", "primary_metric", ".6f"),
    ("Val Loss Raw", "val_loss_raw", ".6f"),
    ("Val Loss Selected", "val_loss_selected", ".6f"),
    ("Repetition 4-gram Rate", "repetition_4gram_rate_data", ".6f"),
    ("Tokens Seen", "tokens_seen", ",d"),
    ("Throughput tok/s", "tok_per_sec", ".2f"),
    ("Min Available Mem GiB", "available_mem_gib_min", ".2f"),
)
_EVIDENCE = (
    ("Arm", "arm", ""),
    ("Rows", "rows", ",d"),
    ("Raw SE", "val_loss_raw_se", ".6f"),
    ("Selected SE", "val_loss_selected_se", ".6f"),
    ("Raw Batch Mean", "val_loss_raw_batch_mean", ".6f"),
    ("Selected Batch Mean", "val_loss_selected_batch_mean", ".6f"),
    ("Texts", "repetition_4gram_texts_data", ",d"),
    ("Data Rate SE", "repetition_4gram_rate_data_se", ".6f"),
    ("Generated", "repetition_4gram_texts_generated", ",d"),
    ("Generated 4-gram Rate", "repetition_4gram_rate_generated", ".6f"),
    ("Generated Rate SE", "repetition_4gram_rate_generated_se", ".6f"),
)
_REQUIRED = ("arm", "primary_metric", "val_loss_raw", "val_loss_selected")
# What the name of a column cannot say.
NOTES = (
    "Losses are in nats per token. Val Loss Raw: the text without thoughts; Val Loss Selected, the"
    " primary metric: the arm's own format. Repetition 4-gram Rate: of validation rows, not of what"
    " the model writes."
)

Cells = tuple[list[str], list[list[str]]]


def sft_table(arms: Sequence[Arm]) -> Cells:
    """Header and a row per arm; a dash where an arm does not say.

    Raises:
        DataError: an arm without its losses, or two of one name.
    """
    _check(arms)
    return _cells(COLUMNS, arms)


def evidence_table(arms: Sequence[Arm]) -> Cells:
    """Header and a row per arm of counts and standard errors.

    Raises:
        DataError: an arm without its losses, or two of one name.
    """
    _check(arms)
    return _cells(_EVIDENCE, arms)


def remarks(arms: Sequence[Arm]) -> list[str]:
    """What makes arms less than comparable: losses of other rows are of other texts."""
    rows = {arm["arm"]: arm["rows"] for arm in arms if arm.get("rows") is not None}
    if len(set(rows.values())) < 2:
        return []
    said = ", ".join(f"{arm} {number}" for arm, number in rows.items())
    return [f"Not the same validation rows, so that losses cannot be compared: {said}"]


def _check(arms: Sequence[Arm]) -> None:
    names: set[str] = set()
    for arm in arms:
        missing = [key for key in _REQUIRED if arm.get(key) is None]
        if missing:
            raise DataError(
                f"arm {arm.get('arm')!r}: no {missing[0]}; allowed: metrics.json of mode=sft_eval"
            )
        if not isinstance(arm["arm"], str):
            raise DataError(f"arm={arm['arm']!r} in a table of arms: allowed: a text")
        if arm["arm"] in names:
            raise DataError(f"two arms are called {arm['arm']!r}; allowed: one mode.label each")
        names.add(arm["arm"])


def _cells(columns: Sequence[tuple[str, str, str]], arms: Sequence[Arm]) -> Cells:
    rows = [[_cell(key, arm.get(key), form) for _, key, form in columns] for arm in arms]
    return [header for header, _, _ in columns], rows


def _cell(key: str, value: Any, form: str) -> str:
    if value is None:
        return "-"
    try:
        return format(value, form)
    except (TypeError, ValueError) as error:
        raise DataError(f"{key}={value!r} in a table of arms: allowed: a number") from error
