"""What scripts/train_stanza.py makes of treebanks, and what it says of those that it cannot use."""

import runpy
import sys

import pytest

from tests.support import ROOT

pytest.importorskip("conllu", reason="needs the package conllu")
SCRIPT = ROOT / "scripts" / "train_stanza.py"
SENTENCE = "1\tone\t_\tX\t_\t_\t0\troot\t_\t_\n\n"


def test_lines_end_at_a_newline_only(tmp_path):
    words = ["a\u2028b", "c\u0085d", "e\x0cf"]
    rows = [f"{n}\t{word}\tlemma\tX\t_\t_\t{n - 1}\tdep\t_\t_" for n, word in enumerate(words, 1)]
    texts = {"unix": "\n".join(rows) + "\n\n", "dos": "\r\n".join(rows) + "\r\n\r\n"}
    for name, text in texts.items():
        path = tmp_path / f"{name}.conllu"
        path.write_bytes(text.encode())
        (tree,) = runpy.run_path(str(SCRIPT))["treebank_trees"]([path])
        assert [word[1] for word in tree.words] == words
        assert {len(word) for word in tree.words} == {10}
        assert [word[9] for word in tree.words] == ["_"] * 3
        assert tree.ends == [3, 7, 11]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"corpus.conllu: cannot be read"),
        (b"\xff\xfe", r"corpus.conllu: not UTF-8 at line 1, byte 0"),
        (SENTENCE.encode(), r"--held-out 0.2: leaves"),
    ],
)
def test_what_cannot_be_used_is_one_line(tmp_path, monkeypatch, capsys, content, message):
    path = tmp_path / "corpus.conllu"
    if content is not None:
        path.write_bytes(content)
    arguments = [str(SCRIPT), str(path), "--out", str(tmp_path / "models")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("DataError: ") and message in line
