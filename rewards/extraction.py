"""Where the answer stands in a text."""

import re

_BOX = re.compile(r"\\(?:boxed|fbox)\s*")
# The last cue counts: "The answer is 4. Wait, no: the answer is 5."
_CUE = re.compile(
    r"answer\b(?:\s+(?:to|for)\b[^.\n]{0,60}?)?[*\s]*(?:\b(?:is|are)\b|:|=)[*\s]*:?[*\s]*",
    re.IGNORECASE,
)
_TAG = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)


def boxed(text: str) -> str | None:
    r"""The content of the last complete \boxed{...}; None: there is none."""
    for match in reversed(list(_BOX.finditer(text))):
        content = _in_braces(text, match.end())
        if content is not None:
            return content.strip()
    return None


def _in_braces(text: str, start: int) -> str | None:
    if not text.startswith("{", start):
        return None
    depth, escaped = 0, False
    for place in range(start, len(text)):
        letter = text[place]
        if letter in "{}" and not escaped:
            depth += 1 if letter == "{" else -1
            if depth == 0:
                return text[start + 1 : place]
        escaped = letter == "\\" and not escaped
    return None


def after_cue(text: str) -> str | None:
    """What follows the last "answer is" or "Answer:", to the end; None: there is none."""
    cues = list(_CUE.finditer(text))
    return (text[cues[-1].end() :].strip() or None) if cues else None


def tagged(text: str) -> str | None:
    """The content of the last <answer>...</answer>; None: there is none."""
    found = _TAG.findall(text)
    return (found[-1].strip() or None) if found else None


def first_line(text: str) -> str:
    """The first line that is not empty."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")


def last_line(text: str) -> str:
    """The last line that is not empty."""
    return first_line("\n".join(reversed(text.splitlines())))
