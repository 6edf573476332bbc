"""Kinds of tokens: what is behind a thought, and rows without their thoughts."""

import torch

from objectives.token_kinds import behind_thoughts, without_thoughts


def row(kinds, segments=None):
    """Digits for kinds, "." for padding."""
    kind = torch.tensor([[-1 if c == "." else int(c) for c in kinds]])
    segment = torch.tensor([[-1 if c == "." else int(c) for c in segments or "0" * len(kinds)]])
    return kind, segment


def marks(mask):
    return "".join("x" if one else "-" for one in mask[0].tolist())


def test_text_behind_a_closing_delimiter():
    kinds = "002112000021200"
    assert marks(behind_thoughts(*row(kinds), 3)) == slow(kinds, 3) == "------xxx----xx"
    assert marks(behind_thoughts(*row("00212000"), 2)) == "-----xx-"
    # An empty thought, and fill inside of one.
    assert marks(behind_thoughts(*row("0220"), 9)) == "---x"
    assert marks(behind_thoughts(*row("02.120"), 9)) == "-----x"


def slow(kinds, reach):
    """One token after the other."""
    left, closes, said = 0, False, ""
    for kind in kinds:
        if kind == "2":
            left, closes = reach if closes else 0, not closes
            said += "-"
        else:
            said += "x" if kind == "0" and left > 0 else "-"
            left -= kind == "0"
    return said


def test_it_is_that_of_the_same_document():
    # The first document ends inside a thought; the second begins with text.
    kind, segment = row("0210021200.", "0001111111.")
    assert marks(behind_thoughts(kind, segment, 9)) == "--------xx-"


def test_raw_rows_are_the_text_moved_together():
    kind, segment = row("00212002120.", "00000011111.")
    batch = {
        "input_ids": torch.arange(12)[None], "kind": kind, "segment": segment,
        "response": torch.where(segment >= 0, 1, -1), "index": torch.tensor([7]),
    }  # fmt: skip
    raw = without_thoughts(batch)
    assert raw["input_ids"][0, :6].tolist() == [0, 1, 5, 6, 10, 11]
    assert raw["segment"][0].tolist() == [0, 0, 0, 1, 1, *[-1] * 7]
    assert raw["response"][0].tolist() == [1, 1, 1, 1, 1, *[-1] * 7]
    assert raw["index"].tolist() == [7]
