"""Rows with thoughts, made by hand and from a file, for the runs that train on them."""

from pathlib import Path
from typing import Any

import torch

THINK = "model.extra_tokens=['<think>','</think>']"


def thoughts(folder: Path, marked: bool = True) -> tuple[str, ...]:
    """Overrides: lines of text with two thoughts each; without `marked`, without their kinds."""
    path = folder / "thoughts.txt"
    if not path.is_file():
        lines = (
            f"line {n} is <think> x{n % 3} y </think> here {'xy' * (n % 5)}"
            f" <think> ok {n % 4} </think> end."
            for n in range(120)
        )
        path.write_text("\n\n".join(lines))
    source = ("data.source._target_=tests.plugins.toy_thoughts.ThoughtText",) if marked else ()
    return (
        "experiment=block_text", "data=text", f"data.files={path}", "data.valid_fraction=0.2",
        "data.split_paragraphs=true", THINK, *source,
    )  # fmt: skip


def rows(*documents: str, length: int = 24) -> dict[str, Any]:
    """A batch of one document per row: "t" is text, "h" a thought, "<" and ">" the delimiters.

    Every token is another one, so that no two rows look alike.
    """
    shape = len(documents), length
    batch = {
        "input_ids": 4 + torch.arange(len(documents) * length).view(shape),
        "index": torch.arange(len(documents)),
    }
    batch |= {name: torch.full(shape, -1) for name in ("segment", "response", "kind")}
    for row, document in enumerate(documents):
        kinds = torch.tensor([{"t": 0, "h": 1}.get(letter, 2) for letter in document])
        batch["kind"][row, : len(kinds)] = kinds
        batch["segment"][row, : len(kinds)] = 0
        batch["response"][row, : len(kinds)] = 1
    return batch
