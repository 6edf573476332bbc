"""A measured scorer in words: tables for the terminal, Markdown, and the files of its folder."""

from collections.abc import Sequence
from pathlib import Path

from evaluation.grouped import Measure
from evaluation.scorer import LEAST_GROUPS, Gate, ScoredBlocks, Selection
from evaluation.scorer_evaluation import Part, ScorerEvaluation, alpha_name
from evaluation.scorer_plot import plot_reliability, plot_sweep
from evaluation.scorer_quality import Calibration
from evaluation.scorer_rows import NAME, write_blocks
from evaluation.tables import text_table

NOTE = (
    "oracle: the truth is among the candidates; greedy: candidate 0 is the truth; bon: the one with"
    " the largest l + alpha S is. gain = bon - greedy. A flip picks another candidate than 0: right"
    " if that is the truth, wrong if candidate 0 was. In brackets: 95 % bootstrap intervals over"
    " rows or documents; p is two-sided, of the same draws. A round is the scores of that round"
    " alone, for the candidates as they ended. Calibration: softmax of the scores"
    ' against "this candidate is the truth, given that one of them is".'
)

Table = tuple[list[str], list[list[str]]]


def tables_of(found: ScorerEvaluation) -> dict[str, Table]:
    """Header and rows by title, for the terminal and for Markdown."""
    parts = [found.whole, *found.rounds, *found.buckets]
    return {
        "Picking": _selection_table([(part.name, part.selection) for part in parts]),
        "Alpha": _selection_table([(alpha_name(one.alpha), one) for one in found.sweep], "alpha"),
        "Baselines": _baseline_table(found),
        "Order": _ordering_table(parts),
        "Calibration": _calibration_table(parts),
        "Reliability": _bin_table(found.whole.calibration),
    }


def _selection_table(rows: Sequence[tuple[str, Selection]], first: str = "blocks") -> Table:
    header = [first, "n", "oracle", "greedy", "bon", "gain", "p", "regret", "flips", "right",
              "wrong", "right / flips", "wrong / flips"]  # fmt: skip
    return header, [
        [name, str(one.blocks), show(one.oracle), show(one.greedy), show(one.bon),
         show(one.gain, "+"), "-" if one.gain_p is None else f"{one.gain_p:.2g}",
         show(one.regret), str(one.flips), str(one.right), str(one.wrong),
         show(one.right_given_flip), show(one.wrong_given_flip)]
        for name, one in rows
    ]  # fmt: skip


def _baseline_table(found: ScorerEvaluation) -> Table:
    base, used = found.baselines, found.whole.selection
    rows = [
        ["random candidate (expected)", show(base.random)],
        ["l alone", show(base.proposal)],
        ["greedy", show(used.greedy)],
        [f"l + {alpha_name(used.alpha)} S", show(used.bon)],
        ["oracle", show(used.oracle)],
        ["blocks where l prefers another candidate than 0", str(base.proposal_flips)],
    ]
    return ["picked by", "is the truth"], rows


def _ordering_table(parts: Sequence[Part]) -> Table:
    header = ["blocks", "pairs", "pairwise", "tau", "rank 1", "chance", "MRR", "chance"]
    return header, [
        [part.name, f"{one.pairwise.over:.0f}", show(one.pairwise), show(one.tau, "+"),
         show(one.rank1), _number(one.chance_rank1), show(one.mrr), _number(one.chance_mrr)]
        for part in parts for one in [part.ordering]
    ]  # fmt: skip


def _calibration_table(parts: Sequence[Part]) -> Table:
    header = ["blocks", "with the truth", "ECE", "Brier", "AUROC"]
    return header, [
        [part.name, str(one.decidable), show(one.ece), show(one.brier), show(one.auroc)]
        for part in parts for one in [part.calibration]
    ]  # fmt: skip


def _bin_table(found: Calibration) -> Table:
    rows = [
        [f"{one.low:.3f} to {one.high:.3f}", str(one.observations), _number(one.mean),
         show(Measure(one.rate, one.interval and one.interval.low,
                      one.interval and one.interval.high, one.observations))]
        for one in found.bins
    ]  # fmt: skip
    return ["p", "candidates", "mean p", "truths"], rows


def show(found: Measure, sign: str = "") -> str:
    """0.512 [0.480, 0.544]; a dash for nothing."""
    if found.value is None or found.low is None or found.high is None:
        return _number(found.value, sign)
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"


def _number(value: float | None, sign: str = "") -> str:
    return "-" if value is None else f"{value:{sign}.3f}"


def verdict(gate: Gate) -> str:
    """The gate in a line."""
    how = "ships" if gate.ships else "does not ship"
    p = "-" if gate.p is None else f"{gate.p:.2g}"
    few = f", fewer than the {LEAST_GROUPS} that shipping asks for" * (gate.groups < LEAST_GROUPS)
    return (
        f"Scorer {how}: gain {show(gate.gain, '+')} at alpha={alpha_name(gate.alpha)}, p={p},"
        f" {gate.gain.over:.0f} blocks of {gate.groups} groups{few}."
    )


def terminal_text(found: ScorerEvaluation) -> str:
    """All tables and the verdict as plain text."""
    tables = [f"{title}\n{text_table(*table)}" for title, table in tables_of(found).items()]
    return "\n\n".join([*tables, verdict(found.gate)])


def markdown_text(found: ScorerEvaluation, title: str) -> str:
    """All tables and the verdict as Markdown."""
    parts = [f"# {title}", verdict(found.gate), NOTE]
    for name, (header, rows) in tables_of(found).items():
        rule = ["---", *(["---:"] * (len(header) - 1))]
        lines = [f"| {' | '.join(cells)} |" for cells in (header, rule, *rows)]
        parts += [f"## {name}", "\n".join(lines)]
    return "\n\n".join(parts) + "\n"


def write_report(folder: Path, title: str, blocks: ScoredBlocks, found: ScorerEvaluation) -> str:
    """blocks.jsonl, scorer.md, scorer_alpha.png, scorer_reliability.png; returns the Markdown."""
    write_blocks(folder / NAME, blocks)
    text = markdown_text(found, title)
    (folder / "scorer.md").write_text(text, encoding="utf-8")
    plot_sweep(folder / "scorer_alpha.png", found.sweep)
    plot_reliability(folder / "scorer_reliability.png", found.whole.calibration)
    return text
