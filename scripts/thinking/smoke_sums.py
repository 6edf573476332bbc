"""A corpus of chain sums for the recipes of scripts/thinking, made in a moment.

    python scripts/thinking/smoke_sums.py FOLDER

Writes FOLDER/phase3/sums.jsonl and FOLDER/thoughts/sums.jsonl (three sums a document, under "text")
and FOLDER/questions.jsonl (one a row, with its answer). With SMOKE=1 the recipes read them: they
run the code of the real ones, not their science.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from data.fingerprint import unit_hash  # noqa: E402
from data.journal import encode_row  # noqa: E402
from data.storage import atomic_file  # noqa: E402

SIZES = {"phase3": 120, "thoughts": 200}
QUESTIONS = 6
_SUMS = 3  # of a document


def chain(name: str) -> tuple[str, int]:
    """A sum of two or three numbers below 100, drawn by its name, and its value."""
    total = 10 + int(90 * unit_hash(f"{name} first"))
    text = str(total)
    for place in range(1 + int(2 * unit_hash(f"{name} length"))):
        number = 1 + int(99 * unit_hash(f"{name} number {place}"))
        sign = "+" if number > total or unit_hash(f"{name} sign {place}") < 0.5 else "-"
        text += f" {sign} {number}"
        total += number if sign == "+" else -number
    return f"{text} =", total


def documents(split: str) -> Iterator[dict[str, str]]:
    """Rows of a split, each with the answers to its sums."""
    for number in range(SIZES[split]):
        sums = [chain(f"{split} {number} {place}") for place in range(_SUMS)]
        text = "".join(f"{question} {answer}\n" for question, answer in sums)
        yield {"id": f"{split}-{number}", "text": text}


def questions() -> Iterator[dict[str, str]]:
    """Sums, and apart from them their answers."""
    for number in range(QUESTIONS):
        question, answer = chain(f"questions {number}")
        yield {"id": str(number), "question": question, "answer": str(answer)}


def main() -> None:
    """Write the files; the questions last, by which a complete folder is known."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    files = {folder / split / "sums.jsonl": documents(split) for split in SIZES}
    for path, rows in (files | {folder / "questions.jsonl": questions()}).items():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path, "FOLDER") as file:
            for row in rows:
                file.write(encode_row(row))


if __name__ == "__main__":
    main()
