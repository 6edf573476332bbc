"""HumanEval (arXiv:2107.03374): a completion is right if its program passes the tests."""

import platform
import re
from typing import Any

from rewards.jail.channel import CANDIDATE
from rewards.sandbox import LEAST_MEMORY_MB, run_python
from rewards.verdict import NO_ANSWER, Item, Verdict, needed

# Where a function ends that a model goes on after: those of the paper, and the end of a fence.
STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint", "\n```")
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)(?:\n[ \t]*```|\Z)", re.DOTALL)
_TOP_LEVEL = re.compile(r"^(?:@|(?:from|import|def|class|async)\b)", re.MULTILINE)


class HumanEvalGrader:
    """Runs the program of a completion and its tests in the sandbox.

    Of a text with fenced code the last block that defines the function is taken, or else the last
    block; of any other text a definition of the function, or else the text as the rest of the
    prompt, cut at the first of `STOPS`.

    Args:
        timeout_s: limit in seconds of program and tests together.
        memory_mb: limit in MiB of their address space.

    Raises:
        ValueError: a limit out of range.
    """

    def __init__(self, timeout_s: float | int = 5.0, memory_mb: int = 512) -> None:
        if timeout_s <= 0 or memory_mb < LEAST_MEMORY_MB:
            raise ValueError(
                f"grader=humaneval: timeout_s={timeout_s}, memory_mb={memory_mb}: allowed above 0,"
                f" and {LEAST_MEMORY_MB} or more"
            )
        self.timeout_s, self.memory_mb = timeout_s, memory_mb

    def grade(self, item: Item, text: str) -> Verdict:
        """Whether the program passes all tests of the problem."""
        prompt, tests, name = _problem(item)
        code = extract_code(text, name)
        if code is None:
            return NO_ANSWER
        outcome = run_python(
            complete(prompt, code, name),
            # The prompt brings what the tests call besides the function.
            tests=f"{tests}\n{prompt}\n{name} = {CANDIDATE}\ncheck({name})\n",
            entry_point=name,
            timeout_s=self.timeout_s,
            memory_mb=self.memory_mb,
        )
        if outcome.status == "passed":
            return Verdict(True, code)
        return Verdict(False, code, outcome.detail)

    def check(self, item: Item) -> None:
        """Raise ValueError unless the item is a problem with tests."""
        _problem(item)

    def fingerprint(self) -> dict[str, Any]:
        """The limits and the version of Python."""
        return {
            "grader": "humaneval", "timeout_s": self.timeout_s, "memory_mb": self.memory_mb,
            "python": platform.python_version(),
        }  # fmt: skip


def _problem(item: Item) -> tuple[str, str, str]:
    """Prompt, tests and name of the function."""
    prompt, tests, name = (
        needed(item, field, "humaneval") for field in ("question", "tests", "entry_point")
    )
    return prompt, tests, name


def extract_code(text: str, name: str) -> str | None:
    """The code of an answer.

    Args:
        text: the answer.
        name: the function it should define.

    Returns:
        A definition of the function, with what belongs to it, or the rest of its body; None: the
        text is empty.
    """
    blocks = _FENCE.findall(text)
    # Code before the first fence ends with one that the prompt began.
    code_first = text.lstrip("\n").startswith(("  ", "\t")) or _defines(text.split("```")[0], name)
    if blocks and not code_first:
        defining = [block for block in blocks if _defines(block, name)]
        return (defining or blocks)[-1]
    if _defines(text, name):
        first = _TOP_LEVEL.search(text)
        assert first is not None
        return text[first.start() :].split("\n```")[0]
    body = text[: min((at for stop in STOPS if (at := text.find(stop)) >= 0), default=len(text))]
    return body if body.strip() else None


def complete(prompt: str, code: str, name: str) -> str:
    """The program: a definition stands below what the prompt has above its own."""
    if _defines(code, name):
        above = re.split(rf"^def {re.escape(name)}\b", prompt, maxsplit=1, flags=re.MULTILINE)[0]
        return f"{above}\n{code}\n"
    # Generators strip texts, and a body begins with its indent.
    indent = "" if not code.strip() or code.lstrip("\n")[0].isspace() else "    "
    return f"{prompt}{indent}{code}\n"


def _defines(code: str, name: str) -> bool:
    return re.search(rf"^def {re.escape(name)}\b", code, re.MULTILINE) is not None
