"""Whether two mathematical expressions mean the same, by math-verify; for `rewards.judge` only.

math-verify evaluates what it reads, and its own time limits are signals that do not stop it in the
middle of a large power. So it runs nowhere but in a process that can be killed.
"""

from typing import Any

from math_verify import parse, verify

WARM_UP: list[dict[str, Any]] = [
    {"gold": r"\frac{1}{2}", "text": r"\boxed{0.5}"},
    {"gold": r"x^2 + \sqrt{3}", "text": r"The answer is $\sqrt{3} + x^2$."},
    {"gold": r"\left( 3, \frac{\pi}{2} \right)", "text": r"\boxed{(3, \pi/2)}"},
    {"gold": "18", "text": "She makes 9 * 2 = $18 per day."},
]


def judge(gold: str, text: str) -> dict[str, Any]:
    """Compare.

    Args:
        gold: the right answer, LaTeX without dollar signs.
        text: where the answer is looked for.

    Returns:
        `correct`; `found`, what was read, or None; `gold`, whether the right answer was understood.
    """
    # It is killed from outside, so it needs no limits of its own.
    right = parse(f"\\boxed{{{gold}}}", parsing_timeout=None)
    given = parse(text, parsing_timeout=None)
    correct = bool(right and given) and verify(right, given, timeout_seconds=None)
    return {"correct": correct, "found": str(given[-1]) if given else None, "gold": bool(right)}
