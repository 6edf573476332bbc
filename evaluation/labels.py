"""What the answers of a training set look like: length, language, form, and whether they end.

An audit of labels, by source and over all. A rate comes with its counts and Wilson's interval.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data.chat import Row
from data.errors import DataError
from data.fingerprint import unit_hash
from evaluation.degeneration import DEFAULT, LoopRule, is_degenerate
from evaluation.statistics import wilson_interval

ALL = "all"
TOKENS, WORDS = "tokens", "words"
QUANTILES = {"p10": 0.1, "median": 0.5, "p90": 0.9}
UNKNOWN = "unknown"
# A mark of LaTeX: a command, or a delimiter that mathematics begins with. A dollar is one where a
# text without a space at either end follows and the dollar behind it is before no digit: "$5 and
# $10" are prices.
LATEX = re.compile(r"\\[A-Za-z]+|\\[()\[\]]|\$\$|\$(?=[^\s$](?:[^$\n]*[^\s$\\])?\$(?![\d$]))")
BOXED = re.compile(r"\\boxed\b")
# What says nothing about the language of an answer: code and formulas.
_CODE = re.compile(r"```.*?(?:```|\Z)|`[^`\n]*`", re.DOTALL)
_FORMULA = re.compile(r"\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|\\[A-Za-z]+", re.DOTALL)
LANGUAGE_CHARACTERS = 1000

Detector = Callable[[str], str]


@dataclass
class Labels:
    """The answers of one source.

    Attributes:
        words: lengths in words.
        tokens: lengths in tokens, of the answers that have token ids.
        latex: marks of LaTeX per answer.
        finish: how often an answer ended by "stop", "length", or without saying so.
        boxed: answers with a \\boxed result.
        degenerate: answers that only repeat themselves.
        empty: answers without any text.
        languages: of the answers that were looked at.
    """

    words: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    latex: list[int] = field(default_factory=list)
    finish: Counter[str] = field(default_factory=Counter)
    boxed: int = 0
    degenerate: int = 0
    empty: int = 0
    languages: Counter[str] = field(default_factory=Counter)

    def merge(self, other: "Labels") -> None:
        """Add the answers of another source."""
        for name in ("words", "tokens", "latex"):
            getattr(self, name).extend(getattr(other, name))
        self.finish.update(other.finish)
        self.languages.update(other.languages)
        for name in ("boxed", "degenerate", "empty"):
            setattr(self, name, getattr(self, name) + getattr(other, name))


def audit_labels(
    rows: Iterable[Row],
    rule: LoopRule = DEFAULT,
    detect: Detector | None = None,
    language_share: float = 1.0,
) -> dict[str, Labels]:
    """Look at answered rows.

    Args:
        rows: rows with a `response`.
        rule: what counts as looping; on token ids where a row has them, else on words.
        detect: the language of a text; None: not looked at.
        language_share: share of the rows whose language is looked at, chosen by a hash of the id.

    Returns:
        By source, sorted; ALL last.
    """
    found: dict[str, Labels] = {}
    for row in rows:
        labels = found.setdefault(row["source"], Labels())
        _count(labels, row, rule)
        if detect is not None and unit_hash(f"language\n{row['id']}") < language_share:
            labels.languages[detect(prose(row["response"]))] += 1
    if ALL in found:
        raise DataError(f"source {ALL!r}: is the name of the sum; allowed: other names")
    total = Labels()
    for labels in found.values():
        total.merge(labels)
    return dict(sorted(found.items())) | {ALL: total}


def _count(labels: Labels, row: Row, rule: LoopRule) -> None:
    text, ids = row["response"], row.get("response_ids")
    words = text.split()
    labels.words.append(len(words))
    if ids is not None:
        labels.tokens.append(len(ids))
    labels.latex.append(len(LATEX.findall(text)))
    finish = row.get("finish")
    labels.finish[finish if finish in ("stop", "length") else UNKNOWN] += 1
    labels.boxed += BOXED.search(text) is not None
    labels.degenerate += is_degenerate(words if ids is None else ids, rule)
    labels.empty += not words


def unit_of(labels: Mapping[str, Labels]) -> str:
    """What lengths are measured in: tokens, if every answer has token ids, else words."""
    total = labels[ALL]
    return TOKENS if len(total.tokens) == len(total.words) else WORDS


def summary(labels: Labels, unit: str) -> dict[str, Any]:
    """The figures of one source: lengths, marks and rates.

    `capped` is the share of answers that a limit cut off, of those that say how they ended.
    """
    lengths = np.asarray(labels.tokens if unit == TOKENS else labels.words)
    rows = len(labels.words)
    ended = labels.finish["stop"] + labels.finish["length"]
    quantiles = np.quantile(lengths, list(QUANTILES.values()))
    return {
        "rows": rows,
        "unit": unit,
        "mean": float(lengths.mean()),
        **dict(zip(QUANTILES, map(float, quantiles), strict=True)),
        "max": int(lengths.max()),
        "capped": rate(labels.finish["length"], ended),
        "finish_unknown": labels.finish[UNKNOWN],
        "boxed": rate(labels.boxed, rows),
        "degenerate": rate(labels.degenerate, rows),
        "latex_per_answer": float(np.mean(labels.latex)),
        "empty": labels.empty,
        "languages": dict(labels.languages.most_common()),
    }


def rate(successes: int, trials: int) -> dict[str, float | None]:
    """A rate with its counts and 95 % interval; without trials there is none."""
    if not trials:
        return {"rate": None, "successes": 0, "trials": 0, "low": None, "high": None}
    low, high = wilson_interval(successes, trials)
    value = successes / trials
    return {"rate": value, "successes": successes, "trials": trials, "low": low, "high": high}


def histogram(lengths: Sequence[int], bins: int = 40) -> tuple[list[int], list[float]]:
    """Counts and edges of equal bins from 0 to the longest."""
    top = max(*lengths, 1)
    counts, edges = np.histogram(lengths, bins=min(bins, top), range=(0, top))
    return counts.tolist(), edges.tolist()


def prose(text: str) -> str:
    """The first of an answer's words that are neither code nor formula."""
    bare = _FORMULA.sub(" ", _CODE.sub(" ", text))
    return " ".join(bare.split())[:LANGUAGE_CHARACTERS]


def language_detector() -> Detector:
    """Two-letter codes of `langdetect`, seeded, or "unknown" where a text has no language.

    Raises:
        DataError: `langdetect` is not installed.
    """
    try:
        import langdetect
    except ImportError as error:
        raise DataError(
            "mode.language_share: needs the library `langdetect`; allowed: 0,"
            " or pip install langdetect"
        ) from error
    langdetect.DetectorFactory.seed = 0

    def detect(text: str) -> str:
        try:
            return langdetect.detect(text)
        except langdetect.LangDetectException:
            return UNKNOWN

    return detect


def metrics_of(figures: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """The figures of every source as numbers, `SOURCE/NAME`; nan where there is no rate."""
    metrics: dict[str, float] = {}
    for source, line in figures.items():
        for name in ("rows", "mean", *QUANTILES, "max", "latex_per_answer", "empty"):
            metrics[f"{source}/{name}"] = line[name]
        for name in ("capped", "boxed", "degenerate"):
            value = line[name]["rate"]
            metrics[f"{source}/{name}"] = math.nan if value is None else value
    return metrics
