r"""Mathematics (GSM8K, MATH-500): is the answer equal to the right one, as math-verify sees it?

The answer is the last \boxed{...}, or else what follows the last `####`, or else the last "answer
is"; where a text has none of them, math-verify looks for the last expression of its end.
"""

import re
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from rewards.extraction import after_cue, boxed, first_line
from rewards.judge import Judge
from rewards.verdict import NO_ANSWER, Item, Verdict, needed

LIBRARIES = ("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime")
# GSM8K writes its answers behind this, and so do models that have seen examples.
_MARK = "####"
# Longer ones are no answers, and keep a parser busy.
_LONGEST_ANSWER, _LONGEST_END = 500, 1000
_DECORATION = re.compile(r"\s+|\$|\\left|\\right|\\[!,;]")
# The other two stars of **72**, whose first ones belong to the cue; none of a power.
_END_OF_BOLD = re.compile(r"(?<=\S)\*\*(?=[\s.,;:]|$)")
_TEXT = re.compile(r"\\(?:text|mbox)\{([^{}]*)\}")


class MathGrader:
    """Compares by math-verify, in a process that is killed if that takes too long.

    Args:
        timeout_s: limit in seconds of one comparison.
        memory_mb: limit in MiB of the address space of one, math-verify's own included.

    Raises:
        ValueError: a limit out of range, math-verify is not installed, or this is not Linux.
    """

    def __init__(self, timeout_s: float | int = 5.0, memory_mb: int = 2048) -> None:
        check_limits("math", timeout_s, memory_mb)
        self._versions = versions("math", LIBRARIES)
        self._judge = Judge("rewards.judged_math", timeout_s, memory_mb)

    def grade(self, item: Item, text: str) -> Verdict:
        """Whether the answer equals that of the item."""
        gold = needed(item, "answer", "math").rsplit(_MARK, 1)[-1].strip()
        answer, shown = locate_answer(text)
        if answer is None:
            shown = text[-_LONGEST_END:]
        elif len(answer) > _LONGEST_ANSWER:
            reason = f"the answer has {len(answer)} characters, more than {_LONGEST_ANSWER}"
            return Verdict(False, answer[:_LONGEST_ANSWER], reason)
        elif _bare(answer) == _bare(gold):
            return Verdict(True, answer)
        said = self._judge.ask(gold=gold, text=shown)
        if said.value is None:
            return Verdict(False, answer, said.reason, decided=False)
        found = said.value["found"] if answer is None else answer
        if found is None:
            return NO_ANSWER
        if not said.value["gold"]:
            return Verdict(False, found, f"the item's answer {gold!r} is not understood", False)
        return Verdict(said.value["correct"], found)

    def check(self, item: Item) -> None:
        """Raise ValueError unless the item has an answer."""
        needed(item, "answer", "math")

    def fingerprint(self) -> dict[str, Any]:
        """The limits, and the versions of what compares."""
        limits = {"timeout_s": self._judge.timeout_s, "memory_mb": self._judge.memory_mb}
        return {"grader": "math", **limits, "versions": self._versions}

    def close(self) -> None:
        """End the processes that compare."""
        self._judge.close()


def locate_answer(text: str) -> tuple[str | None, str]:
    """Where the text says what its answer is.

    Returns:
        The answer, None if it is not said; the same in words that math-verify reads an answer from.
    """
    box = boxed(text)
    if box is not None:
        return box or None, f"\\boxed{{{box}}}"
    mark = first_line(text.rsplit(_MARK, 1)[1]) if _MARK in text else ""
    line = _END_OF_BOLD.sub("", mark or first_line(after_cue(text) or "")).rstrip(" .")
    return line or None, f"The final answer is {line}"


def _bare(text: str) -> str:
    """Without what does not change the meaning of an expression."""
    plain = _TEXT.sub(r"\1", _DECORATION.sub("", text))
    return plain.rstrip(".").replace("dfrac", "frac").replace("tfrac", "frac")


def check_limits(grader: str, timeout_s: float, memory_mb: int) -> None:
    """Raise ValueError for limits that no process can keep."""
    if timeout_s <= 0 or memory_mb < 512:
        raise ValueError(
            f"grader={grader}: timeout_s={timeout_s}, memory_mb={memory_mb}: allowed above 0, and"
            " 512 or more"
        )


def versions(grader: str, libraries: tuple[str, ...]) -> dict[str, str]:
    """Of installed packages.

    Raises:
        ValueError: one of them is not installed.
    """
    found = {}
    for name in libraries:
        try:
            found[name] = version(name)
        except PackageNotFoundError as error:
            raise ValueError(
                f"grader={grader}: needs the package `{name}`; allowed:"
                " pip install -r requirements-extra.txt"
            ) from error
    return found
