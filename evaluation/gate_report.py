"""The reward gate as tables and as a picture, in the columns and digits of published ones."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evaluation.benchmark_report import markdown
from evaluation.gate import Gate, GateArm, GatePair
from evaluation.statistics import Interval
from evaluation.tables import text_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Table = tuple[list[str], list[list[str]]]

ARM_HEADER = [
    "Arm", "Reward Mean", "Reward Std", "Invalid Rate", "Mixed Groups", "Near-Zero Groups",
    "Any-Success Groups", "All-Success Groups", "Avg Total New Tokens",
    "Avg Predicted Suffix Words", "Closed Think Rate",
]  # fmt: skip
EVIDENCE_HEADER = [
    "Arm", "Successes", "Judged", "Samples", "Prefixes", "Documents", "Wilson 95 %",
    "95 % by prefix", "Mean Group Std", "Closed by Itself", "Artifacts", "Avg Thought Words",
]  # fmt: skip
PAIR_HEADER = [
    "Comparison", "Mean Reward Delta", "Right Better Prefix Rate", "Left Better Prefix Rate",
    "Tie Prefix Rate", "Shared Prefixes",
]  # fmt: skip
PAIR_EVIDENCE = ["95 % of Delta", "p", "Significant"]
NOTES = (
    "95 % by prefix, and of a delta: bootstrap over prefixes, those of one document drawn together,"
    " paired where two arms are compared. Wilson's interval takes samples of one prefix for"
    " independent, and is too narrow; so are bootstraps of fewer than some twenty documents.",
    "Closed Think Rate counts boundaries, which are inserted; Closed by Itself those that the model"
    " wrote.",
    "Significant: the interval of the delta lies on one side of zero, and p, which is not below"
    " 2^(1 - m) where m documents differ, is at most 0.05; nothing is adjusted for the number of"
    " comparisons. The go/no-go fields look at values alone.",
)


def arm_cells(gate: Gate) -> Table:
    """The published columns, a row per arm."""
    return ARM_HEADER, [_arm_row(name, arm) for name, arm in gate.arms.items()]


def _arm_row(name: str, arm: GateArm) -> list[str]:
    return [
        name, digits(arm.reward_mean), digits(arm.reward_std), digits(arm.invalid_rate, 4),
        digits(arm.mixed_group_rate), digits(arm.near_zero_group_rate),
        digits(arm.any_success_group_rate), digits(arm.all_success_group_rate, 4),
        digits(arm.avg_total_new_tokens, 4), digits(arm.avg_predicted_suffix_words, 4),
        digits(arm.closed_think_rate, 4),
    ]  # fmt: skip


def evidence_cells(gate: Gate) -> Table:
    """What the published columns leave out: counts, intervals, and what a closed thought means."""
    return EVIDENCE_HEADER, [
        [
            name, str(arm.successes), str(arm.valid), str(arm.samples), str(arm.prefixes),
            str(arm.documents), between(arm.wilson), between(arm.interval),
            digits(arm.mean_group_std), digits(arm.autonomous_closed_think_rate, 4),
            digits(arm.artifact_rate, 4), digits(arm.avg_thought_words, 2),
        ]
        for name, arm in gate.arms.items()
    ]  # fmt: skip


def pair_cells(gate: Gate) -> Table:
    """Right minus left, with the evidence behind the published columns."""
    rows = [
        [
            pair.name, digits(pair.mean_reward_delta), digits(pair.right_better_prefix_rate),
            digits(pair.left_better_prefix_rate), digits(pair.tie_prefix_rate),
            str(pair.shared_prefixes), between(pair.interval),
            "-" if pair.p is None else f"{pair.p:.2g}", _yes(pair.significant),
        ]
        for pair in gate.pairs
    ]  # fmt: skip
    return [*PAIR_HEADER, *PAIR_EVIDENCE], rows


def digits(value: float | None, places: int = 6) -> str:
    """A number, or a dash; rounding leaves no minus before nothing."""
    if value is None:
        return "-"
    text = f"{value:.{places}f}"
    return text.removeprefix("-") if float(text) == 0 else text


def between(interval: Interval | None) -> str:
    """An interval, or a dash."""
    return "-" if interval is None else f"[{digits(interval.low, 4)}, {digits(interval.high, 4)}]"


def _yes(flag: bool) -> str:
    return "true" if flag else "false"


def gate_markdown(gate: Gate, notes: Sequence[str] = ()) -> str:
    """Everything as Markdown."""
    pairs = f"## Comparisons\n\n{markdown(*pair_cells(gate))}\n" if gate.pairs else ""
    fields = "".join(f"- {line}\n" for line in _verdicts(gate))
    said = "".join(f"- {line}\n" for line in (*NOTES, *notes))
    return (
        f"# Reward gate\n\n{markdown(*arm_cells(gate))}\n{markdown(*evidence_cells(gate))}\n"
        f"{pairs}## Go/no-go\n\n{fields}\n## Notes\n\n{said}"
    )


def gate_text(gate: Gate) -> str:
    """The same for a terminal, without notes."""
    tables = [arm_cells(gate), evidence_cells(gate), *([pair_cells(gate)] if gate.pairs else [])]
    return "\n\n".join([*(text_table(*table) for table in tables), "\n".join(_verdicts(gate))])


def _verdicts(gate: Gate) -> list[str]:
    """The go/no-go fields, and why some are left out."""
    lines = [f"{name}: {_yes(value)}" for name, value in gate.go_no_go.items()]
    if gate.absent:
        names = " and no arm ".join(gate.absent)
        lines.append(
            f"go/no-go of arms not compared: there is no arm {names} (mode.base_arm,"
            " mode.phase3_arm)"
        )
    return lines


def plain_arm(arm: GateArm) -> dict[str, Any]:
    """An arm as JSON, with names for the ends of intervals."""
    return asdict(arm) | {"wilson": _ends(arm.wilson), "interval": _ends(arm.interval)}


def plain_gate(gate: Gate) -> dict[str, Any]:
    """The gate as JSON."""
    return {
        "arms": {name: plain_arm(arm) for name, arm in gate.arms.items()},
        "pairs": {pair.name: _plain_pair(pair) for pair in gate.pairs},
        "go_no_go": gate.go_no_go,
    }


def _plain_pair(pair: GatePair) -> dict[str, Any]:
    return asdict(pair) | {"interval": _ends(pair.interval)}


def _ends(interval: Interval | None) -> dict[str, float] | None:
    return None if interval is None else interval._asdict()


def plot_gate(path: Path, gate: Gate) -> None:
    """Left the mean rewards of the arms, right the differences of pairs; bars are 95 % intervals
    over prefixes."""
    from matplotlib.figure import Figure

    height = 1.5 + 0.4 * max(len(gate.arms), len(gate.pairs))
    figure = Figure(figsize=(11, height), layout="constrained")
    left, right = figure.subplots(1, 2)
    _whiskers(left, [(name, arm.reward_mean, arm.interval) for name, arm in gate.arms.items()])
    _whiskers(right, [(pair.name, pair.mean_reward_delta, pair.interval) for pair in gate.pairs])
    left.set_xlabel("mean reward")
    right.set_xlabel("difference of mean rewards")
    right.axvline(0.0, color="grey", linewidth=0.8, linestyle=":")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _whiskers(axis: "Axes", lines: Sequence[tuple[str, float | None, Interval | None]]) -> None:
    for place, (_, value, interval) in enumerate(lines):
        if value is None:
            continue
        low, high = interval or (value, value)
        # The ends of a percentile interval need not lie around the value.
        ends = [[max(0.0, value - low)], [max(0.0, high - value)]]
        axis.errorbar([value], [place], xerr=ends, color=f"C{place % 10}", marker="o", capsize=3)
    axis.set_yticks(range(len(lines)), [name for name, _, _ in lines])
    axis.invert_yaxis()
